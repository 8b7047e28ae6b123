"""Small picture files, and collections of them in every layout."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts, open_images
from unicom_ext.data.images.settings import DataSettings
from unicom_ext.utils.settings import ConfigError


def pixels(number: int, side: int = 8) -> np.ndarray:
    """uint8 [side, side, 3] that are told apart by their number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(number: int = 0, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, kind, **options)
    return file.getvalue()


def patterns(n: int = 12, captions: bool = True, labels: np.ndarray | None = None) -> ImageSet:
    """Images in memory, of 4 classes."""
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32), dtype=np.uint8)
    names = [f"PATTERN {c}" for c in "ABCD"]
    labels = np.arange(n) % 4 if labels is None else labels
    texts = [names[i % 4] for i in range(n)] if captions else []
    return ImageSet.of_arrays(images, labels, names, texts)


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def pictures(root: Path, paths: Iterable[str]) -> None:
    """A picture at each path: the first is number 0."""
    for number, path in enumerate(paths):
        write(root / path, encoded(number, "PNG" if path.lower().endswith(".png") else "JPEG"))


def opened(path, seed=0, **settings) -> Parts:
    return open_images(DataSettings(data=str(path), **settings), seed)


def exactly(message: str) -> str:
    """The pattern of a whole message."""
    return f"^{re.escape(message)}$"


def refused(path, message: str, **settings) -> None:
    with pytest.raises(ConfigError, match=exactly(message)):
        opened(path, **settings)


def told(images) -> list[tuple[str, str | None, str]] | None:
    """(name, class, caption) of each image of a set."""
    if images is None:
        return None
    return [
        (
            images.name(i),
            images.class_names[label] if label >= 0 else None,
            images.caption(i),
        )
        for i, label in enumerate(images.labels.tolist())
    ]
