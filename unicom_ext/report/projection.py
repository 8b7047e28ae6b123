"""A map of embeddings: their two principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from markupsafe import Markup

from unicom_ext.data.baselines import principal_axes
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.report import charts
from unicom_ext.report.thumbnails import Thumbnail, first_readable

POINTS = 2000
CLASSES = 8  # in colour
OF_A_CLASS = 100  # points, at most


@dataclass(frozen=True, eq=False)
class Projection:
    """points  fp32 [m, 2], where the drawn images lie
    explained  share of the variance of all embeddings that the two directions hold
    classes    the most frequent ones: (name, numbers of their points, a picture of one)
    rest       numbers of the other points
    """

    points: np.ndarray
    explained: float
    classes: list[tuple[str, np.ndarray, Thumbnail | None]]
    rest: np.ndarray

    @classmethod
    def of(cls, embedded: Embedded, rng: np.random.Generator) -> Projection | None:
        """The most frequent classes, and others at random; None where there are too few images or
        dimensions for a map."""
        rows = F.normalize(embedded.embeddings.float(), dim=1)
        if min(len(rows) - 1, rows.shape[1]) < 2:
            return None
        mean, axes = principal_axes(rows, 2)
        images, labels = embedded.images, embedded.images.first_labels
        counts = np.bincount(labels[labels >= 0], minlength=1)
        frequent = np.argsort(-counts, kind="stable")[:CLASSES]
        of_classes = [
            rng.permutation(np.flatnonzero(labels == c))[:OF_A_CLASS]
            for c in frequent[counts[frequent] > 1].tolist()
        ]
        others = np.flatnonzero(~np.isin(labels, frequent[: len(of_classes)]))
        room = POINTS - sum(map(len, of_classes))
        others = rng.permutation(others)[:room]
        starts = np.cumsum([0, *map(len, of_classes)])
        chosen = np.concatenate([*of_classes, others])
        points = ((rows[chosen] - mean) @ axes).numpy()
        spread = float(rows.var(0).sum())
        explained = float(((rows - mean) @ axes).var(0).sum()) / spread if spread else 0.0
        classes = []
        for i, numbers in enumerate(of_classes):
            small = first_readable(images, numbers, 1)
            at = np.arange(starts[i], starts[i + 1])
            classes.append((images.class_name(numbers[0]), at, small[0][1] if small else None))
        return cls(points, explained, classes, np.arange(starts[-1], len(chosen)))

    def chart(self) -> Markup:
        groups = [("rest", self.points[self.rest])]
        groups += [(f"k{i}", self.points[at]) for i, (_, at, _) in enumerate(self.classes)]
        alt = f"Map of {len(self.points)} embeddings by their two principal components"
        return charts.cloud(alt, groups)
