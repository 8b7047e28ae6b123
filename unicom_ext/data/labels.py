"""Labels of rows that lie in files, such as `unicom-ext cluster` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext.data.formats import by_number, numbered_files
from unicom_ext.data.source import EXTRACTED, Shard
from unicom_ext.utils.arrays import SourceError, check_labels, check_some_label, open_array

LABELS, POSITIVES = "labels_", "positives_"  # how the files of a directory begin
CLUSTERED = "clusters.json"  # what `unicom-ext cluster` writes beside them
TRUE_LABELS = "true_labels.npy"  # what `unicom-ext extract` writes beside features


def check_same_images(
    name: str, path: str | Path, images: Mapping[str, Any] | None, must: str
) -> None:
    """Raises SourceError where labels are clusters or classes of other images, as `cluster` or
    `extract` have written them: as many of them would be taken for these, each with another one's
    label.

    Args:
        name: what the SourceError calls the labels.
        path: a file or a directory of them.
        images: facts of those that are to have the labels, as `ImageSet.facts`; None: unknown.
        must: what the end of the message says after "must be".
    """
    path = Path(path)
    kind, file, key = "clusters", path / CLUSTERED, "images"
    if path.name == TRUE_LABELS:
        kind, file, key = "classes", path.with_name(EXTRACTED), "data"
    elif path.suffix == ".npy" and path.name.startswith((LABELS, POSITIVES)):
        file = path.with_name(CLUSTERED)
    try:
        there = json.loads(file.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing of these commands, or of features that say nothing of their images
    if there is not None and images is not None and there != images:
        found, wanted = (f"{of['images']:,} of {of['classes']:,} classes" for of in (there, images))
        raise SourceError(
            f"{name}: {path}: are {kind} of other images ({found}) than these ({wanted}); must be "
            + must
        )


def read_labels(
    name: str, path: str | Path, count: int, shards: Sequence[Shard] = ()
) -> np.ndarray:
    """`read_integers` of labels, of which at least one is not negative: those stand for none."""
    labels = read_integers(name, path, count, shards)
    check_some_label(f"{name}: {path}", labels)
    return labels


def read_positives(name: str, path: str | Path, count: int, most: int = 0) -> np.ndarray:
    """Labels of rows that may have several: integers int64 [count, P], or [count] if P is 1.

    Args:
        name: what a SourceError calls them.
        path: a .npy file of integers [count] or [count, P], or a directory of positives_*.npy or,
            without these, of labels_*.npy.
        count: how many rows have some.
        most: take the first so many columns; 0 for all.
    """
    path = Path(path)
    prefix = POSITIVES if path.is_dir() and numbered_files(path, POSITIVES) else LABELS
    labels = _read(name, path, count, (), prefix, several=True)
    columns = 1 if labels.ndim == 1 else labels.shape[1]
    if most > columns:
        raise SourceError(
            f"positives: got {most}, but {path} has {columns} label{'s' * (columns > 1)} for each "
            "row"
        )
    labels = labels.reshape(count, columns)[:, : most or columns]
    check_some_label(f"{name}: {path}", labels)
    return labels[:, 0] if labels.shape[1] == 1 else labels


def read_integers(
    name: str, path: str | Path, count: int, shards: Sequence[Shard] = (), several: bool = False
) -> np.ndarray:
    """The integers int64 [count] in a .npy file, or in the labels_*.npy of a directory.

    Args:
        name: what a SourceError calls them.
        path: the file or the directory. Its files are those of the shards with the same names,
            where there are several shards, else they are in natural order.
        count: how many rows have one.
        shards: of the features whose labels they are.
        several: a row may have several, int64 [count, P].
    """
    return _read(name, Path(path), count, shards, LABELS, several)


def _read(
    name: str, path: Path, count: int, shards: Sequence[Shard], prefix: str, several: bool
) -> np.ndarray:
    """int64 [count]; with `several` also [count, P]."""
    rows: list[int | None] = [count]
    files = [path]
    if path.is_dir():
        found = numbered_files(path, prefix)
        if not found:
            raise SourceError(f"{name}: {path}: there is no {prefix}*.npy")
        files, rows = list(found.values()), [None] * len(found)
        if len(shards) > 1:
            files, rows = _of_shards(name, path, found, shards), [shard.rows for shard in shards]
    parts = [_of_file(name, *each, several) for each in zip(files, rows, strict=True)]
    for file, part in zip(files, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise SourceError(
                f"{name}: {file}: holds integers {list(part.shape)}, and {files[0]} "
                f"{list(parts[0].shape)}; must be as many for each row"
            )
    labels = np.concatenate(parts)
    if len(labels) != count:
        raise SourceError(
            f"{name}: {path}: holds {len(labels)} labels, must be {count}, one for each row"
        )
    return labels


def _of_file(name: str, file: Path, rows: int | None, several: bool) -> np.ndarray:
    labels = open_array(file, name)
    check_labels(f"{name}: {file}", labels, rows, several=several)
    return labels.astype(np.int64)


def _of_shards(
    name: str, directory: Path, files: Mapping[str, Path], shards: Sequence[Shard]
) -> list[Path]:
    """The file of each shard."""
    of_files, of_shards = by_number(files, {shard.name: shard for shard in shards})
    for number, (shard_name, shard) in of_shards.items():
        if number not in of_files:
            raise SourceError(
                f"{name}: {directory}: there is no {LABELS}{shard_name}.npy for "
                f"{shard.files[0].path}"
            )
    for number, (_, file) in of_files.items():
        if number not in of_shards:
            raise SourceError(f"{name}: {file}: there is no shard of this name in the features")
    return [of_files[number][1] for number in of_shards]
