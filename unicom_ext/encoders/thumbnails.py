"""images.npy: small images of a dump, which ranks fill together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from unicom_ext.utils.files import write_file

Write = Callable[[np.ndarray, np.ndarray], None]


def create(path: Path, shape: tuple[int, ...]) -> None:
    """A uint8 array of zeros, which take no room yet."""

    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        file.truncate(file.tell() + math.prod(shape))

    write_file(path, write)


@contextmanager
def writing(path: Path) -> Iterator[Write]:
    """`write(numbers, images)`, which puts images uint8 [n, ...] into the rows of these numbers.

    Not through memory: of two hosts that share a file system and change parts of one page, one
    would win. And a full disk is an error so, and no signal that ends the process.

    Raises OSError, which names the file.
    """
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap)
    first, size = array.offset, math.prod(array.shape[1:])
    with open(path, "r+b", buffering=0) as file:

        def write(numbers: np.ndarray, images: np.ndarray) -> None:
            for number, image in zip(numbers.tolist(), images, strict=True):
                left, at = memoryview(image.tobytes()), first + number * size
                while left:
                    written = os.pwrite(file.fileno(), left, at)
                    left, at = left[written:], at + written

        yield lambda numbers, images: _named(path, lambda: write(numbers, images))
        _named(path, lambda: os.fsync(file.fileno()))


def _named(path: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from None
