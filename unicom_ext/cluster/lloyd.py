"""One pass over the rows: assign each to its nearest centroid, sum, move the centroids.

Spherical k-means (Dhillon, Modha, Machine Learning 42, 2001): rows and centroids are unit vectors,
and the objective is the mean cosine of a row to its centroid, which no pass lowers.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster.engines import Engine, Nearest
from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.cluster.sums import UnitSums, directions
from unicom_ext.data.source import Block, Rows, Source, on_device
from unicom_ext.distributed.ranks import Ranks

# Cosines count in multiples of this, what float32 has at 1: sums of 2**29 of them are exact in
# double, so that neither the objective nor what is decided by it depends on blocks and ranks.
SCORE_UNIT = 2.0**-24
SPLIT = 0.01  # how far the halves of a split cluster are moved apart, as a share of the norm


@dataclass
class Totals:
    """What a pass counts, in this process and then in all."""

    rows: int = 0  # assigned
    zero: int = 0
    not_finite: int = 0
    changed: int = 0
    compared: int = 0  # rows whose label before is known
    score: float = 0.0  # sum of the cosines

    @property
    def objective(self) -> float:
        return self.score / max(self.rows, 1)

    @property
    def seen(self) -> int:
        return self.rows + self.zero + self.not_finite

    @property
    def changed_fraction(self) -> float | None:
        return self.changed / self.compared if self.compared else None

    def add(self, index: Tensor, score: Tensor) -> None:
        good = index >= 0
        finite = score.isfinite()
        self.rows += int(good.sum())
        self.zero += int((finite & ~good).sum())
        self.not_finite += int((~finite).sum())
        self.score += float(score[good].sum(dtype=torch.float64))

    def compare(self, before: np.ndarray, now: np.ndarray) -> None:
        self.changed += int(np.count_nonzero(before != now))
        self.compared += len(now)

    def over(self, ranks: Ranks) -> Totals:
        """The sum over all processes."""
        counts = [self.rows, self.zero, self.not_finite, self.changed, self.compared]
        total = ranks.sum(torch.tensor([*map(float, counts), self.score], dtype=torch.float64))
        *whole, score = total.tolist()
        rows, zero, not_finite, changed, compared = map(int, whole)
        return Totals(rows, zero, not_finite, changed, compared, score)


Watch = Callable[[Totals], object]  # called after each block with the totals so far


def assign(
    source: Rows,
    centroids: Nearest,
    ranks: Ranks,
    watch: Watch,
    *,
    before: LabelFiles | None = None,
    labels: LabelFiles | None = None,
    part: Callable[[Block], Block] | None = None,
    block_rows: int = 0,
    visit: Callable[[Block, Tensor, Tensor, Tensor | None], object],
) -> Totals:
    """The nearest centroid of every row of this process; returns the totals of all.

    labels  where to write them
    before  the labels to compare with, and what a row's label is guessed to be
    part    takes some of the rows of a block
    visit   called with (block, index, score, index before) of each block, all on the device of the
            centroids; the last is None without `before`
    """
    totals = Totals()
    with ranks.together():
        blocks = source.blocks(*ranks.share(source.rows), size=block_rows)
        if part is not None:
            blocks = map(part, blocks)
        for block in on_device(blocks, centroids.device):
            last = guess = None
            if before is not None:
                last = before.read(block.shard, block.start, block.start + len(block.rows))
                guess = torch.from_numpy(last.astype(np.int64)).to(centroids.device)
            index, score = centroids.nearest(block.rows, guess)
            score = (score / SCORE_UNIT).round() * SCORE_UNIT
            visit(block, index, score, guess)
            index, score = index.cpu(), score.cpu()
            totals.add(index, score)
            now = index.numpy().astype(np.int32)
            if last is not None:
                totals.compare(last, now)
            if labels is not None:
                labels.write(block.shard, block.start, now)
            watch(totals)
        if labels is not None and ranks.is_first:
            labels.sync(source.shards)
    return totals.over(ranks)


def lloyd_pass(
    source: Rows,
    centroids: Tensor,
    engine: Engine,
    ranks: Ranks,
    watch: Watch,
    seed: int,
    *,
    sums: UnitSums | None = None,
    first: Sequence[int] = (0,),
    **how: Any,
) -> tuple[Tensor, int, Totals, UnitSums]:
    """Returns the centroids after the pass, how many clusters had been empty, its totals, and the
    sums of this process's rows.

    seed: of the directions in which clusters are split. sums: of the pass that gave the labels
    `before`; only rows that change their cluster are added then. first: where groups of centroids
    begin that rows do not change between; an empty cluster gets half of one of its group. how:
    `before`, `labels`, `part`, `block_rows` of assign.
    """
    nearest = engine(centroids)
    kept = sums or UnitSums(*centroids.shape, rows=source.rows, device=nearest.device)
    totals = assign(
        source,
        nearest,
        ranks,
        watch,
        visit=lambda block, index, score, before: kept.add(
            block.rows, index, before if sums else None
        ),
        **how,
    )
    sender = ranks.sends_from(nearest.device)
    counts = ranks.sum(kept.counts.to(sender, copy=True)).cpu()
    moved = unit_sums(kept.values.to(sender), ranks).cpu()
    empty = 0
    for begin, end in itertools.pairwise([*first, len(centroids)]):
        own = slice(begin, end)
        moved[own], few = _replace_empty(moved[own], centroids[own], counts[own], seed + begin)
        empty += few
    return moved, empty, totals, kept


def unit_sums(sums: Tensor, ranks: Ranks) -> Tensor:
    """The sums [k, d] int64 over all ranks as unit vectors [k, d] float32, zero where the sum is
    zero.

    Each rank gets the sums of its part of the clusters, divides, and sends float32 to the others:
    half of what an all-reduce of the sums would send.
    """
    k, dim = sums.shape
    missing = -k % ranks.world_size
    if missing:
        sums = torch.cat([sums, sums.new_zeros(missing, dim)])
    units = ranks.gather(directions(ranks.sum_scatter(sums)))
    return units[:k].clone() if missing else units


def minibatch_pass(
    source: Source,
    centroids: Tensor,
    sums: UnitSums,
    engine: Engine,
    ranks: Ranks,
    watch: Watch,
    seed: int,
    batch_rows: int,
) -> tuple[Tensor, int, Totals]:
    """Centroids move after each batch, to the mean of all rows they were ever nearest to.

    That is a rate of 1 / count for each centroid (Sculley, WWW 2010). The batches come in random
    order. sums, on the CPU, run on from pass to pass, in place.
    """
    totals = Totals()
    rng = np.random.default_rng([seed, ranks.rank])
    size = max(1, batch_rows // ranks.world_size)
    blocks = None
    while True:
        with ranks.together():
            nearest = engine(centroids)
            if blocks is None:
                blocks = source.blocks(*ranks.share(source.rows), size=size, shuffle=rng)
                blocks = on_device(blocks, nearest.device)
            new = UnitSums(*centroids.shape, rows=sums.rows, device=nearest.device)
            block = next(blocks, None)
            if block is not None:
                index, score = nearest.nearest(block.rows)
                new.add(block.rows, index)
                totals.add(index.cpu(), score.cpu())
                watch(totals)
        if not int(ranks.sum(torch.tensor(block is not None, dtype=torch.int64))):
            break
        sender = ranks.sends_from(nearest.device)
        sums.values += ranks.sum(new.values.to(sender)).cpu()
        sums.counts += ranks.sum(new.counts.to(sender)).cpu()
        moved = sums.directions()
        centroids = torch.where((moved == 0).all(dim=1, keepdim=True), centroids, moved)
    centroids, empty = _replace_empty(centroids, centroids, sums.counts, seed)
    return centroids, empty, totals.over(ranks)


def _replace_empty(moved: Tensor, before: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, int]:
    """Each empty cluster gets half of what is then the largest one."""
    lost = (counts == 0) | (moved == 0).all(dim=1)
    empty = lost.nonzero()[:, 0].tolist()
    if not empty:
        return moved, 0
    moved = torch.where(lost[:, None], before, moved)
    # Largest first; the lower number among equals.
    heap = [(-count, j) for j, count in enumerate(counts.tolist()) if not lost[j]]
    heapq.heapify(heap)
    generator = torch.Generator().manual_seed(seed)
    for j in empty:
        if not heap or -heap[0][0] < 2:
            break
        count, largest = heapq.heappop(heap)
        aside = torch.randn(moved.shape[1], generator=generator)
        aside *= SPLIT / aside.norm()
        moved[j] = torch.nn.functional.normalize(moved[largest] + aside, dim=0)
        moved[largest] = torch.nn.functional.normalize(moved[largest] - aside, dim=0)
        for half, place in ((-count // 2, j), (-count - -count // 2, largest)):
            heapq.heappush(heap, (-half, place))
    return moved, len(empty)


def sampled(fraction: float, seed: int) -> Callable[[Block], Block]:
    """A random part of each block: whether a row is taken depends on its number and the seed only,
    not on blocks and processes."""

    def part(block: Block) -> Block:
        first = np.uint64(block.shard.first + block.start)
        x = np.arange(len(block.rows), dtype=np.uint64) + first
        x ^= np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)  # SplitMix64
        taken = torch.from_numpy(x < np.uint64(min(fraction, 1 - 2**-53) * 2**64))
        return block._replace(rows=block.rows[taken])

    return part


def converged(objectives: list[float], tolerance: float) -> bool:
    """The last of the objectives is less than `tolerance` (relative) better than the one before."""
    if tolerance == 0 or len(objectives) < 2:
        return False
    before, now = objectives[-2:]
    return now - before < tolerance * abs(before)
