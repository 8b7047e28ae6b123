"""`Collection`: what the files of a place say of its images, before anything is cut or numbered."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unicom_ext.data.images.imageset import NO_CLASS, ImageSet
from unicom_ext.data.images.pictures import Pictures
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import natural_name_key

TRAIN, VALIDATION, TEST, QUERY, GALLERY = "train", "validation", "test", "query", "gallery"
# By the names that folders and tables have for them; a test part is queries without a gallery.
PART_NAMES = {
    "val": VALIDATION,
    **{part: part for part in (TRAIN, VALIDATION, TEST, QUERY, GALLERY)},
}
_SHOWN = 3  # names in a message


# The name of an image's class, or those of several; None where it has none.
Classes = str | tuple[str, ...] | None


class Named(NamedTuple):
    """An image as a list of them names it."""

    path: str
    of_class: Classes
    part: str


@dataclass(frozen=True, eq=False)
class Collection:
    """The images of one place.

    pictures  where they are read from
    classes   the name of each one's class, or of several
    parts     numbers of the pictures of each part, by one of PART_NAMES' values; None where the
              data do not say
    """

    pictures: Pictures
    classes: Sequence[Classes]
    parts: Mapping[str, np.ndarray] | None = None

    def image_sets(self, *rows: np.ndarray) -> list[ImageSet]:
        """The given pictures of each; they share one numbering of the classes that are in them."""
        classes = [[self._classes_of(row) for row in part.tolist()] for part in rows]
        found = {name for part in classes for some in part for name in some}
        names = sorted(found, key=natural_name_key)
        number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        number[None] = NO_CLASS  # which rows of several are filled up with
        common = np.array([self._numbers[name] for name in names], np.int64)
        sets = []
        for part, of_part in zip(rows, classes, strict=True):
            most = max(1, *map(len, of_part), 1)
            numbers = [
                number[name] for some in of_part for name in (*some, *[None] * (most - len(some)))
            ]
            labels = np.array(numbers, np.int64)
            if most > 1:
                labels = labels.reshape(len(part), most)
            sets.append(ImageSet(self.pictures, part, labels, names, common))
        return sets

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Of all classes, by their names."""
        found = {name for row in range(len(self.classes)) for name in self._classes_of(row)}
        return {name: number for number, name in enumerate(sorted(found, key=natural_name_key))}

    def _classes_of(self, row: int) -> tuple[str, ...]:
        found = self.classes[row]
        return found if isinstance(found, tuple) else () if found is None else (found,)


def check_parts(where: str, names: Sequence[str]) -> None:
    """Raises SourceError unless names of parts, each one once, can be used together."""
    part_of = {PART_NAMES[name.lower()]: name for name in names}
    if len(part_of) < len(names):
        raise SourceError(f"{where}: has two names of one part among {', '.join(names)}")
    if TEST in part_of and (QUERY in part_of or GALLERY in part_of):
        raise SourceError(
            f"{where}: has {', '.join(names)}; must be test, whose images are searched among each "
            "other, or else query and gallery"
        )
    for part, other in ((QUERY, GALLERY), (GALLERY, QUERY)):
        if part in part_of and other not in part_of:
            raise SourceError(f"{where}: has {part_of[part]}, but no {other}")


def check_there(where: str, root: Path, paths: Sequence[str]) -> None:
    """Raises SourceError, which counts them, if some of the files are not there.

    paths: of files, relative to root. Each folder is listed once, which is quicker than a question
    for each file.
    """
    of_folder = defaultdict(list)
    for path in paths:
        folder, name = os.path.split(path)
        of_folder[folder].append(name)
    missing = []
    for folder, names in of_folder.items():
        try:
            there = set(os.listdir(root / folder))
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        missing += [os.path.join(folder, name) for name in names if name not in there]
    if missing:
        raise SourceError(
            f"{where}: {len(missing)} of {len(paths)} images not found in {root}: {shown(missing)}"
        )


def shown(names: Sequence[str]) -> str:
    """The first few names of a list."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
