"""Collections by their name: which layout a place has, and its images cut into parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unicom_ext.data import glyphs
from unicom_ext.data.images import standard
from unicom_ext.data.images.collection import (
    GALLERY,
    QUERY,
    TEST,
    TRAIN,
    VALIDATION,
    Collection,
    shown,
)
from unicom_ext.data.images.folder import NoImages, first_image, read_folder
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.settings import GLYPHS, DataSettings
from unicom_ext.data.images.shards import find_shards, read_shards
from unicom_ext.data.images.table import READERS, read_table
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import natural_name_key
from unicom_ext.utils.settings import ConfigError

NO_ROWS = np.arange(0)


@dataclass(frozen=True, eq=False)
class Parts:
    """What a collection is used for.

    train       to train on; the label is NO_CLASS for images without one. It is empty where there
                are images to evaluate on alone
    validation  to compare settings and to stop early on, searched among each other; None: there
                are none
    query       to evaluate on; None: nothing is labelled for it
    gallery     what each query is searched in, of one numbering of classes with the queries; None:
                the other queries
    """

    train: ImageSet
    validation: ImageSet | None
    query: ImageSet | None
    gallery: ImageSet | None


def open_images(settings: DataSettings, seed: int) -> Parts:
    """The images that the settings name.

    Where the data have parts of their own, these count. Else the classes are cut by their names and
    the seed, in the same way on every machine: `test_fraction` of them are evaluated on, and of the
    others `validation_fraction` are for validation. Images without a class are all in `train`.

    Raises SourceError, a ConfigError, where they are not there or not as their layout says;
    ConfigError where a fraction leaves a part without a class; ModuleNotFoundError where something
    optional is not installed that they need.
    """
    if settings.data == GLYPHS:
        drawn = glyphs.load()
        number = {point: i for i, point in enumerate(drawn.codepoints.tolist())}
        train, test = (
            replace(
                of_glyphs(part),
                numbers=np.array([number[point] for point in part.codepoints.tolist()]),
            )
            for part in glyphs.split(drawn, seed, settings.test_fraction)
        )
        return _with_validation(train, None, test, None, settings, seed)
    found = _read(Path(settings.data).expanduser(), settings.layout)
    if found.parts is not None:
        return _official(found, settings, seed)
    (train,) = found.image_sets(np.arange(len(found.pictures)))
    test = train.take(NO_ROWS)
    if train.num_classes == 1:
        raise SourceError(
            f"{settings.data}: all images that have a class have the same, {train.class_names[0]!r}"
        )
    if train.num_classes:
        train, test = train.split(seed, settings.test_fraction)
    return _with_validation(train, None, test, None, settings, seed)


def open_all(settings: DataSettings) -> ImageSet:
    """All images that the settings name, whatever part they are of, with one numbering of the
    classes. Raises what `open_images` raises."""
    if settings.data == GLYPHS:
        return of_glyphs(glyphs.load())
    found = _read(Path(settings.data).expanduser(), settings.layout)
    return found.image_sets(np.arange(len(found.pictures)))[0]


def open_part(settings: DataSettings, seed: int, part: str) -> ImageSet:
    """The images of `open_all` for "all", else one part of `open_images` by its name.

    Raises ConfigError where there is no such part.
    """
    if part == "all":
        return open_all(settings)
    images: ImageSet | None = getattr(open_images(settings, seed), part)
    if not images:
        raise ConfigError(f"part: got {part!r}, but {settings.data} has no such images")
    return images


def of_glyphs(g: glyphs.Glyphs) -> ImageSet:
    """Bundled characters; the caption of an image is the name of its character."""
    captions = [g.captions[label] for label in g.labels.tolist()]
    return ImageSet.of_arrays(g.images, g.labels, g.captions, captions)


def _official(found: Collection, settings: DataSettings, seed: int) -> Parts:
    assert found.parts is not None
    rows = found.parts
    (train,) = found.image_sets(rows.get(TRAIN, NO_ROWS))
    validation = gallery = None
    if VALIDATION in rows:
        (validation,) = found.image_sets(rows[VALIDATION])
    if GALLERY in rows:
        query, gallery = found.image_sets(rows[QUERY], rows[GALLERY])
    else:
        (query,) = found.image_sets(rows.get(TEST, NO_ROWS))
    return _with_validation(train, validation, query, gallery, settings, seed)


def _with_validation(
    train: ImageSet,
    validation: ImageSet | None,
    query: ImageSet,
    gallery: ImageSet | None,
    settings: DataSettings,
    seed: int,
) -> Parts:
    if settings.validation_fraction:
        if validation is not None:
            raise ConfigError(
                f"validation_fraction: got {settings.validation_fraction}, must be 0: "
                f"{settings.data} has images for validation"
            )
        train, validation = train.split(seed, settings.validation_fraction, "validation_fraction")
    if not (query.labels >= 0).any():
        return Parts(train, validation, None, None)
    return Parts(train, validation, query, gallery)


def _read(path: Path, layout: str) -> Collection:
    if not path.exists():
        raise SourceError(f"{path}: is not there")
    return LAYOUTS[layout](path)


def _auto(path: Path) -> Collection:
    if path.is_dir():
        known = standard.found(path)
        if known is not None:
            return LAYOUTS[known](path)
        if shards := find_shards(path):
            if (image := first_image(path)) is not None:
                raise SourceError(
                    f"{path}: has shards ({next(iter(shards.values()))[0].name}) and images "
                    f"({os.path.relpath(image, path)}); layout must say which: shards or folder"
                )
            return read_shards(path)
        try:
            return read_folder(path)
        except NoImages:
            names = sorted((one.name for one in path.iterdir()), key=natural_name_key)
            raise SourceError(
                f"{path}: has {shown(names) or 'nothing'} and no images below; must have images, "
                f".tar shards or the files of one of {', '.join(standard.STANDARD)}, or be a table "
                f"itself ({', '.join(READERS)})"
            ) from None
    if path.suffix.lower() in READERS:
        return read_table(path)
    if path.suffix.lower() == ".tar":
        return read_shards(path)
    raise SourceError(
        f"{path}: must be a folder, or a file that ends in {', '.join((*READERS, '.tar'))}"
    )


LAYOUTS: dict[str, Callable[[Path], Collection]] = {
    "auto": _auto,
    "folder": read_folder,
    "table": read_table,
    "shards": read_shards,
    **standard.READERS,
}
