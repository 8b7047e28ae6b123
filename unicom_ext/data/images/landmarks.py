"""Google Landmarks v2: its lists, and who of them is the answer to which query."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unicom_ext.data.images.collection import GALLERY, QUERY, TRAIN, Named
from unicom_ext.data.images.table import csv_rows
from unicom_ext.utils.arrays import SourceError

SOLUTION = "retrieval_solution_v2.1.csv"


def read(root: Path) -> Iterator[Named]:
    """The cleaned list of training images where it is there, else the whole one.

    Queries are those of the solution that are "Private", as results are published for them, and the
    index is their gallery. Without the solution there are images to train on alone.
    """
    clean = _file(root, "train", "train_clean.csv")
    if clean is not None:
        for row in csv_rows(clean, ("landmark_id", "images")):
            for image in row["images"].split():
                yield Named(_path("train", image), row["landmark_id"], TRAIN)
    else:
        for row in csv_rows(_needed(root, "train", "train.csv"), ("id", "landmark_id")):
            yield Named(_path("train", row["id"]), row["landmark_id"], TRAIN)
    solution = _file(root, "test", SOLUTION)
    if solution is None:
        return
    queries = {
        row["id"]: row["images"].split()
        for row in csv_rows(solution, ("id", "images", "Usage"))
        if row["Usage"] == "Private"
    }
    # Queries with the same answers are of one class, called after the first of them. An image that
    # answers others too is of several.
    first: dict[frozenset[str], str] = {}
    classes_of: dict[str, tuple[str, ...]] = {}
    for query, answers in queries.items():
        name = first.setdefault(frozenset(answers), query)
        yield Named(_path("test", query), name if answers else None, QUERY)
        if name == query:
            for image in dict.fromkeys(answers):
                classes_of[image] = (*classes_of.get(image, ()), name)
    index = _needed(root, "index", "index.csv")
    for row in csv_rows(index, ("id",)):
        yield Named(_path("index", row["id"]), classes_of.pop(row["id"], None), GALLERY)
    if classes_of:
        raise SourceError(f"{solution}: names {next(iter(classes_of))}, which is not in {index}")


def _path(part: str, image: str) -> str:
    return f"{part}/{image[:1]}/{image[1:2]}/{image[2:3]}/{image}.jpg"


def _file(root: Path, part: str, name: str) -> Path | None:
    """Lists lie beside the images, or beside the folders of parts."""
    return next((file for file in (root / part / name, root / name) if file.is_file()), None)


def _needed(root: Path, part: str, name: str) -> Path:
    file = _file(root, part, name)
    if file is None:
        raise SourceError(f"{root}: has neither {part}/{name} nor {name}")
    return file
