"""Very many clusters in two steps: coarse ones over all rows, then fine ones inside each.

A flat pass costs N k d multiply-adds; with sqrt(k) coarse clusters this costs about 2 N sqrt(k) d.
A row is only ever compared with the fine centroids of its own coarse cell, so some rows miss their
nearest one: `loss_of_objective` measures what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster import seeds
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.cluster.engines import Engine
from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.cluster.lloyd import converged, lloyd_pass
from unicom_ext.data.source import Block, Shard, Source
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.utils.arrays import SourceError

CELL_BYTES = 512 << 20  # of rows in memory at a time
BLOCK_BYTES = 128 << 20  # when labelling: many rows, so that each cell gets some
MEASURED_ROWS = 16384


class InMemory:
    """Rows that are in memory, to be clustered like those on disk."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.rows, self.dim = values.shape
        self.shards = [Shard("memory", None, None, 0)]

    def take(self, rows: np.ndarray) -> Tensor:
        return self._values[torch.from_numpy(rows)]

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Block]:
        yield Block(self.shards[0], start, self._values[start:stop])


def share_out(k: int, sizes: np.ndarray) -> np.ndarray:
    """How many of k fine clusters each coarse cell gets: in proportion to its rows, at least one
    where there are rows, never more than there are rows. int64 [cells], summing to k.

    k is at least the number of cells with rows. Raises SourceError if it is more than the rows.
    """
    if k > sizes.sum():
        raise SourceError(
            f"clusters: got {k}, but only {int(sizes.sum())} rows are finite and not zero"
        )
    shares = np.minimum(np.maximum(k * sizes / sizes.sum(), sizes > 0), sizes)
    counts = np.floor(shares).astype(np.int64)
    # What rounding leaves goes, or comes from, where it is the smallest share of a cluster.
    while (missing := k - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = counts < sizes if step > 0 else counts > 1
        order = np.argsort(-(step * (shares - counts)), kind="stable")
        order = order[room[order]][: abs(missing)]
        counts[order] += step
    return counts


class TwoLevel:
    """Centroids [k, d], ordered by coarse cell; `first` [cells + 1] says where each cell begins."""

    def __init__(self, coarse: Tensor, fine: Tensor, first: Tensor, engine: Engine) -> None:
        self._first = first
        # A cell without fine centroids must not be chosen.
        self._kept = (first.diff() > 0).nonzero()[:, 0]
        self._coarse = engine(coarse[self._kept])
        self._cells = [engine(fine[first[c] : first[c + 1]]) for c in self._kept.tolist()]

    @property
    def device(self) -> torch.device:
        return self._coarse.device

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest centroid of the cell whose coarse centroid is nearest. Ignores guesses."""
        cell, score = self._coarse.nearest(rows)
        index = torch.full_like(cell, -1)
        order = cell.argsort(stable=True)
        sizes = (cell + 1).bincount(minlength=len(self._cells) + 1).tolist()
        at = sizes[0]  # rows without direction come first
        for c, size in enumerate(sizes[1:]):
            if size:
                own = order[at : at + size]
                place, score[own] = self._cells[c].nearest(rows[own])
                index[own] = place + self._first[self._kept[c]]
                at += size
        return index, score


def loss_of_objective(
    source: Source, two_level: TwoLevel, fine: Tensor, engine: Engine, rng: np.random.Generator
) -> dict[str, float]:
    """Mean cosine of a sample of rows to the centroid found in two steps, and to the nearest."""
    sample = seeds.unit_sample(source, MEASURED_ROWS, rng)
    there = sample.to(two_level.device)
    found = two_level.nearest(there)[1].cpu().double().mean().item()
    best = engine(fine).nearest(there)[1].cpu().double().mean().item()
    return {"rows": len(sample), "two_level": found, "flat": best, "loss": 1 - found / best}


def fine_stages(first: np.ndarray, sizes: np.ndarray, dim: int, parts: int) -> list[list[range]]:
    """Cells in runs whose rows fit in memory; the runs in about `parts` stages."""
    limit = CELL_BYTES // (4 * dim)
    runs, begin, total = [], 0, 0
    for cell, size in enumerate(sizes.tolist()):
        if total and total + size > limit:
            runs.append(range(begin, cell))
            begin, total = cell, 0
        total += size
    runs.append(range(begin, len(sizes)))
    stage = -(-len(runs) // parts)
    return [runs[i : i + stage] for i in range(0, len(runs), stage)]


def cluster_runs(
    source: Source,
    labels: LabelFiles,
    runs: list[range],
    first: np.ndarray,
    config: ClusterConfig,
    engine: Engine,
    ranks: Ranks,
    watch: Callable[[int], object],
) -> Tensor:
    """Fine centroids of a stage, fp32 [n, d], where first[runs[0].start] is the number of the
    first; each process finds those of some runs.

    labels: the coarse cell of every row. watch: called with the rows of each cell that is done.
    """
    begin, end = int(first[runs[0].start]), int(first[runs[-1].stop])
    fine = torch.zeros(end - begin, source.dim)
    with ranks.together():
        for cells in runs[ranks.rank :: ranks.world_size]:
            fine[first[cells.start] - begin : first[cells.stop] - begin] = _cluster_run(
                source, labels, cells, first, config, engine, watch
            )
    return ranks.sum(fine)


def _cluster_run(
    source: Source,
    labels: LabelFiles,
    cells: range,
    first: np.ndarray,
    config: ClusterConfig,
    engine: Engine,
    watch: Callable[[int], object],
) -> Tensor:
    """Fine centroids of a run of cells, fp32 [first[cells.stop] - first[cells.start], d].

    A cell that does not fit in memory is sampled.
    """
    rows, owner = _rows_of(labels, source, cells)
    limit = CELL_BYTES // (4 * source.dim)
    rng = np.random.default_rng([config.seed, 3, cells.start])
    if len(rows) > limit:
        kept = np.sort(rng.choice(len(rows), size=limit, replace=False))
        rows, owner = rows[kept], owner[kept]
    values = source.take(rows)
    fine = []
    for cell in cells:
        k = int(first[cell + 1] - first[cell])
        if k:
            fine.append(_cluster_cell(values[torch.from_numpy(owner == cell)], k, config, engine))
        watch(int((owner == cell).sum()))
    return torch.cat(fine) if fine else torch.empty(0, source.dim)


def _cluster_cell(values: Tensor, k: int, config: ClusterConfig, engine: Engine) -> Tensor:
    rng = np.random.default_rng([config.seed, 4, len(values), k])
    memory, alone = InMemory(values), Ranks(None)
    try:
        centroids = seeds.draw("kmeans++", memory, k, rng, engine)
    except SourceError:  # fewer different rows than clusters
        centroids = seeds.draw("random", memory, k, rng, engine)
    objectives: list[float] = []
    for number in range(config.passes):
        centroids, _, totals, _ = lloyd_pass(
            memory, centroids, engine, alone, lambda totals: None, seed=config.seed + number
        )
        objectives.append(totals.objective)
        if converged(objectives, config.tolerance):
            break
    return centroids


def _rows_of(labels: LabelFiles, source: Source, cells: range) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows in the cells, increasing, and the cell of each."""
    rows, owner = [], []
    for shard in source.shards:
        for start in range(0, shard.rows, 1 << 22):
            cell = labels.read(shard, start, min(start + (1 << 22), shard.rows))
            inside = np.flatnonzero((cell >= cells.start) & (cell < cells.stop))
            rows.append(inside + (shard.first + start))
            owner.append(cell[inside])
    return np.concatenate(rows), np.concatenate(owner)
