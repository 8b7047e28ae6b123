"""Pictures, how their classes are shared out, and pseudo-classes for them.

A tenth of the classes, the same for every seed, is for tuning alone; half of the classes are
trained on and the other four tenths tested on, which ones says a hash of the seed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import emoji_pictures
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unicom_ext.cluster import ClusterConfig, cluster, quality
from unicom_ext.data import baselines, glyphs
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.joint import join
from unicom_ext.data.ngrams import NGrams

SETS = ("glyphs", "emoji")
LABELS = ("joint", "true", "image", "text")
VALIDATION, TEST = 0.1, 0.4  # shares of the classes
VALIDATION_SEED = 2**31
# Fixed before any result was looked at. More clusters than classes: many classes are torn apart.
CLUSTERS_PER_CLASS = 2.3
KEPT_WORDS = 0.8
FEATURES = 128


@dataclass(frozen=True, eq=False)
class Split:
    """Three parts that share no class, images uint8 [n, channels, 32, 32] on black."""

    train: Glyphs
    validation: Glyphs
    test: Glyphs


@lru_cache(1)
def load(name: str, emoji_cache: Path) -> Glyphs:
    """A picture set of SETS; FileNotFoundError where the emoji have not been cached."""
    if name == "emoji":
        return emoji_pictures.load(emoji_cache)
    drawn = glyphs.load()
    return replace(drawn, images=drawn.images[:, None])


def split(pictures: Glyphs, seed: int) -> Split:
    rest, validation = glyphs.split(pictures, VALIDATION_SEED, VALIDATION)
    train, test = glyphs.split(rest, seed, TEST / (1 - VALIDATION))
    return Split(train, validation, test)


def labelled(train: Glyphs, kind: str, seed: int) -> tuple[Glyphs, dict[str, Any]]:
    """The training images under labels of one of LABELS, and what is known of these labels."""
    if kind == "true":
        return train, {"classes": train.num_classes}
    found = pseudo_classes(_features(train, kind, seed), train.num_classes, seed)
    relabelled = _relabelled(train, found)
    facts = quality([(found, train.labels)])._asdict()
    return relabelled, {"classes": relabelled.num_classes, **facts}


def pseudo_classes(features: Tensor, num_classes: int, seed: int) -> np.ndarray:
    """Clusters of the features fp32 [n, d], CLUSTERS_PER_CLASS times as many as classes: int [n],
    -1 for a row that is zero."""
    clusters = round(CLUSTERS_PER_CLASS * num_classes)
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory) / "features.npy", Path(directory) / "clusters"
        np.save(source, features.numpy())
        config = ClusterConfig(clusters=clusters, passes=10, seed=seed)
        cluster(config, source, output, console=Console(quiet=True))
        return np.concatenate([np.load(path) for path in sorted(output.glob("labels_*.npy"))])


def _features(train: Glyphs, kind: str, seed: int) -> Tensor:
    """fp32 [n, d]: gradient histograms of each colour, n-grams of some words of the name, both."""
    if kind == "joint":
        parts = (_features(train, part, seed) for part in ("image", "text"))
        return join(*parts, "concat", 0.5)
    if kind == "text":
        texts, ngrams = captions(train, seed), NGrams(FEATURES, seed)
        ngrams.fit(texts)
        return ngrams.encode(texts)
    colours = (torch.from_numpy(train.images[:, channel]) for channel in range(channels(train)))
    return torch.cat([baselines.hog(c, train.labels, c, FEATURES) for c in colours], dim=1)


def _relabelled(train: Glyphs, labels: np.ndarray) -> Glyphs:
    """The pictures that have a label, numbered without gaps."""
    rows = np.flatnonzero(labels >= 0)
    kept, new = np.unique(labels[rows], return_inverse=True)
    return replace(
        train,
        images=train.images[rows],
        labels=new.astype(np.int64),
        fonts=train.fonts[rows],
        codepoints=kept.astype(np.int64),
        captions=[f"cluster {number}" for number in kept.tolist()],
    )


def captions(train: Glyphs, seed: int) -> list[str]:
    """The text of each picture: some of the words of its class's name, and at least one."""
    rng = np.random.default_rng(seed)
    texts = []
    for label in train.labels.tolist():
        words = train.captions[label].split()
        kept = rng.random(len(words)) < KEPT_WORDS
        kept[rng.integers(len(words))] |= not kept.any()
        texts.append(" ".join(word for word, keep in zip(words, kept, strict=True) if keep))
    return texts


def channels(pictures: Glyphs) -> int:
    return pictures.images.shape[1]
