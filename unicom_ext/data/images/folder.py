"""Folders of image files.

    DIR/CLASS/a.jpg, DIR/CLASS/deeper/b.png         a sub-folder for each class
    DIR/a.jpg, DIR/b.jpg                            images without classes
    DIR/train/..., DIR/test/...                     parts, each of them one of the two above
    DIR/00000/000000000.jpg, DIR/00000_stats.json   files of img2dataset: without classes

Parts are called train, val or validation, and test or else query and gallery. A caption lies in a
.txt beside its image. Hidden files, and files that are no images, are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from unicom_ext.data.images.collection import PART_NAMES, Collection, check_parts, shown
from unicom_ext.data.images.pictures import SUFFIXES, FilePictures, PictureError, as_text
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import natural_name_key


class CaptionFiles(Sequence[str]):
    """The texts of files, each read when it is asked for.

    root: the folder that paths are relative to.  paths: "" where there is no text.
    """

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not self._paths[number]:
            return ""
        path = self._root / self._paths[number]
        try:
            return as_text(path.read_bytes(), str(path))
        except OSError as error:
            raise PictureError(f"{path}: {error.strerror or error}") from None


class NoImages(SourceError):
    """A folder without any."""


class _Found(NamedTuple):
    path: str  # relative to the root
    caption: str  # the .txt beside it, or ""
    of_class: str | None


class _Listing(NamedTuple):
    """What lies in a folder itself, in natural order."""

    images: list[str]
    folders: list[str]
    others: set[str]


def read_folder(root: Path) -> Collection:
    """All images below a folder. Raises SourceError where it has none, or mixes layouts."""
    folders = _list(root, "").folders
    parts = [name for name in folders if name.lower() in PART_NAMES]
    if len(parts) < len(folders):
        if len(parts) > 1:
            others = [name for name in folders if name not in parts]
            raise SourceError(
                f"{root}: has {shown(others)} beside the parts {shown(parts)}; must be parts or "
                "classes, not both"
            )
        parts = []
    if not parts:
        return _collection(root, list(_part(root, "")), None)
    check_parts(str(root), parts)
    if _list(root, "").images:
        raise SourceError(f"{root}: has images beside the parts {shown(parts)}")
    images: list[_Found] = []
    rows = {}
    for name in parts:
        first = len(images)
        images += _part(root, name)
        rows[PART_NAMES[name.lower()]] = np.arange(first, len(images))
    return _collection(root, images, rows)


def first_image(root: Path) -> str | None:
    """The path of an image below a folder, but not below links to others and what cannot be read;
    None where there is none."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                return os.path.join(folder, name)
    return None


def _collection(
    root: Path, images: list[_Found], parts: dict[str, np.ndarray] | None
) -> Collection:
    captions = [image.caption for image in images]
    pictures = FilePictures(
        root,
        [image.path for image in images],
        CaptionFiles(root, captions) if any(captions) else (),
    )
    return Collection(pictures, [image.of_class for image in images], parts)


def _part(root: Path, folder: str) -> Iterator[_Found]:
    """The images of a part, or of the whole: in sub-folders, of which each is a class, or flat."""
    where = root / folder
    top = _list(root, folder)
    found = False
    for name in top.folders:
        # Shards of img2dataset: such a folder says nothing of what is on its images.
        of_class = None if f"{name}_stats.json" in top.others else name
        for image, caption in _walk(root, os.path.join(folder, name), ()):
            if top.images:
                raise SourceError(
                    f"{where}: has images in itself ({top.images[0]}) and in sub-folders "
                    f"({os.path.relpath(image, folder or '.')}); must be a sub-folder for each "
                    "class, or one folder without classes"
                )
            found = True
            yield _Found(image, caption, of_class)
    for image, caption in _beside(folder, top):
        found = True
        yield _Found(image, caption, None)
    if not found:
        kind = SourceError if folder else NoImages
        raise kind(f"{where}: has no images, which are {', '.join(SUFFIXES)}")


def _walk(root: Path, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Images at any depth, and the captions beside them."""
    real = os.path.realpath(root / folder)
    if real in above:
        raise SourceError(f"{root / folder}: is a link to a folder that it lies in")
    listing = _list(root, folder)
    yield from _beside(folder, listing)
    for name in listing.folders:
        yield from _walk(root, os.path.join(folder, name), (*above, real))


def _beside(folder: str, listing: _Listing) -> Iterator[tuple[str, str]]:
    for name in listing.images:
        caption = os.path.splitext(name)[0] + ".txt"
        there = caption in listing.others
        yield os.path.join(folder, name), os.path.join(folder, caption) if there else ""


def _list(root: Path, folder: str) -> _Listing:
    images, folders, others = [], [], set()
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(entry.name)
                else:
                    others.add(entry.name)
    except OSError as error:
        raise SourceError(f"{root / folder}: cannot be read: {error.strerror}") from None
    images.sort(key=natural_name_key)
    folders.sort(key=natural_name_key)
    return _Listing(images, folders, others)
