"""How well clusters match true classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from unicom_ext.utils.arrays import check_labels


class Quality(NamedTuple):
    """How well clusters match true classes; NaN where no row has both.

    Attributes:
        nmi: mutual information over the mean of the two entropies (Strehl, Ghosh, JMLR 2002).
        purity: share of the rows whose class is the most frequent one of their cluster.
        conflict: share of the pairs of rows of one class that lie in different clusters.
        rows: how many rows have both a cluster and a class.
    """

    nmi: float
    purity: float
    conflict: float
    rows: int


def quality(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Quality:
    """Compare clusters with true classes, piece by piece.

    Memory is that of the different (cluster, class) pairs, and of a piece.

    Args:
        pairs: pieces of (cluster [n], class [n]), integers of any dtype, below 2**31. Rows where
            either is negative are left out.

    Returns:
        The figures of all pieces together.

    Raises:
        SourceError: a ValueError; a piece is something else.
    """
    pair, count = np.empty(0, np.int64), np.empty(0, np.int64)
    for cluster, true in pairs:
        check_labels("cluster", cluster, below=2**31)
        check_labels("class", true, len(cluster), below=2**31)
        known = (cluster >= 0) & (true >= 0)
        piece, number = np.unique(
            cluster[known].astype(np.int64) << 32 | true[known].astype(np.int64),
            return_counts=True,
        )
        pair, place = np.unique(np.concatenate([pair, piece]), return_inverse=True)
        count = np.bincount(place, np.concatenate([count, number]), len(pair)).astype(np.int64)
    rows = int(count.sum())
    if rows == 0:
        return Quality(float("nan"), float("nan"), float("nan"), 0)
    clusters, cluster_of = np.unique(pair >> 32, return_inverse=True)
    classes, class_of = np.unique(pair & 0xFFFFFFFF, return_inverse=True)
    in_cluster = np.bincount(cluster_of, count, len(clusters))
    in_class = np.bincount(class_of, count, len(classes))

    entropy = [float(-(n / rows * np.log(n / rows)).sum()) for n in (in_cluster, in_class)]
    ratio = count * rows / (in_cluster[cluster_of] * in_class[class_of])
    mutual = float((count / rows * np.log(ratio)).sum())
    # One cluster and one class are the same partition.
    nmi = 2 * mutual / sum(entropy) if sum(entropy) > 0 else 1.0

    largest = np.zeros(len(clusters), np.int64)
    np.maximum.at(largest, cluster_of, count)

    def pairs_of(n: np.ndarray) -> float:
        return float((n * (n - 1.0)).sum()) / 2

    same_class = pairs_of(in_class)
    conflict = 1 - pairs_of(count) / same_class if same_class > 0 else 0.0
    return Quality(min(max(nmi, 0.0), 1.0), float(largest.sum()) / rows, conflict, rows)
