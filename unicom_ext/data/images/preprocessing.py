"""From a decoded picture to the tensor that an encoder takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Of CLIP, UNICOM and most that came after them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST = 32  # longer side of a picture that is scaled, in shorter ones

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its images.

    size           side of the square it takes, in pixels
    mode           "RGB", or "L" for grey
    mean, std      of each channel, in [0, 1]: (value - mean) / std is taken
    crop           the square is this share of the scaled picture's shorter side
    interpolation  "bicubic" or "bilinear"
    """

    size: int
    mode: str = "RGB"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    crop: float = 1.0
    interpolation: str = "bicubic"

    @property
    def channels(self) -> int:
        return len(self.mode)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The middle of the picture, as a square of that size and mode.

        Sides are rounded as torchvision's Resize and CenterCrop do, with which encoders were
        published. Of a picture that is much longer than wide only the middle is scaled, as all of
        it could take gigabytes.
        """
        picture = _shortened(picture)
        shorter = math.floor(self.size / self.crop)
        width, height = picture.size
        if width <= height:
            width, height = shorter, max(shorter, int(shorter * height / width))
        else:
            width, height = max(shorter, int(shorter * width / height)), shorter
        picture = self._converted(picture)
        if picture.size != (width, height):
            picture = picture.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))

    def batch(self, pictures: Sequence[Image.Image]) -> Tensor:
        """fp32 [n, channels, size, size]: what the encoder takes of some pictures."""
        return self.normalised(torch.stack([as_tensor(self(picture)) for picture in pictures]))

    def part(self, picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """The part (left, top, right, bottom), in pixels, scaled to the square."""
        resampling = RESAMPLING[self.interpolation]
        return self._converted(picture).resize((self.size, self.size), resampling, box)

    def _converted(self, picture: Image.Image) -> Image.Image:
        return picture if picture.mode == self.mode else picture.convert(self.mode)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [b, channels, size, size] -> fp32, on its device."""
        return self.standardised(images.float() / 255)

    def standardised(self, images: Tensor) -> Tensor:
        """(images - mean) / std, of fp32 [b, channels, size, size] in [0, 1]."""
        if not any(self.mean) and all(std == 1 for std in self.std):
            return images
        mean, std = (images.new_tensor(x).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images - mean) / std

    def denormalised(self, images: Tensor) -> Tensor:
        """What `standardised` was given."""
        mean, std = (images.new_tensor(x).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return images * std + mean


def _shortened(picture: Image.Image) -> Image.Image:
    """The middle of the picture, at most `LONGEST` times as long as it is wide."""
    width, height = picture.size
    most = LONGEST * min(width, height)
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    if not (left or top):
        return picture
    return picture.crop((left, top, left + min(width, most), top + min(height, most)))


def as_tensor(picture: Image.Image) -> Tensor:
    """uint8 [channels, h, w]."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
