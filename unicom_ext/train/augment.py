"""Random distortions of images: what fonts and hands do to a character, and nothing more."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def distort(
    images: Tensor,
    strength: float,
    rng: np.random.Generator,
    *,
    part: slice | None = None,
    of: int | None = None,
) -> Tensor:
    """Each image float [B, c, H, W] turned, slanted, stretched, moved, and bolder or thinner.

    At strength 1: up to 8 degrees, a slant of 0.2, 13 % of each side, 1/16 of the frame, and half
    of the way to the brightest (bolder) or darkest (thinner) of the 3 x 3 neighbourhood.

    part, of: the images are this part of a batch of so many, and get what they would get there.
    """
    if strength == 0:
        return images
    of = len(images) if of is None else of

    def draw(limit: float) -> Tensor:
        uniform = rng.uniform(-limit * strength, limit * strength, of)
        return torch.from_numpy(uniform.astype(np.float32)[part or slice(None)])

    angle, slant = draw(math.radians(8)), draw(0.2)
    stretch_x, stretch_y = draw(0.12).exp(), draw(0.12).exp()
    move_x, move_y = draw(0.125), draw(0.125)  # the frame is two units wide
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * stretch_x, slant - sin * stretch_y, move_x], dim=1)
    row_y = torch.stack([sin * stretch_x, cos * stretch_y, move_y], dim=1)
    grid = F.affine_grid(
        torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False
    )
    images = F.grid_sample(images, grid, align_corners=False)

    weight = draw(0.5)[:, None, None, None]
    brightest = F.max_pool2d(images, 3, stride=1, padding=1)
    darkest = -F.max_pool2d(-images, 3, stride=1, padding=1)
    bolder, thinner = weight.clamp(min=0), (-weight).clamp(min=0)
    return images + bolder * (brightest - images) + thinner * (darkest - images)
