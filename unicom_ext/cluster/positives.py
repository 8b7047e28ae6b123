"""The P nearest centroids of each row, exactly: its classes where a loss takes several positives.

Products in float32 find candidates. Where the bound on their error leaves open which of them are
nearest, or in what order, cosines are computed again in double, of more candidates if need be. What
is in memory is a block of cosines, whatever N and k are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.cluster.lloyd import Totals, Watch
from unicom_ext.data.source import Rows, on_device
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.utils.search import unit_rows

BLOCK_BYTES = 64 << 20  # of cosines, and of rows in double
CENTROIDS = 8192  # that a block of rows meets at a time
SPARE = 4  # candidates beyond those that are wanted: what comes next tells whether they are right
MORE = 8  # times as many candidates where they were too few


class Several:
    """Finds the `count` centroids of largest cosine to each row.

    Args:
        centroids: [k, d] float32, finite, any norm, where the search shall work; a zero one has
            cosine 0 with everything.
        count: from 1 to k.

    Memory: a second copy of the centroids, and some `BLOCK_BYTES`.
    """

    def __init__(self, centroids: Tensor, count: int) -> None:
        self._centroids, self.count = centroids, count
        dtype = _product_dtype()
        self._units = torch.empty_like(centroids, dtype=dtype)
        for begin in range(0, len(centroids), CENTROIDS):
            block = unit_rows("centroids", centroids[begin : begin + CENTROIDS], begin)
            self._units[begin : begin + CENTROIDS] = block
        # Both factors are rounded, and so is each step of a sum of d products, all at most 1.
        self._error = (centroids.shape[1] + 8) * torch.finfo(dtype).eps / 2

    @property
    def device(self) -> torch.device:
        return self._centroids.device

    def nearest(self, rows: Tensor, first: Tensor) -> Tensor:
        """Numbers int64 [n, count] of the nearest centroids, nearest first; of equals the lower.

        Args:
            rows: [n, d] floating point, finite and not zero, any norm.
            first: [n] int64, what each row is assigned to. It comes first: another one is not
                nearer, or was not looked at (two-level).

        Cosines are those of double arithmetic. Two that differ by its rounding alone may change
        places on another machine.
        """
        found = rows.new_empty((len(rows), self.count), dtype=torch.int64)
        size = max(1, BLOCK_BYTES // (32 * rows.shape[1]))
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            units = unit_rows("rows", rows[part], begin)
            found[part] = self._nearest(units, first[part], self.count + SPARE)
        return found

    def _nearest(self, units: Tensor, first: Tensor, candidates: int) -> Tensor:
        """Of rows in double, out of so many candidates for each, or of more."""
        candidates = min(candidates, len(self._units))
        size = max(1, BLOCK_BYTES // (4 * min(CENTROIDS, len(self._units)) + 64 * candidates))
        parts = zip(units.split(size), first.split(size), strict=True)
        return torch.cat(
            [self._of_block(*part, candidates) for part in parts]
            or [first.new_empty((0, self.count))]
        )

    def _of_block(self, units: Tensor, first: Tensor, candidates: int) -> Tensor:
        score, index = self._candidates(units, candidates)
        found = _with_first(first, index, self.count)
        # All that is wanted is further than the error from what comes after it?
        close = score[:, :-1] - score[:, 1:] <= 2 * self._error
        left = close[:, : self.count].any(dim=1).nonzero()[:, 0]
        if len(left) == 0:
            return found
        units, first, score = units[left], first[left], score[left]
        cosine, index = self._in_double(units, index[left])
        found[left] = _with_first(first, index, self.count)
        if candidates < len(self._units):
            # One that is no candidate may be as near as the last that is wanted.
            bound = score[:, -1] + 2 * self._error
            unsure = (bound >= cosine[:, self.count - 1]).nonzero()[:, 0]
            if len(unsure):
                again = self._nearest(units[unsure], first[unsure], MORE * candidates)
                found[left[unsure]] = again
        return found

    def _candidates(self, units: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest products of each row, largest first, and of which centroids."""
        rows = units.to(self._units.dtype)
        score = rows.new_empty((len(rows), 0))
        index = torch.empty_like(score, dtype=torch.int64)
        with torch.autocast(rows.device.type, enabled=False):
            for begin in range(0, len(self._units), CENTROIDS):
                block = rows @ self._units[begin : begin + CENTROIDS].T
                best, place = block.topk(min(count, block.shape[1]), dim=1)
                score = torch.cat([score, best], dim=1)
                index = torch.cat([index, place + begin], dim=1)
                score, order = score.topk(min(count, score.shape[1]), dim=1)
                index = index.gather(1, order)
        return score, index

    def _in_double(self, units: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines in double of the candidates [n, c], and these, the nearest first."""
        index = index.sort(dim=1).values  # a stable sort then leaves the lower of equals first
        flat = index.flatten()
        cosine = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
        size = max(1, BLOCK_BYTES // (32 * units.shape[1]))
        for begin in range(0, len(flat), size):
            part = flat[begin : begin + size]
            row = torch.arange(begin, begin + len(part), device=part.device) // index.shape[1]
            other = unit_rows("centroids", self._centroids[part], part)
            # Not a matrix product: that adds up in another order at its edges, and the cosines of
            # equal centroids must be equal.
            cosine[begin : begin + size] = other.mul_(units[row]).sum(dim=1)
        cosine, order = cosine.view(index.shape).sort(dim=1, descending=True, stable=True)
        return cosine, index.gather(1, order)


def write_positives(
    source: Rows,
    several: Several,
    ranks: Ranks,
    watch: Watch,
    labels: LabelFiles,
    numbers: np.ndarray,
    positives: LabelFiles,
) -> Totals:
    """Write the positives of every row of this process; returns the totals of all.

    labels: of the rows. numbers [k]: what these are among the centroids of `several`, -1 for none;
    a row without label has no positives. positives: files that were made already.
    """
    totals = Totals()
    with ranks.together():
        for block in on_device(source.blocks(*ranks.share(source.rows), size=0), several.device):
            stop = block.start + len(block.rows)
            old = labels.read(block.shard, block.start, stop)
            label = torch.from_numpy(np.where(old >= 0, numbers[old], -1)).long()
            good = (label >= 0).nonzero()[:, 0]
            found = torch.full((len(label), positives.columns or 1), -1)
            there = good.to(several.device)
            nearest = several.nearest(block.rows[there], label[good].to(several.device))
            found[good, : several.count] = nearest.cpu()
            positives.write(block.shard, block.start, found.numpy())
            totals.rows += len(label)
            watch(totals)
    with ranks.together():
        if ranks.is_first:
            positives.sync(source.shards)
    return totals.over(ranks)


def _with_first(first: Tensor, index: Tensor, count: int) -> Tensor:
    """[n, count]: first [n], then the others of index [n, c] in their order."""
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    place = place.masked_fill(index == first[:, None], index.shape[1])
    others = index.gather(1, place.argsort(dim=1, stable=True)[:, : count - 1])
    return torch.cat([first[:, None], others], dim=1)


def _product_dtype() -> torch.dtype:
    """float32 where torch multiplies it as such: it can be told to round to TF32 or bf16."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was told in more than one way
        exact = False
    return torch.float32 if exact else torch.float64
