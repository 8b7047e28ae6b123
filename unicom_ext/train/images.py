"""The images of a run: what is trained on, and whether there is something to find."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from unicom_ext.data.images.batches import AT_LEAST
from unicom_ext.data.images.collection import shown
from unicom_ext.data.images.imageset import NO_CLASS, ImageSet
from unicom_ext.data.images.opening import Parts, open_images
from unicom_ext.data.images.settings import DataSettings
from unicom_ext.data.labels import check_same_images, read_positives
from unicom_ext.train.config import Config
from unicom_ext.utils.files import natural_name_key
from unicom_ext.utils.settings import ConfigError


def labelled(config: Config, parts: Parts) -> Parts:
    """With the labels to train on. Raises ConfigError where there is nothing to train on, or
    nothing to find: not after hours of training."""
    train_set = parts.train
    if len(train_set) < AT_LEAST:
        raise ConfigError(
            f"data: {config.data} has {len(train_set)} images to train on, must have at least "
            f"{AT_LEAST}"
        )
    _check_relevant(config, "validation", parts.validation, None)
    _check_relevant(config, "test", parts.query, parts.gallery)
    if config.labels:
        check_same_images(
            "labels", config.labels, train_set.facts(),
            "of features that were extracted with the same data, seed and fractions, and of the "
            "part train",
        )  # fmt: skip
        labels = read_positives("labels", config.labels, len(train_set), config.positives)
        train_set = train_set.relabelled(labels)
    elif (train_set.labels == NO_CLASS).any():
        if (train_set.labels == NO_CLASS).all():
            raise ConfigError(
                f"data: the images of {config.data} have no labels; `labels` can name those that "
                "`unicom-ext cluster` finds"
            )
        train_set = train_set.take(np.flatnonzero(train_set.labels != NO_CLASS))
    if config.multi_label != "average" and train_set.labels.ndim == 1:
        raise ConfigError(
            f"multi_label: got {config.multi_label!r}, but the images have one label each"
        )
    check_parts(config, parts)
    return replace(parts, train=train_set)


def opened(settings: DataSettings, seed: int) -> Parts:
    """The images that the settings name, to train and to evaluate on.

    Raises what `open_images` raises, and ConfigError where parts share classes: results on those
    that were trained on would pass for results on others.
    """
    parts = open_images(settings, seed)
    sets = {"train": parts.train, "validation": parts.validation, "test": parts.query}
    classes = {part: _classes_in(images) for part, images in sets.items() if images is not None}
    for part, other in combinations(classes, 2):
        if shared := sorted(classes[part] & classes[other], key=natural_name_key):
            raise ConfigError(
                f"data: {settings.data} has {len(shared)} of the classes both in {part} and in "
                f"{other} ({shown(shared)}); must have each class in one of them alone"
            )
    return parts


def _classes_in(images: ImageSet) -> set[str]:
    """The names of the classes that its images have."""
    labels = np.unique(images.labels[images.labels != NO_CLASS])
    return {images.class_names[label] for label in labels.tolist()}


def check_parts(config: Config, parts: Parts) -> None:
    """Raises ConfigError where a part that the settings need is not there, or too small."""
    if config.patience and parts.validation is None:
        raise ConfigError(f"patience: got {config.patience}, but there are no validation classes")
    size = min(config.batch_size, len(parts.train))
    if size < AT_LEAST * config.accumulate:
        raise ConfigError(
            f"batch_size: got {size}, must be at least {AT_LEAST} for each of "
            f"{config.accumulate} parts"
        )


def _check_relevant(
    config: Config, part: str, query: ImageSet | None, gallery: ImageSet | None
) -> None:
    """Raises ConfigError where no image of a part has another one to be found."""
    if query is not None and not has_relevant(query, gallery):
        where = "the gallery" if gallery is not None else "the part"
        raise ConfigError(
            f"data: no {part} image of {config.data} has another one of its class in {where}, so "
            "that there is nothing to find"
        )


def has_relevant(query: ImageSet, gallery: ImageSet | None) -> bool:
    """Whether an image has another one of its class to be found."""
    labels = query.labels[query.labels != NO_CLASS]
    if gallery is None:
        return len(np.unique(labels)) < len(labels)
    return bool(np.isin(labels, gallery.labels).any())


def facts_of(parts: Parts) -> dict[str, Any]:
    """Counts, and a digest of all images and labels: what a checkpoint must fit."""
    digest = hashlib.sha256()
    sets: dict[str, ImageSet | None] = {
        "train": parts.train,
        "test": parts.query,
        "gallery": parts.gallery,
        "validation": parts.validation,
    }
    facts: dict[str, Any] = {}
    for name, images in sets.items():
        if images is not None:
            images.digest(digest)
            facts[f"{name}_images"] = len(images)
            facts[f"{name}_classes"] = images.num_classes
    return {**facts, "sha256": digest.hexdigest()}
