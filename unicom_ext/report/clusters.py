"""Clusters of images: how large they are, how pure, and what is in some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from unicom_ext.cluster.quality import Quality, quality
from unicom_ext.data.images.imageset import NO_CLASS, ImageSet
from unicom_ext.report import charts
from unicom_ext.report.thumbnails import Thumbnail, first_readable

RANDOM = 6  # clusters to show besides the largest and the median one
MEMBERS = 12  # images of each


@dataclass(frozen=True, eq=False)
class Clusters:
    """labels  int [n], the cluster of each image; negative: none
    images  n, with their true classes where these are known
    """

    labels: np.ndarray
    images: ImageSet

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.images),):
            raise ValueError(
                f"labels: got shape {list(self.labels.shape)}, must be [{len(self.images)}], one "
                "for each image"
            )

    @property
    def sizes(self) -> np.ndarray:
        """int64 [k], images of each cluster; none where a number is not used."""
        return np.bincount(self.labels[self.labels >= 0])

    @property
    def quality(self) -> Quality | None:
        """None where no image in a cluster has a class."""
        found = quality([(self.labels, self.images.first_labels)])
        return found if found.rows else None

    def chart(self) -> Markup:
        """How many clusters there are of each size, in octaves."""
        sizes = self.sizes[self.sizes > 0]
        octave = np.bincount(np.log2(sizes).astype(int))
        bars = [(f"{2**i:,}", count) for i, count in enumerate(octave.tolist())]
        alt = f"Histogram of the sizes of {len(sizes)} clusters"
        return charts.bars(alt, "images in a cluster, from this number on", "clusters", bars)

    def sheets(self, rng: np.random.Generator) -> list[Sheet]:
        """The largest cluster, the median one and random others, with random members."""
        used = np.flatnonzero(self.sizes)
        order = used[np.argsort(-self.sizes[used], kind="stable")]
        chosen = {int(order[0]): "largest"}
        chosen.setdefault(int(order[len(order) // 2]), "median")
        rest = np.setdiff1d(used, [*chosen])
        for cluster in np.sort(rng.choice(rest, min(RANDOM, len(rest)), replace=False)).tolist():
            chosen[cluster] = "random"
        return [self._sheet(cluster, why, rng) for cluster, why in chosen.items()]

    def _sheet(self, cluster: int, why: str, rng: np.random.Generator) -> Sheet:
        rows = np.flatnonzero(self.labels == cluster)
        classes = self.images.first_labels[rows]
        known = classes[classes != NO_CLASS]
        main, share = NO_CLASS, 0.0
        if len(known):
            counts = np.bincount(known)
            main = int(counts.argmax())
            share = int(counts[main]) / len(known)
        members = [
            Member(small, self.images.class_name(row), self.images.first_labels[row] == main)
            for row, small in first_readable(self.images, rng.permutation(rows), MEMBERS)
        ]
        name = self.images.class_names[main] if len(known) else ""
        return Sheet(cluster, why, len(rows), name, share, members)


class Member(NamedTuple):
    picture: Thumbnail
    name: str  # of its true class; "" where that is not known
    typical: bool  # of the most frequent class of its cluster


class Sheet(NamedTuple):
    cluster: int
    why: str  # it is shown
    size: int
    name: str  # of the most frequent class; "" where none is known
    share: float  # of it, among the members whose class is known
    members: list[Member]
