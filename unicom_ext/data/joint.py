"""One feature vector out of an image's and a text's."""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.data import JOINTS
from unicom_ext.utils.settings import ConfigError


def check_joint(joint: str, image_weight: float) -> None:
    """Raises ConfigError where there is no such way to join features."""
    if joint not in JOINTS:
        raise ConfigError(f"joint: got {joint!r}, must be {' or '.join(JOINTS)}")
    if not (isinstance(image_weight, float) and 0 < image_weight < 1):
        raise ConfigError(f"image_weight: got {image_weight!r}, must be a number in (0, 1)")


def join(image: Tensor, text: Tensor, joint: str, image_weight: float) -> Tensor:
    """Features of both, from fp32 [n, d1] and [n, d2]. With w the image's weight:

    average  w u + (1 - w) v, u and v the unit vectors of image and text
    concat   [sqrt(w) u, sqrt(1 - w) v]: cosines are w times the image's plus 1 - w times the text's

    Where the text is zero, as that of no caption is, a row is the image's alone: u, or [u, 0]. It
    is zero where the image is, and NaN where either is not finite.
    """
    w = image_weight
    weights = (w, 1 - w) if joint == "average" else (w**0.5, (1 - w) ** 0.5)
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (image, text)]
    factors = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    factors[0] = torch.where(norms[1] == 0, 1 / norms[0], factors[0])
    factors[1] = torch.where(norms[1] == 0, 0.0, factors[1])
    parts = [
        x * torch.where(norms[0] == 0, 0.0, factor)
        for x, factor in zip((image, text), factors, strict=True)
    ]
    if joint == "average":
        return parts[0] + parts[1]
    return torch.cat(parts, dim=1)
