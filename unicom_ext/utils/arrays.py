"""Arrays of the user: the one reader of `.npy` files, and checks with one set of errors."""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unicom_ext.utils.settings import ConfigError


class SourceError(ConfigError):
    """A file, or an array, that cannot be used; the message names it and what is wrong."""


class Header(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int  # of the first value, in bytes


def read_header(path: str | os.PathLike[str], name: str = "") -> Header:
    """What a `.npy` file says of itself; it holds as many values as it says.

    Args:
        path: the file.
        name: the argument or option that names it, for the message.

    Raises SourceError: it cannot be read, is something else, is cut off, or holds Python objects.
    """
    path = Path(path)
    where = _where(path, name)
    try:
        # Opening a pipe would wait for its other end.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise SourceError(f"{where}: is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(4)
            file.seek(0)
            if not begin:
                raise SourceError(f"{where}: is empty, must be a .npy file")
            if begin.startswith(b"PK"):
                raise SourceError(
                    f"{where}: is an archive such as .npz, must be one array, as np.save writes it"
                )
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise SourceError(f"{where}: has version {version} of the .npy format")
            shape, fortran_order, dtype = read(file)
            header = Header(dtype, shape, fortran_order, file.tell())
    except OSError as error:
        raise SourceError(f"{where}: cannot be read: {error.strerror}") from None
    except SourceError:
        raise
    except Exception as error:  # NumPy's parser raises whatever its parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{where}: is not a .npy file: {reason}") from None
    if dtype.hasobject:
        raise SourceError(f"{where}: holds Python objects, which are not loaded")
    if min(shape, default=0) < 0:
        raise SourceError(f"{where}: is not a .npy file: the shape is {list(shape)}")
    wanted = header.offset + dtype.itemsize * math.prod(shape)
    if size < wanted:
        raise SourceError(f"{where}: is truncated: {size} bytes of {wanted}")
    return header


def open_array(path: str | os.PathLike[str], name: str = "") -> np.ndarray:
    """The array of a `.npy` file, mapped into memory to be read; see `read_header`."""
    dtype, shape, fortran_order, offset = read_header(path, name)
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    try:
        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")
    except (OSError, ValueError) as error:
        raise SourceError(f"{_where(Path(path), name)}: cannot be read: {error}") from None


def read_rows(path: str | os.PathLike[str], start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a `.npy` file of a matrix in C order, in memory now; see `read_header`.

    They are the file's pages themselves, as copies would take longer than most work on them. Who
    writes to them has copies of those pages.
    """
    dtype, shape, _, offset = read_header(path)
    if start >= stop or 0 in shape:
        return np.empty((max(stop - start, 0), *shape[1:]), dtype)
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    begin, end = offset + start * row_bytes, offset + stop * row_bytes
    page = begin % mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:
            pages = mmap.mmap(
                file.fileno(), end - begin + page, access=mmap.ACCESS_COPY, offset=begin - page
            )
        _bring(pages)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    values = np.frombuffer(pages, dtype, (end - begin) // dtype.itemsize, page)
    return values.reshape(stop - start, *shape[1:])


def _bring(pages: mmap.mmap) -> None:
    """Reads the file, where the system can be asked to; else each page comes when it is used."""
    populate_read = 22  # MADV_POPULATE_READ: Linux 5.14, no name in Python
    if sys.platform != "linux":
        return
    try:
        pages.madvise(populate_read)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def refused(path: str | os.PathLike[str], name: str, array: np.ndarray, wanted: str) -> SourceError:
    """The error where a file holds another array than the one that is wanted."""
    return SourceError(
        f"{_where(Path(path), name)}: holds {array.dtype} {list(array.shape)}, must be {wanted}"
    )


def is_floating(dtype: np.dtype) -> bool:
    """float16, float32 or float64, in either byte order: what torch has too."""
    return dtype.kind == "f" and dtype.itemsize <= 8


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy that torch can hold: in this machine's byte order and in C order."""
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def check_labels(
    where: str,
    labels: np.ndarray,
    rows: int | None = None,
    below: int = 2**63,
    several: bool = False,
) -> None:
    """Raises SourceError unless they are integers [rows], of any integer dtype, below a bound.

    where: what the message calls them.  rows: None for any number.  several: [rows, P] will do too.
    """
    shaped = labels.ndim == 1 or (several and labels.ndim == 2 and labels.shape[1] > 0)
    if labels.dtype.kind not in "iu" or not shaped or rows not in (None, len(labels)):
        n = "n" if rows is None else rows
        wanted = f"[{n}], one for each row"
        if several:
            wanted = f"[{n}], one for each row, or [{n}, P], at least one for each row"
        raise SourceError(
            f"{where}: holds {labels.dtype} {list(labels.shape)}, must be integers {wanted}"
        )
    # Only where the dtype has larger ones: files may be long.
    if np.iinfo(labels.dtype).max >= below and len(labels) and labels.max() >= below:
        row = int(labels.argmax()) // (labels.size // len(labels))
        raise SourceError(
            f"{where}: row {row} has the label {labels.max()}, must be below "
            f"2^{below.bit_length() - 1}; np.unique(labels, return_inverse=True) numbers them anew "
            "(negative ones too, which stand for none: keep these)"
        )


def check_some_label(where: str, labels: np.ndarray) -> None:
    """Raises SourceError unless some integer is not negative: those stand for none."""
    if not (labels >= 0).any():
        raise SourceError(f"{where}: holds negative labels only, must be not all negative")


def check_finite(where: str, rows: Tensor, first: int = 0) -> None:
    """Raises SourceError with the first of the rows that has NaN or infinity.

    first: the number of the first one.
    """
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        row = first + int((~finite).nonzero()[0])
        raise SourceError(f"{where} must be finite, but row {row} is not")


def _where(path: Path, name: str) -> str:
    return f"{name}: {path}" if name else str(path)
