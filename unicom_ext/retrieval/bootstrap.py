"""95 % confidence intervals of averages over queries, by the percentile bootstrap.

Queries of one class are not independent: a class that the model knows badly is bad for all of them.
So it is classes that are drawn again, each with all of its queries (the cluster bootstrap; Davison,
Hinkley: "Bootstrap Methods and their Application", 1997, section 3.8). The gallery stays as it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unicom_ext.distributed.ranks import Ranks

_LEVELS = (0.025, 0.975)
_DRAW_BYTES = 32  # per unit of a resample, temporaries included


class UnitSums:
    """Sums over the queries of each unit that is drawn as a whole: of a class, or of one query.

    Args:
        unit: int64 [n], the unit of each query; every one of 0, 1, ... has a query.
        num_values: M, how many values a query has.
        ranks: of which each adds the values of every world_size-th query, beginning with its own.

    Attributes:
        sums: float64 [units, 1 + M], of how many queries, and of their values.
    """

    def __init__(self, unit: Tensor, num_values: int, ranks: Ranks) -> None:
        shape = int(unit.max()) + 1, 1 + num_values
        self.sums = torch.zeros(shape, dtype=torch.float64, device=unit.device)
        self._unit = unit[ranks.rank :: ranks.world_size]

    def add(self, values: Tensor) -> None:
        """The values float64 [q, M] of the next queries."""
        unit, self._unit = self._unit[: len(values)], self._unit[len(values) :]
        self.sums[:, 0] += torch.bincount(unit, minlength=len(self.sums))
        self.sums[:, 1:].index_add_(0, unit, values)


def intervals(
    sums: Tensor, resamples: int, seed: int, block_bytes: int
) -> list[tuple[float, float]]:
    """The interval (low, high) of each of the M averages.

    sums         [units, 1 + M] of `UnitSums`
    resamples    how often as many units as there are are drawn, with replacement
    seed         of what is drawn, which depends on nothing else
    block_bytes  bound on the working memory; one resample always fits
    """
    sums = sums.cpu()
    units = len(sums)
    generator = torch.Generator().manual_seed(seed)
    averages = torch.empty(resamples, sums.shape[1] - 1, dtype=torch.float64)
    for part in averages.split(max(1, block_bytes // (_DRAW_BYTES * units))):
        drawn = torch.randint(units, (len(part), units), generator=generator)
        drawn += torch.arange(0, drawn.numel(), units)[:, None]
        times = torch.bincount(drawn.flatten(), minlength=drawn.numel()).view(drawn.shape)
        total = times.double() @ sums
        torch.div(total[:, 1:], total[:, :1], out=part)
    low, high = np.quantile(averages.numpy(), _LEVELS, axis=0).tolist()
    return list(zip(low, high, strict=True))
