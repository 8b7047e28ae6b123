"""What queries find: the nearest images, whether they are right, and which classes are confused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.retrieval import topk

TOP = 5
BLOCK_BYTES = 256 << 20  # of the search, which is twice as fast so as with a quarter of it
NEAR = 0.02  # by so much in cosine the right one may be behind in a near miss


class Outcomes(NamedTuple):
    """Numbers of the queries, each in one of three."""

    right: np.ndarray  # the nearest is of the query's class
    near: np.ndarray  # one of the class is among the first TOP, at most NEAR behind the nearest
    wrong: np.ndarray  # the others


class Confusion(NamedTuple):
    """A pair of classes, first < second."""

    first: int
    second: int
    there: int  # queries of the first whose nearest image is of the second
    back: int  # and the other way round
    query: int  # the first such query, in the direction that is more frequent
    found: int  # its nearest image


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest images of the gallery, or other images, of each query, best first.

    counted: bool [n], the queries that have a class, and another image of it to find. The others
    are in no figure.
    """

    index: np.ndarray  # [n, k] int64
    cosine: np.ndarray  # [n, k] fp32
    right: np.ndarray  # [n, k] bool: of the same class
    counted: np.ndarray
    queries: ImageSet
    gallery: ImageSet  # the queries where they are searched among each other

    @classmethod
    def search(cls, query: Embedded, gallery: Embedded | None) -> Neighbours:
        """k is `TOP`, or as many as there are."""
        among = gallery or query
        k = min(TOP, len(among.images) - (gallery is None))
        if k < 1 or not len(query.images):
            raise ValueError("gallery: holds nothing to find")
        others_embedded = None if gallery is None else gallery.embeddings
        cosine, index = topk(query.embeddings, others_embedded, k, block_bytes=BLOCK_BYTES)
        labels, others = query.images.first_labels, among.images.labels
        some = others.reshape(len(others), -1)  # of each image one class, or several
        right = (some[index] == labels[:, None, None]).any(2) & (labels >= 0)[:, None]
        sizes = np.bincount(some[some >= 0], minlength=labels.max(initial=0) + 1)
        counted = (labels >= 0) & (sizes[labels] > (gallery is None))
        return cls(index.numpy(), cosine.numpy(), right, counted, query.images, among.images)

    @property
    def outcomes(self) -> Outcomes:
        first = self.right.argmax(1)  # the best right one, where there is any
        behind = self.cosine[:, 0] - np.take_along_axis(self.cosine, first[:, None], 1)[:, 0]
        near = self.right.any(1) & (first > 0) & (behind <= NEAR)
        kinds = self.right[:, 0], near, ~self.right[:, 0] & ~near
        return Outcomes(*(np.flatnonzero(kind & self.counted) for kind in kinds))

    def confusions(self, most: int) -> list[Confusion]:
        """The pairs of classes whose queries most often find the other one, the worst first; of
        equal ones that of the smaller numbers."""
        labels = self.queries.first_labels
        nearest = self.gallery.first_labels[self.index[:, 0]]
        rows = np.flatnonzero(self.counted & ~self.right[:, 0] & (nearest >= 0))
        of, to = labels[rows], nearest[rows]
        pairs, at, counts = np.unique(
            np.stack([np.minimum(of, to), np.maximum(of, to)]),
            axis=1, return_inverse=True, return_counts=True,
        )  # fmt: skip
        at = at.reshape(-1)
        there = np.bincount(at, of < to, len(counts)).astype(np.int64)
        found = []
        for i in np.argsort(-counts, kind="stable")[:most].tolist():
            forth, back = int(there[i]), int(counts[i] - there[i])
            query = int(rows[(at == i) & ((of < to) == (forth >= back))][0])
            first, second = pairs[:, i].tolist()
            found.append(Confusion(first, second, forth, back, query, int(self.index[query, 0])))
        return found
