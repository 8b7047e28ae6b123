"""Where images are read from, one at a time, and how their files are decoded."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ModuleNotFoundError as error:
    message = f"pictures need {error.name}: pip install 'unicom_ext[images]'"
    raise ModuleNotFoundError(message, name=error.name) from None

# Of what Pillow reads, as far as collections are made of it.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".avif",
)  # fmt: skip


class PictureError(ValueError):
    """A picture that cannot be read or decoded; the message names it and says why."""


class Pictures(Protocol):
    """Where the images of an `ImageSet` are read from, by number."""

    has_captions: bool

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What users know it by, such as its path in the folder."""

    def read(self, number: int) -> Image.Image:
        """The decoded picture, in grey ("L") or colour ("RGB").

        Raises PictureError where it cannot be read.
        """

    def caption(self, number: int) -> str:
        """Its text; "" where there is none. Raises PictureError where it cannot be read."""

    def digest(self, rows: np.ndarray, into: Any) -> None:
        """Add what tells these pictures from others to a hash: their names and sizes, or pixels."""


class ArrayPictures:
    """Pictures in memory: uint8 [n, h, w], or [n, h, w, 3] in colour."""

    def __init__(
        self, images: np.ndarray, names: Sequence[str] = (), captions: Sequence[str] = ()
    ) -> None:
        self.images, self._names, self._captions = images, names, captions
        self.has_captions = len(captions) > 0

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        return self._names[number] if self._names else f"{number}"

    def read(self, number: int) -> Image.Image:
        return Image.fromarray(self.images[number])

    def caption(self, number: int) -> str:
        return self._captions[number] if self.has_captions else ""

    def digest(self, rows: np.ndarray, into: Any) -> None:
        into.update(np.ascontiguousarray(self.images[rows]).data)


class FilePictures:
    """Image files.

    Args:
        root: the folder that names are relative to.
        paths: of the files, relative to root.
        captions: one for each file, or none at all.
    """

    def __init__(self, root: Path, paths: Sequence[str], captions: Sequence[str] = ()) -> None:
        self.root, self._paths, self._captions = root, paths, captions
        self.has_captions = len(captions) > 0

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, number: int) -> str:
        return self._paths[number]

    def read(self, number: int) -> Image.Image:
        path = self.root / self._paths[number]
        try:
            with open(path, "rb") as file:
                return decode(file, str(path))
        except OSError as error:
            raise PictureError(f"{path}: {error.strerror or error}") from None

    def caption(self, number: int) -> str:
        return self._captions[number] if self.has_captions else ""

    def digest(self, rows: np.ndarray, into: Any) -> None:
        for row in rows.tolist():
            path = self.root / self._paths[row]
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1  # not there, which reading it will say
            into.update(f"{self._paths[row]}\0{size}\n".encode(errors="surrogateescape"))


def as_text(data: bytes, name: str) -> str:
    """A caption as it lies in a file. Raises PictureError."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise PictureError(f"{name}: is not text in UTF-8") from None


def decode(file: IO[bytes], name: str) -> Image.Image:
    """The picture in an open image file: upright, grey ("L") or colour ("RGB").

    What is transparent becomes white, grey of 16 bits grey of 8, and so does grey of floating point
    in [0, 1]. Raises PictureError.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            return _plain(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: {error}") from None
    # What Pillow's decoders raise on files that are cut off or spoilt.
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError,
            ArithmeticError, AttributeError, MemoryError, struct.error) as error:  # fmt: skip
        reason = "is no image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise PictureError(f"{name}: {reason or type(error).__name__}") from None


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in ("L", "RGB") and not picture.has_transparency_data:
        return picture
    if picture.mode.startswith("I"):  # Pillow would cut off at 255
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    if picture.mode == "F":
        grey = np.asarray(picture)
        low, high = grey.min(), grey.max()
        if not 0 <= low <= high <= 255:  # or NaN
            raise ValueError(f"has values from {low} to {high}, must be in [0, 1] or [0, 255]")
        return Image.fromarray((grey * (255 if high <= 1 else 1)).round().astype(np.uint8))
    if picture.mode == "1":
        return picture.convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
