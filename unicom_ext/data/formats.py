"""Feature files: the formats, and which of them a path stands for.

Layouts, told apart by what is there:

    DIR/img_emb/img_emb_0000.npy ...     and/or DIR/text_emb/text_emb_0000.npy ..., the layout of
                                         public dumps of CLIP embeddings; shards pair by number
    DIR/*.npy or FILE.npy                image features
    DIR/*.parquet or FILE.parquet        columns of lists: image and text features

`.npy` shards are float16 or float32 [n, d].
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import numpy as np


class SourceError(ValueError):
    """Feature files that cannot be used; the message names the file and what is wrong."""


class FeatureFile(Protocol):
    path: Path
    rows: int
    dim: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), float16 or float32 [stop - start, dim], of the caller."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows, increasing."""


class NpyFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise SourceError(f"{path}: has version {version} of the .npy format")
                shape, fortran_order, dtype = read_header(file)
                self._offset = file.tell()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
        except SourceError:
            raise
        except ValueError as error:
            raise SourceError(f"{path}: is not a .npy file: {error}") from None
        if len(shape) != 2 or dtype not in (np.float16, np.float32) or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise SourceError(
                f"{path}: holds {dtype} of shape {list(shape)}{order}, must be float16 or float32 "
                "of shape [n, d] in C order"
            )
        self.rows, self.dim = shape
        self._dtype = dtype
        wanted = self._offset + self.rows * self.dim * dtype.itemsize
        there = path.stat().st_size
        if there < wanted:
            raise SourceError(f"{path}: is truncated: {there} bytes of {wanted}")

    def _map(self) -> np.memmap:
        # Opened each time: pages that stay mapped would count as memory of this process.
        return np.memmap(self.path, self._dtype, "r", self._offset, (self.rows, self.dim))

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self._map()[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._map()[rows])


class ParquetColumn:
    def __init__(self, path: Path, column: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise SourceError(
                f"{path}: Parquet files need pyarrow: pip install 'unicom_ext[cluster]'"
            ) from None
        self.path, self.column = path, column
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        names = self._file.schema_arrow.names
        if column not in names:
            raise SourceError(f"{path}: has no column {column!r}, but {', '.join(names)}")
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.rows = int(self._first[-1])
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))
        self.dim = self._group(0).shape[1] if self.rows else 0

    def _group(self, i: int) -> np.ndarray:
        if self._cached[0] != i:
            array = self._file.read_row_group(i, columns=[self.column]).column(0).combine_chunks()
            rows = len(array)
            if array.null_count or not hasattr(array, "flatten"):
                what = "has nulls" if array.null_count else f"holds {array.type}, not lists"
                raise SourceError(f"{self.path}: column {self.column!r} {what}")
            values = array.flatten().to_numpy(zero_copy_only=False)
            lengths = {len(values) // rows} if hasattr(array.type, "list_size") else set(
                np.diff(array.offsets.to_numpy()).tolist()
            )  # fmt: skip
            if values.dtype not in (np.float16, np.float32, np.float64) or len(lengths) != 1:
                raise SourceError(
                    f"{self.path}: column {self.column!r} must hold lists of numbers, all of one "
                    f"length; got {array.type}, lengths {sorted(lengths)[:5]}"
                )
            if values.dtype == np.float64:
                values = values.astype(np.float32)
            self._cached = (i, values.reshape(rows, -1))
        return self._cached[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        groups = np.searchsorted(self._first, rows, side="right") - 1
        parts = [
            self._group(i)[rows[groups == i] - self._first[i]] for i in np.unique(groups).tolist()
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)


Pair = tuple[str, FeatureFile | None, FeatureFile | None]


def find_files(path: Path, joint: str, image_column: str, text_column: str) -> list[Pair]:
    """The feature files of each shard, of the kinds that `joint` needs: (name, image, text).

    image_column, text_column: which columns of Parquet files these are.
    Raises SourceError where a file is missing, or is not what it seems.
    """
    wants_image, wants_text = joint != "text", joint != "image"
    if path.is_file():
        files = [path]
    elif path.is_dir():
        if (path / "img_emb").is_dir() or (path / "text_emb").is_dir():
            return _dump(path, wants_image, wants_text)
        files = sorted(path.glob("*.npy")) or sorted(path.glob("*.parquet"))
    else:
        raise SourceError(f"{path}: is not there")
    if not files:
        raise SourceError(f"{path}: has no img_emb, text_emb, .npy or .parquet files")
    names = _names(files)
    if files[0].suffix == ".parquet":
        return [
            (
                name,
                ParquetColumn(file, image_column) if wants_image else None,
                ParquetColumn(file, text_column) if wants_text else None,
            )
            for name, file in zip(names, files, strict=True)
        ]
    if wants_text:
        raise SourceError(
            f"{path}: holds one kind of features; {joint} needs a directory with img_emb "
            "and text_emb, or Parquet files"
        )
    return [(name, NpyFile(file), None) for name, file in zip(names, files, strict=True)]


def _dump(path: Path, wants_image: bool, wants_text: bool) -> list[Pair]:
    found: dict[str, dict[str, Path]] = {}
    for kind, wanted in (("img_emb", wants_image), ("text_emb", wants_text)):
        if wanted:
            files = sorted((path / kind).glob(f"{kind}_*.npy"))
            if not files:
                raise SourceError(f"{path / kind}: has no {kind}_*.npy files")
            found[kind] = {file.stem.removeprefix(f"{kind}_"): file for file in files}
    if len(found) == 2:
        for name in found["img_emb"].keys() ^ found["text_emb"].keys():
            has, lacks = sorted(found, key=lambda kind: name not in found[kind])
            raise SourceError(f"{found[has][name]}: there is no {lacks}_{name}.npy beside it")
    names = sorted(next(iter(found.values())), key=lambda name: (len(name), name))

    def file_of(kind: str, name: str) -> NpyFile | None:
        return NpyFile(found[kind][name]) if kind in found else None

    return [(name, file_of("img_emb", name), file_of("text_emb", name)) for name in names]


def _names(files: list[Path]) -> list[str]:
    """The numbers at the ends of the files' names where these tell them apart, else 0000, ..."""
    numbers = [re.search(r"(\d+)$", file.stem) for file in files]
    names = [match.group(1) if match else "" for match in numbers]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{i:04d}" for i in range(len(files))]
