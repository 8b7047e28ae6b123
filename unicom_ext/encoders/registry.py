"""Image encoders by name.

small, small-rgb            a small convolutional network, for images from 32 pixels
vit-{ti,s,b,l}-PATCH        UNICOM's vision transformer
pixels, hog                 principal components, without a neural network
timm:NAME, open_clip:NAME   networks of these packages
hf:FOLDER                   a vision model of transformers
package.module:function     whatever a function of yours makes
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.encoders import libraries, weights
from unicom_ext.encoders.classical import GradientHistograms, PrincipalComponents
from unicom_ext.encoders.encoder import ImageEncoder, Request, WithHead
from unicom_ext.encoders.libraries import Built
from unicom_ext.encoders.packages import call_factory, closest
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.small import SMALLEST, Encoder
from unicom_ext.encoders.vit import PATCHES, RELEASED, SIZES, VisionTransformer, parsed
from unicom_ext.utils.settings import ConfigError

__all__ = ["ImageEncoder", "create"]


def create(settings: EncoderSettings, embedding_size: int = 0) -> ImageEncoder:
    """The encoder that the settings name, with the weights that they name.

    Args:
        settings: `encoder`, `weights`, `image_size`, and `width` of small and small-rgb.
        embedding_size: of the output; 0 for the encoder's own. small, vit-*, pixels and hog are
            made of that size unless weights say otherwise. Where the encoder's own is another, a
            linear layer and batch normalisation follow it, and are not trained yet unless the
            weights have them, too.

    Random weights are drawn from torch's global generator.

    Raises ConfigError on a setting that cannot be used, CheckpointError on weights that cannot be
    read or do not fit.
    """
    saved = weights.read(settings.weights) if settings.weights else None
    encoder, saved = _builder(settings.encoder)(Request(settings, embedding_size, saved))
    wanted = embedding_size or encoder.dim
    body = encoder.module
    if saved is not None and saved.has_head:
        wanted = embedding_size or len(saved.tensors[f"{weights.HEAD}0.weight"])
    if wanted != encoder.dim or (saved is not None and saved.has_head):
        module = WithHead(body, encoder.dim, wanted)
        encoder = dataclasses.replace(encoder, module=module, dim=wanted)
    if saved is not None:
        target = encoder.module if saved.has_head else body
        weights.load(target, saved, settings.encoder)
    return encoder


def _small(request: Request) -> Built:
    size = request.image_size(SMALLEST, at_least=SMALLEST)
    mode = "RGB" if request.name == "small-rgb" else "L"
    dim = request.dim(Encoder.OUTPUT, 128)
    module = partial(Encoder, dim, request.settings.width, len(mode))
    return _own(request, module, _in_unit_range(size, mode), dim)


def _vit(request: Request) -> Built:
    width, depth, heads, patch = parsed(request.name)
    size = request.image_size(224, at_least=patch)
    own = next((dim for name, _, dim in RELEASED if name == request.name), min(width, 768))
    dim = request.dim(VisionTransformer.OUTPUT, own)
    module = partial(VisionTransformer, size, patch, width, depth, heads, dim)
    return _own(request, module, Preprocessing(size), dim)


def _pixels(request: Request) -> Built:
    return _components(request, PrincipalComponents, request.image_size(32))


def _hog(request: Request) -> Built:
    sides = GradientHistograms.SIDES
    size = request.image_size(32, at_least=2 * sides, multiple_of=sides)
    return _components(request, GradientHistograms, size)


def _components(request: Request, kind: type[PrincipalComponents], size: int) -> Built:
    dim = request.dim(kind.OUTPUT, 128, axis=1)
    return _own(request, partial(kind, size, dim), _in_unit_range(size, "L"), dim)


def _factory(request: Request) -> Built:
    made = call_factory("encoder", request.name)
    if isinstance(made, ImageEncoder):
        return request.made(made.module, made.preprocessing), request.saved
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"encoder: {request.name} returns a {type(made).__name__}, must return an nn.Module or "
            "an ImageEncoder"
        )
    return request.made(made, Preprocessing(224)), request.saved


def _own(
    request: Request, make: Callable[[], nn.Module], preprocessing: Preprocessing, dim: int
) -> Built:
    if request.saved is None:
        module = make()
    else:
        # The weights fill all of it. To draw hundreds of millions of values would take longer.
        with torch.device("meta"):
            module = make()
        module.to_empty(device=torch.get_default_device())
    return ImageEncoder(request.name, module, preprocessing, dim), request.saved


def _in_unit_range(size: int, mode: str) -> Preprocessing:
    """Values as they are, from 0 to 1."""
    return Preprocessing(size, mode, (0.0,) * len(mode), (1.0,) * len(mode))


_BY_NAME: dict[str, Callable[[Request], Built]] = {
    "small": _small,
    "small-rgb": _small,
    "pixels": _pixels,
    "hog": _hog,
}
_BY_LIBRARY: dict[str, Callable[[Request], Built]] = {
    "timm": libraries.timm_encoder,
    "open_clip": libraries.open_clip_encoder,
    "hf": libraries.transformers_encoder,
}
_COMMON_PATCHES = (4, 8, 14, 16, 32)


def _builder(name: str) -> Callable[[Request], Built]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    vit = re.fullmatch(rf"vit-({'|'.join(SIZES)})-([1-9][0-9]?)", name)
    if vit and PATCHES[0] <= int(vit[2]) <= PATCHES[1]:
        return _vit
    library, _, rest = name.partition(":")
    if rest:
        return _BY_LIBRARY.get(library, _factory)
    like = [*_BY_NAME, *(f"vit-{size}-{patch}" for size in SIZES for patch in _COMMON_PATCHES)]
    raise ConfigError(
        f"encoder: got {name!r}, but there is none of that name{closest(name, like)} There are "
        f"{', '.join(_BY_NAME)}, vit-SIZE-PATCH with a size of {', '.join(SIZES)} and a patch from "
        f"{PATCHES[0]} to {PATCHES[1]}, timm:NAME, open_clip:NAME, hf:FOLDER and "
        "package.module:function"
    )
