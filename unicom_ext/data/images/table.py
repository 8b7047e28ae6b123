"""Tables that name image files: CSV, JSON lines or Parquet.

    path     of the file, relative to the folder of the table
    label    text or a whole number: the class. Nothing, or a number below 0, is none
    caption  text
    split    train, validation (or val), test, or query and gallery

Only `path` must be there; other columns are not looked at. CSV has its columns' names in the first
line, a line of JSON is an object.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext.data.formats import open_parquet
from unicom_ext.data.images.collection import (
    PART_NAMES,
    Collection,
    check_parts,
    check_there,
    counted,
)
from unicom_ext.data.images.pictures import FilePictures
from unicom_ext.utils.arrays import SourceError

COLUMNS = ("path", "label", "caption", "split")


def read_table(path: Path) -> Collection:
    """Raises SourceError where the table cannot be used, or names files that are not there."""
    read = READERS.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise SourceError(f"{path}: must be a table: a file that ends in {', '.join(READERS)}")
    paths: list[str] = []
    classes: list[str | None] = []
    captions: list[str] = []
    rows: dict[str, list[int]] = defaultdict(list)
    seen: dict[str, int] = {}
    names: dict[str, str] = {}  # of classes and parts, each text once
    try:
        for number, row in enumerate(read(path)):
            where = f"{path}: row {number + 1}"
            file = os.path.normpath(_text(where, row, "path"))
            if file == ".":
                raise SourceError(f"{where}: has no path")
            of_class = class_of(f"{where}: label", row.get("label"))
            of_class = None if of_class is None else names.setdefault(of_class, of_class)
            if (other := seen.setdefault(file, number)) != number:
                labels = f", with the labels {classes[other]} and {of_class}"
                raise SourceError(
                    f"{where}: names {file}, as row {other + 1} does"
                    + labels * (classes[other] != of_class)
                )
            paths.append(file)
            classes.append(of_class)
            captions.append(_text(where, row, "caption"))
            if "split" in row:
                split = _text(where, row, "split")
                if split.lower() not in PART_NAMES:
                    raise SourceError(
                        f"{where}: split is {split!r}, must be {', '.join(PART_NAMES)}"
                    )
                rows[names.setdefault(split, split)].append(number)
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not paths:
        raise SourceError(f"{path}: has no rows")
    if rows and sum(map(len, rows.values())) != len(paths):
        raise SourceError(f"{path}: has a split for some rows only")
    parts: dict[str, np.ndarray] | None = None
    if rows:
        check_parts(str(path), list(rows))
        parts = {PART_NAMES[name.lower()]: np.array(found) for name, found in rows.items()}
    check_there(str(path), path.parent, paths)
    pictures = FilePictures(path.parent, paths, captions if any(captions) else ())
    return Collection(pictures, classes, parts)


def class_of(where: str, label: Any) -> str | None:
    """The name of the class that a file gives an image: text, or a whole number in any type.

    where: what a SourceError calls the label.
    """
    if isinstance(label, float) and label.is_integer():  # of a column that has gaps
        label = int(label)
    if label is None or label == "" or label != label:  # NaN is not itself
        return None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise SourceError(f"{where} is {label!r}, must be text or a whole number")
    name = str(label).strip()
    # -1.0 is how the text of a column looks that has gaps.
    return None if not name or re.fullmatch(r"-[0-9]+(\.0+)?", name) else name


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    """ "" where there is none."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(f"{where}: {column} is {value!r}, must be text")
    return value.strip()


def csv_rows(path: Path, needed: Sequence[str] = ("path",)) -> Iterator[Mapping[str, Any]]:
    """The rows of a CSV file, by the names in its first line. Raises SourceError."""
    csv.field_size_limit(sys.maxsize >> 32)  # the default is shorter than lists of images are
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            names = next(lines, [])
            _check_columns(path, names, needed)
            number = 0
            for line in lines:
                if not line:
                    continue
                number += 1
                if len(line) != len(names):
                    raise SourceError(
                        f"{path}: row {number}: has {counted(len(line), 'cell')} for "
                        f"{counted(len(names), 'column')}"
                    )
                yield dict(zip(names, line, strict=True))
        except csv.Error as error:
            raise SourceError(f"{path}: line {lines.line_num}: is not CSV: {error}") from None


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{path}: line {number + 1}: is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise SourceError(f"{path}: line {number + 1}: must be an object, {{...}}")
            if "path" not in row:
                _check_columns(path, list(row))
            yield row


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    file = open_parquet(path)
    names = file.schema_arrow.names
    _check_columns(path, names)
    import pyarrow

    try:
        for batch in file.iter_batches(columns=[name for name in COLUMNS if name in names]):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _check_columns(path: Path, names: Sequence[str], needed: Sequence[str] = ("path",)) -> None:
    for name in needed:
        if name not in names:
            raise SourceError(
                f"{path}: has no column {name}, but {', '.join(names) or 'none at all'}"
            )
    for name in COLUMNS:
        if names.count(name) > 1:
            raise SourceError(f"{path}: has two columns {name}")


READERS: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".csv": csv_rows,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
