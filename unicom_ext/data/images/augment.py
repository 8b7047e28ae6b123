"""Random distortions: of characters, what fonts and hands do; of photographs, the usual."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

from unicom_ext.data.images.preprocessing import Preprocessing


def distort(
    images: Tensor,
    strength: float,
    rng: np.random.Generator,
    *,
    part: slice | Tensor | None = None,
    of: int | None = None,
) -> Tensor:
    """Each image float [B, C, H, W] turned, slanted, stretched, moved, and bolder or thinner.

    At strength 1: up to 8 degrees, a slant of 0.2, 13 % of each side, 1/16 of the frame, and half
    of the way to the brightest (bolder) or darkest (thinner) of the 3 x 3 neighbourhood.

    part, of: the images are this part of a batch of so many (a slice, or their positions), and get
    what they would get there.
    """
    if strength == 0:
        return images
    of = len(images) if of is None else of

    def draw(limit: float) -> Tensor:
        uniform = rng.uniform(-limit * strength, limit * strength, of)
        drawn = torch.from_numpy(uniform.astype(np.float32))
        return (drawn if part is None else drawn[part]).to(images.device)

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
    brightest, darkest = _brightest(images), -_brightest(-images)
    bolder, thinner = weight.clamp(min=0), (-weight).clamp(min=0)
    return images + bolder * (brightest - images) + thinner * (darkest - images)


def _brightest(images: Tensor) -> Tensor:
    """The brightest of each pixel's 3 x 3 neighbourhood, of its row first. Max pooling, which also
    notes where it stood, takes 20 times as long."""
    x = F.pad(images, (1, 1, 1, 1), value=-math.inf)
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


def crop_and_light(
    picture: Image.Image, strength: float, rng: np.random.Generator, preprocessing: Preprocessing
) -> Image.Image:
    """A random part of the picture, mirrored or not, in another light; of the encoder's size.

    At strength 1: from a quarter of its area, sides 3:4 to 4:3, brightness, contrast and colour
    from 0.8 to 1.25 of what they are. At 0 the middle of the picture, as it is.
    """
    if strength == 0:
        return preprocessing(picture)

    def factor(limit: float) -> float:
        return math.exp(rng.uniform(-math.log(limit), math.log(limit)) * strength)

    width, height = picture.size
    area = width * height * rng.uniform(max(1 - 0.75 * strength, 0.08), 1)
    ratio = factor(4 / 3)
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    part = preprocessing.part(picture, (left, top, left + w, top + h))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        part = enhance(part).enhance(factor(1.25))
    return part
