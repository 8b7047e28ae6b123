"""Labels of rows that lie in files, such as `unicom-ext cluster` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unicom_ext.data.formats import by_number, numbered_files
from unicom_ext.data.source import Shard
from unicom_ext.utils.arrays import SourceError, check_labels, check_some_label, open_array

PREFIX = "labels_"


def read_labels(
    name: str, path: str | Path, count: int, shards: Sequence[Shard] = ()
) -> np.ndarray:
    """`read_integers` of labels, of which at least one is not negative: those stand for none."""
    labels = read_integers(name, path, count, shards)
    check_some_label(f"{name}: {path}", labels)
    return labels


def read_integers(
    name: str, path: str | Path, count: int, shards: Sequence[Shard] = ()
) -> np.ndarray:
    """The integers int64 [count] in a .npy file, or in the labels_*.npy of a directory.

    Args:
        name: what a SourceError calls them.
        path: the file or the directory. Its files are those of the shards with the same names,
            where there are several shards, else they are in natural order.
        count: how many rows have one.
        shards: of the features whose labels they are.
    """
    path = Path(path)
    rows: list[int | None] = [count]
    files = [path]
    if path.is_dir():
        found = numbered_files(path, PREFIX)
        if not found:
            raise SourceError(f"{name}: {path}: there is no {PREFIX}*.npy")
        files, rows = list(found.values()), [None] * len(found)
        if len(shards) > 1:
            files, rows = _of_shards(name, path, found, shards), [shard.rows for shard in shards]
    labels = np.concatenate([_of_file(name, *each) for each in zip(files, rows, strict=True)])
    if len(labels) != count:
        raise SourceError(
            f"{name}: {path}: holds {len(labels)} labels, must be {count}, one for each row"
        )
    return labels


def _of_file(name: str, file: Path, rows: int | None) -> np.ndarray:
    labels = open_array(file, name)
    check_labels(f"{name}: {file}", labels, rows)
    return labels.astype(np.int64)


def _of_shards(
    name: str, directory: Path, files: Mapping[str, Path], shards: Sequence[Shard]
) -> list[Path]:
    """The file of each shard."""
    of_files, of_shards = by_number(files, {shard.name: shard for shard in shards})
    for number, (shard_name, shard) in of_shards.items():
        if number not in of_files:
            raise SourceError(
                f"{name}: {directory}: there is no {PREFIX}{shard_name}.npy for "
                f"{shard.files[0].path}"
            )
    for number, (_, file) in of_files.items():
        if number not in of_shards:
            raise SourceError(f"{name}: {file}: there is no shard of this name in the features")
    return [of_files[number][1] for number in of_shards]
