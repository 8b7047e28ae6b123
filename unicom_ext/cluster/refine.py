"""After the last pass: one cluster out of near duplicates, and no tiny or loose ones."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096  # centroids compared with all others at a time


def merge(centroids: Tensor, sizes: Tensor, scores: Tensor, above: float) -> Tensor:
    """Centroids fp32 [<= k, d] of which no merged pair had a cosine above the bound.

    From the largest cluster down, each takes in those that are left and close enough to it; so no
    chain of near duplicates makes one cluster of what is far apart.

    sizes, scores: rows of each cluster, and the sum of their cosines, float64: the norm of the sum
    of its rows, so that the merged centroid is the direction of all of them.
    """
    order = torch.argsort(-sizes, stable=True)
    units = F.normalize(centroids)[order]
    leader = np.arange(len(units))
    free = np.ones(len(units), bool)
    for begin in range(0, len(units), BLOCK):
        close = (units[begin : begin + BLOCK] @ units.T > above).nonzero().numpy()
        close = close[close[:, 0] + begin < close[:, 1]]
        for i, j in close.tolist():
            if free[i + begin] and free[j]:
                leader[j] = i + begin
                free[j] = False
    sums = torch.zeros(units.shape, dtype=torch.float64)
    weighted = units.double() * scores[order].clamp(min=1e-9)[:, None]
    sums.index_add_(0, torch.from_numpy(leader), weighted)
    # In the old order of the leaders.
    kept = torch.from_numpy(np.flatnonzero(free))
    kept = kept[order[kept].argsort()]
    return F.normalize(sums[kept]).float()


def dissolve(sizes: Tensor, scores: Tensor, min_size: int, min_cosine: float) -> np.ndarray:
    """The new number of each cluster, int32 [k]: -1 for those that are too small or too loose."""
    kept = sizes >= min_size
    if min_cosine > 0:
        kept &= scores >= min_cosine * sizes.clamp(min=1)
    numbers = np.full(len(sizes), -1, np.int32)
    numbers[kept.numpy()] = np.arange(int(kept.sum()))
    return numbers
