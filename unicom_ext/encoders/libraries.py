"""Image encoders of timm, open_clip and transformers, where these are installed.

Weights come from files and folders, never over the network, and images are prepared as the
library's own configuration of the network says, but for these: the square is always cut out of the
middle, where some networks squeeze the whole picture into it.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.encoders.encoder import ImageEncoder, Request
from unicom_ext.encoders.packages import closest, package
from unicom_ext.encoders.weights import Saved
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError

Built = tuple[ImageEncoder, Saved | None]  # with the weights that are still to be loaded


def timm_encoder(request: Request) -> Built:
    """timm:NAME, pooled and without its classifier. The weights may have one."""
    timm = package("timm", "timm", request.name)
    name = _local(request)
    if not timm.is_model(name):
        raise ConfigError(
            f"encoder: got {request.name!r}, but timm has no model {name!r}"
            f"{closest(name, timm.list_models())}"
        )
    known = timm.get_pretrained_cfg(name)
    sizes = {}
    if request.settings.image_size and getattr(known, "fixed_input_size", False):
        sizes["img_size"] = request.settings.image_size
    model = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    about = timm.data.resolve_model_data_config(model)
    preprocessing = Preprocessing(
        size=about["input_size"][-1],
        mode="RGB" if about["input_size"][0] == 3 else "L",
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        crop=about["crop_pct"],
        interpolation=about["interpolation"],
    )
    encoder = request.made(model, preprocessing)
    saved = request.saved
    if saved is not None:
        classifier = model.pretrained_cfg.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else classifier
        body = {
            key: tensor
            for key, tensor in saved.body.items()
            if not key.startswith(tuple(f"{name}." for name in names))
        }
        # By convention the function beside a model that brings positions to its number of tokens,
        # and names of older files to its own.
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        saved = saved.with_body(adapt(body, model) if adapt else body)
    return encoder, saved


def open_clip_encoder(request: Request) -> Built:
    """open_clip:NAME, its image tower with the projection. Weights are of both towers, or of this
    one as it was saved from here."""
    open_clip = package("open_clip", "open_clip_torch", request.name)
    name = _local(request)
    try:
        config = open_clip.get_model_config(name)  # local-dir:FOLDER is a name, too
    except OSError as error:
        raise ConfigError(f"encoder: {request.name} cannot be read: {error}") from None
    if config is None:
        raise ConfigError(
            f"encoder: got {request.name!r}, but open_clip has no model {name!r}"
            f"{closest(name, open_clip.list_models())}"
        )
    if "hf_model_name" in config["text_cfg"]:
        raise ConfigError(
            f"encoder: got {request.name!r}, whose text tower open_clip reads over the network"
        )
    saved = request.saved
    of_both = saved is not None and any(key.startswith("visual.") for key in saved.tensors)
    try:
        model = open_clip.create_model(
            name,
            pretrained=request.settings.weights if of_both else None,
            force_image_size=request.settings.image_size or None,
        )
    except (RuntimeError, KeyError) as error:
        if not of_both:
            raise
        raise CheckpointError(
            f"{request.settings.weights}: does not fit {request.name}: {_short(error)}"
        ) from None
    about = model.visual.preprocess_cfg
    size = about["size"]
    preprocessing = Preprocessing(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        interpolation=about["interpolation"],
    )
    return request.made(model.visual, preprocessing), None if of_both else saved


class PooledOutput(nn.Module):
    """A vision model of transformers: images [B, 3, s, s] -> [B, dim].

    Of CLIP the projected embedding; of others what they call pooled, or, where the folder has no
    weights for that, the first token.
    """

    def __init__(self, model: nn.Module, first_token: bool, **keywords: Any) -> None:
        super().__init__()
        self.model = model
        self.first_token = first_token
        self.keywords = keywords

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images, **self.keywords)
        if self.first_token:
            return output.last_hidden_state[:, 0]
        embedded = getattr(output, "image_embeds", None)
        return embedded if embedded is not None else output.pooler_output.flatten(1)


# Classes of the image tower alone, by model_type; what is not here is AutoModel.
_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def transformers_encoder(request: Request) -> Built:
    """hf:FOLDER, a folder that save_pretrained has written, with its weights."""
    transformers = package("transformers", "transformers", request.name)
    folder = Path(request.argument)
    model_type = _json(folder / "config.json", request.name).get("model_type", "")
    about = _json(folder / "preprocessor_config.json", request.name)
    tower = getattr(transformers, _TOWERS.get(model_type, "AutoModel"))
    try:
        model, loading = tower.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read by transformers: {_short(error)}"
        ) from None
    missing = sorted(loading["missing_keys"])
    for key in missing:
        if "pooler" not in key:
            raise CheckpointError(
                f"{folder}: does not fit {type(model).__name__}: {key} is missing, one of "
                f"{len(missing)}"
            )
    preprocessing = _of_image_processor(about, request.name)
    keywords = {}
    resized = request.settings.image_size not in (0, getattr(model.config, "image_size", 0))
    if resized and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        keywords["interpolate_pos_encoding"] = True
    module = PooledOutput(model.float(), first_token=bool(missing), **keywords)
    return request.made(module, preprocessing), request.saved


def _of_image_processor(about: dict[str, Any], name: str) -> Preprocessing:
    """From preprocessor_config.json, whose sizes are numbers or dicts."""
    shorter = _side(about.get("size", 224))
    size = _side(about["crop_size"]) if about.get("do_center_crop") else shorter
    if not math.isclose(about.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise ConfigError(
            f"encoder: {name} scales values by {about['rescale_factor']}, must be by 1/255"
        )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if about.get("do_normalize", True):
        mean, std = tuple(about["image_mean"]), tuple(about["image_std"])
    filters = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    number = about.get("resample", 2)
    crop = size / shorter
    if math.floor(size / crop) < shorter:  # by a rounding
        crop = math.nextafter(crop, 0)
    return Preprocessing(size, "RGB", mean, std, crop, filters.get(number, str(number)))


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"encoder: {name}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"encoder: {name}: {path} is not valid JSON: {error}") from None


def _short(error: Exception) -> str:
    """What the library says, in one line; it may list all tensors."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def _local(request: Request) -> str:
    """The library's name of the network; ConfigError where it would look for it elsewhere."""
    if request.argument.startswith(("hf-hub:", "hf_hub:")):
        raise ConfigError(
            f"encoder: got {request.name!r}, which is read over the network; give the name of the "
            "network here and the name of a file as weights"
        )
    return request.argument
