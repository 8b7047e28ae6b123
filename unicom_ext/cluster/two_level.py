"""Very many clusters in two steps: coarse cells from a sample, then fine clusters inside each.

A flat pass costs N k d multiply-adds; in c cells this costs N (c + k / c) d, and from the second
fine pass on N k / c d: a row's label says which cell it is in. Fine passes are Lloyd passes whose
search is `TwoLevel`; they stream the rows like all others, and nothing is grouped or kept.

A row is only ever compared with the fine centroids of its own cell, so some rows miss their nearest
one: `loss_of_objective` measures what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster import seeds
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.cluster.engines import Engine
from unicom_ext.cluster.lloyd import Totals, converged, lloyd_pass
from unicom_ext.data.source import BLOCK_BYTES, Block, Rows, Shard, Source
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.utils.arrays import SourceError

MAX_BLOCK_BYTES = 128 << 20
ROWS_PER_SEARCH = 512  # of a cell in a block: with fewer, a call costs more than its products
SAMPLE_PER_CELL = 1024  # rows for each coarse centroid
SAMPLE_PER_CLUSTER = 16  # rows for each fine centroid, of which it is drawn
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


class Start(NamedTuple):
    """Where fine passes begin."""

    coarse: Tensor  # [cells, d]
    counts: Tensor  # int64 [cells], the fine centroids of each; cells may have none
    fine: Tensor  # [k, d], ordered by cell
    totals: Totals  # of the last coarse pass


def start(
    source: Rows,
    config: ClusterConfig,
    coarse: Tensor | None,
    rng: np.random.Generator,
    engine: Engine,
) -> Start:
    """Coarse clusters of a sample, and fine centroids drawn from what each has of it.

    coarse: the initial ones, unit vectors fp32 [cells, d]; None draws them as config says.
    Raises SourceError where there are fewer good rows than clusters.
    """
    kind, k = config.drawn_init, config.clusters
    sample = seeds.sample(source, k, SAMPLE_PER_CLUSTER, rng)
    order = torch.from_numpy(rng.permutation(len(sample)))
    some = InMemory(sample[order[: SAMPLE_PER_CELL * config.num_coarse]])
    if coarse is None:
        coarse = seeds.draw(kind, some, config.num_coarse, rng, engine)
    objectives: list[float] = []
    while len(objectives) < config.passes and not converged(objectives, config.tolerance):
        coarse, _, totals, _ = lloyd_pass(
            some, coarse, engine, Ranks(None), lambda totals: None, config.seed + len(objectives)
        )
        objectives.append(totals.objective)
    nearest = engine(coarse)
    cell = nearest.nearest(sample.to(nearest.device))[0].cpu()
    sizes = cell.bincount(minlength=len(coarse))
    counts = torch.from_numpy(share_out(k, sizes.numpy()))
    fine = [
        _draw_in_cell(kind, sample[own], count, rng, engine)
        for own, count in zip(
            cell.argsort(stable=True).split(sizes.tolist()), counts.tolist(), strict=True
        )
        if count
    ]
    return Start(coarse, counts, torch.cat(fine), totals)


def _draw_in_cell(
    kind: str, rows: Tensor, k: int, rng: np.random.Generator, engine: Engine
) -> Tensor:
    try:
        return seeds.choose(kind, rows, k, rng, engine)
    except SourceError:  # fewer different rows than clusters
        return seeds.choose("random", rows, k, rng, engine)


class TwoLevel:
    """Fine centroids [k, d] ordered by cell, of which first [cells + 1] says where each begins."""

    def __init__(self, coarse: Tensor, fine: Tensor, first: Tensor, engine: Engine) -> None:
        self._first = first
        self._coarse = engine(coarse)
        self._cells = [engine(own) for own in fine.split(first.diff().tolist())]

    @property
    def device(self) -> torch.device:
        return self._coarse.device

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest centroid of the cell whose coarse centroid is nearest.

        guess: what an earlier search of these rows has found, with the same coarse centroids and
        cells; -1 for rows of which nothing is known.
        """
        score = torch.zeros(len(rows), device=self.device)
        if guess is None:
            guess = torch.full((len(rows),), -1, device=self.device)
        first = self._first.to(self.device)
        cell = torch.bucketize(guess, first, right=True) - 1
        unknown = (cell < 0).nonzero()[:, 0]
        if len(unknown) == len(rows):
            cell, score = self._coarse.nearest(rows)
        elif len(unknown):
            cell[unknown], score[unknown] = self._coarse.nearest(rows[unknown])
        sizes = (cell + 1).bincount(minlength=len(self._cells) + 1).tolist()
        # Rows without direction, whose cell is -1, come first.
        _, *of_cells = cell.argsort(stable=True).split(sizes)
        index = torch.full_like(cell, -1)
        for own, nearest, begin in zip(of_cells, self._cells, self._first.tolist(), strict=False):
            if len(own):
                known = (guess[own] - begin).clamp_(min=-1)
                # Not a copy of all rows by cell: these few are still in the cache when searched.
                place, score[own] = nearest.nearest(rows.index_select(0, own), known)
                index[own] = place + begin
        return index, score


def block_rows(cells: int, dim: int) -> int:
    """Rows of a block that each cell gets some of."""
    wanted = max(ROWS_PER_SEARCH * cells, BLOCK_BYTES // (4 * dim))
    return max(1, min(wanted, MAX_BLOCK_BYTES // (4 * dim)))


def loss_of_objective(
    source: Source, two_level: TwoLevel, fine: Tensor, engine: Engine, rng: np.random.Generator
) -> dict[str, float]:
    """Mean cosine of a sample of rows to the centroid found in two steps, and to the nearest."""
    sample = seeds.unit_sample(source, MEASURED_ROWS, rng)
    there = sample.to(two_level.device)
    found = two_level.nearest(there)[1].cpu().double().mean().item()
    best = engine(fine).nearest(there)[1].cpu().double().mean().item()
    return {"rows": len(sample), "two_level": found, "flat": best, "loss": 1 - found / best}
