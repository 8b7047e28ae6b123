"""Small copies of images, as data URLs."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.pictures import PictureError

SIDE = 128  # pixels, twice what they are shown at, for screens that have them
TINY = 48  # up to here a picture stays as it is, and its pixels are shown as squares
QUALITY = 80


class Thumbnail(NamedTuple):
    url: str
    tiny: bool


def thumbnail(images: ImageSet, index: int) -> Thumbnail | None:
    """None where the image cannot be read any more, which is no reason to go without a page."""
    try:
        picture = images.read(index)
    except PictureError:
        return None
    tiny = max(picture.size) <= TINY
    if not tiny:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE))  # keeps what is long or high so
    data = {"png": _encoded(picture, "PNG")}
    if not tiny:  # drawings are smaller as PNG, and photographs as JPEG
        data["jpeg"] = _encoded(picture, "JPEG", quality=QUALITY)
    kind = min(data, key=lambda kind: len(data[kind]))
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(data[kind]).decode()}", tiny)


def first_readable(images: ImageSet, order: np.ndarray, count: int) -> list[tuple[int, Thumbnail]]:
    """The first images of that order which can be read, at most `count`."""
    found: list[tuple[int, Thumbnail]] = []
    for index in order.tolist():
        if len(found) == count:
            break
        if (small := thumbnail(images, index)) is not None:
            found.append((index, small))
    return found


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
