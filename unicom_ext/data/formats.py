"""Feature files: the formats, and which of them a path stands for.

Layouts, told apart by what is there:

    DIR/img_emb/img_emb_0000.npy ...     and/or DIR/text_emb/text_emb_0000.npy ..., the layout of
                                         public dumps of CLIP embeddings; shards pair by number
    DIR/*.npy or FILE.npy                image features
    DIR/*.parquet or FILE.parquet        columns of lists: image and text features

A directory has files of one format. `.npy` shards are float16 or float32 [n, d]. Shards are in
natural order: 2 before 10, with or without leading zeros. A shard may have no rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from unicom_ext.utils.arrays import SourceError, open_array, read_header, read_rows
from unicom_ext.utils.files import list_files, natural_key, unpadded

Item = TypeVar("Item")
Other = TypeVar("Other")


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
        dtype, shape, fortran_order, _ = read_header(path)
        if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize > 4 or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise SourceError(
                f"{path}: holds {dtype} of shape {list(shape)}{order}, must be float16 or float32 "
                "of shape [n, d] in C order"
            )
        self.rows, self.dim = shape
        self._dtype = dtype.newbyteorder("=")

    def read(self, start: int, stop: int) -> np.ndarray:
        # Mapped each time: pages that stay mapped would count as memory of this process.
        return np.require(read_rows(self.path, start, stop), self._dtype, "A")

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(open_array(self.path)[rows], self._dtype)


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises SourceError, also where pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise SourceError(
            f"{path}: Parquet files need pyarrow: pip install 'unicom_ext[cluster]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


class ParquetColumn:
    """Lists of numbers. What the file says of itself is compared at once; lists of different
    lengths in one row group are found when it is read."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._file = open_parquet(path)
        names = self._file.schema_arrow.names
        if column not in names:
            raise SourceError(f"{path}: has no column {column!r}, but {', '.join(names)}")
        meta = self._file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        sizes = [group.num_rows for group in groups]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.rows = int(self._first[-1])
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))
        self.dim = 0
        if self.rows:
            first = int(np.flatnonzero(sizes)[0])
            self.dim = self._group(first).shape[1]
            for i, group in enumerate(groups):
                if group.num_rows and _num_values(group, column) != group.num_rows * self.dim:
                    self._group(i)  # raises

    def _group(self, i: int) -> np.ndarray:
        """The rows of a group, float16 or float32 [n, d]."""
        import pyarrow

        if self._cached[0] == i:
            return self._cached[1]
        try:
            chunks = self._file.read_row_group(i, columns=[self.column]).column(0).chunks
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(
                f"{self.path}: row group {i} cannot be read: {str(error).splitlines()[0]}"
            ) from None
        values = np.concatenate([self._matrix(chunk, i) for chunk in chunks if len(chunk)])
        if self.dim and values.shape[1] != self.dim:
            raise SourceError(
                f"{self.path}: column {self.column!r} has lists of {values.shape[1]} numbers in "
                f"row group {i} and of {self.dim} before it"
            )
        self._cached = (i, values)
        return values

    def _matrix(self, array: Any, group: int) -> np.ndarray:
        """An Arrow array of lists of one length, whatever the kind of lists."""
        import pyarrow.compute as compute

        if not hasattr(array, "flatten") or not hasattr(array.type, "value_type"):
            raise SourceError(f"{self.path}: column {self.column!r} holds {array.type}, not lists")
        values = array.flatten()
        if array.null_count or values.null_count:
            raise SourceError(f"{self.path}: column {self.column!r} has nulls in row group {group}")
        numbers = values.to_numpy(zero_copy_only=False)
        lengths = compute.list_value_length(array).unique().to_pylist()
        if numbers.dtype not in (np.float16, np.float32, np.float64) or len(lengths) != 1:
            raise SourceError(
                f"{self.path}: column {self.column!r} must hold lists of floating point numbers, "
                f"all of one length; got {array.type}, lengths {sorted(lengths)[:5]} in row group "
                f"{group}"
            )
        if numbers.dtype == np.float64:
            numbers = numbers.astype(np.float32)
        return numbers.reshape(len(array), -1)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        groups = np.searchsorted(self._first, rows, side="right") - 1
        parts = [
            self._group(i)[rows[groups == i] - self._first[i]] for i in np.unique(groups).tolist()
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)


def _num_values(group: Any, column: str) -> int:
    """How many numbers the lists of a row group hold, as its header says."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    of_column = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}.")]
    return sum(chunk.num_values for chunk in of_column)


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
        arrays, tables = list_files(path, ".npy"), list_files(path, ".parquet")
        if arrays and tables:
            raise SourceError(
                f"{path}: holds {arrays[0].name} and {tables[0].name}, must have feature files of "
                "one format: .npy or .parquet"
            )
        files = arrays or tables
    else:
        raise SourceError(f"{path}: is not there")
    if not files:
        raise SourceError(f"{path}: has no img_emb, text_emb, .npy or .parquet files")
    names = shard_names(files)
    if files[0].suffix.lower() == ".parquet":
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
    found = {}
    for kind, wanted in (("img_emb", wants_image), ("text_emb", wants_text)):
        if wanted:
            found[kind] = numbered_files(path / kind, f"{kind}_")
            if not found[kind]:
                raise SourceError(f"{path / kind}: has no {kind}_*.npy files")
    if not wants_text:
        return [(name, NpyFile(file), None) for name, file in found["img_emb"].items()]
    if not wants_image:
        return [(name, None, NpyFile(file)) for name, file in found["text_emb"].items()]
    images, texts = by_number(found["img_emb"], found["text_emb"])
    for own, others, kind in ((images, texts, "text_emb"), (texts, images, "img_emb")):
        for number, (name, file) in own.items():
            if number not in others:
                raise SourceError(f"{file}: there is no {kind}_{name}.npy beside it")
    return [
        (name, NpyFile(file), NpyFile(texts[number][1])) for number, (name, file) in images.items()
    ]


def numbered_files(directory: Path, prefix: str) -> dict[str, Path]:
    """The files prefix*.npy by what stands for the star, in natural order; none where the directory
    is not there."""
    files = list_files(directory, ".npy", prefix) if directory.is_dir() else []
    found = {file.stem[len(prefix) :]: file for file in files}
    if len(found) < len(files):
        raise SourceError(f"{directory}: has two {prefix}*.npy that differ in capitals alone")
    return found


def by_number(
    items: Mapping[str, Item], others: Mapping[str, Other]
) -> tuple[dict[str, tuple[str, Item]], dict[str, tuple[str, Other]]]:
    """(name, item) of both, in their order, by what pairs them: the name with its numbers unpadded,
    so that 7 and 0007 pair, unless one side has both."""
    padding_tells = any(len({*map(unpadded, side)}) < len(side) for side in (items, others))
    key = str if padding_tells else unpadded
    return (
        {key(name): (name, item) for name, item in items.items()},
        {key(name): (name, item) for name, item in others.items()},
    )


def shard_names(files: list[Path]) -> list[str]:
    """The numbers at the ends of the files' names where these tell them apart and are in the order
    of the files, else 0000, ..."""
    numbers = [re.search(r"([0-9]+)$", file.stem) for file in files]
    names = [match.group(1) if match else "" for match in numbers]
    in_order = sorted(names, key=lambda name: natural_key(Path(name)))
    if all(names) and len(set(names)) == len(names) and names == in_order:
        return names
    return [f"{i:04d}" for i in range(len(files))]
