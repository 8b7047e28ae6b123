"""Passes that leave out most products, and find what all products would: see
csrc/cpu/host/pruned_search.h for the bounds.

What a pass knows of each row of this process is kept in files beside the labels: the row along the
leading axes in bytes, and an upper bound of its cosines with all centroids but its own. They hold
28 bytes a row and one for each axis, and are worth nothing to another run, so a resumed one begins
anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike
from torch import Tensor

from unicom_ext.cluster import seeds
from unicom_ext.cluster.engines import Engine, Nearest
from unicom_ext.cluster.nearest import Centroids
from unicom_ext.data.source import Rows
from unicom_ext.distributed.failures import exchange
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.ops import library

LEAST_NORM = 0.5  # kLeastNorm
SLACK = 1e-6  # of what float32 does to a difference of unit vectors
LEAST_PRUNED = 512  # clusters; with fewer, products are not what a pass costs
MOST_DIMENSIONS = 4096  # of which axes are found in seconds
SAMPLE = 4096  # rows whose axes are found
TRIED = 512  # of these, by which the number of axes is chosen
BYTES_TRIED = (32, 48, 64, 96, 128, 192, 256, 384, 512)
REST_BYTES = 4  # of a row's, beside its coordinates
# What a centroid costs that is not passed over, in products of bytes.
COST_OF_MARK, COST_OF_DECISION, COST_OF_PANEL = 1500, 15000, 12
# A bound as far below a row's cosine as most centroids will move until the next pass lets it pass
# over these then, but more of them have to be multiplied now.
MARGIN_OF_MOVEMENT, LEAST_MARGIN, LARGEST_MARGIN = 1.3, 0.002, 0.02


@dataclass
class Projection:
    """What rows and centroids are reduced to: `Projection` of csrc/cpu/host/pruned_search.h."""

    means: Tensor  # fp32 [2, d], of the unit rows and of the centroids
    axes: Tensor | None  # fp32 [m, d]; None for all dimensions, as they are
    range: float  # of the coordinates
    rest: float  # a usual norm of what lies outside

    def __post_init__(self) -> None:
        # Of the CPU capability now in use: rows in other bytes would be taken for these.
        self.largest = int(library.ops.largest_byte(self.means))

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, float, float, int]:
        return (
            self.means,
            self.axes,
            max(1e-4, self.range / self.largest),
            max(1e-4, self.rest / (self.largest // 2)),
            self.largest,
        )

    def rows(self, rows: Tensor) -> Tensor:
        """What is kept of rows fp32 [n, d]: uint8 [n, bytes]."""
        return library.run(library.ops.project_rows, rows, *self.arguments)

    def order(self, centroids: Tensor, order: Tensor, moved: Tensor | None) -> Tensor:
        arguments = self.arguments
        return library.run(library.ops.order_centroids, centroids, order, moved, *arguments)

    @property
    def row_bytes(self) -> int:
        return self.rows(self.means[:0]).shape[1]

    @property
    def products(self) -> int:
        """Of a row and a centroid, to see whether it may be near."""
        _, dim = self.means.shape
        return dim if self.axes is None else len(self.axes) + REST_BYTES


def choose_projection(sample: Tensor, centroids: Tensor) -> Projection:
    """The one whose search costs least on some of the unit rows fp32 [n, d]."""
    axes = principal_axes(sample)
    tried = sample[:TRIED]
    guess, _ = Centroids(centroids).nearest(tried)
    order = torch.arange(len(centroids))
    dim = sample.shape[1]
    counts = [size - REST_BYTES for size in BYTES_TRIED if size < dim / 2]
    choices = projections_of(sample, centroids, axes, [*counts, None])

    def cost(projection: Projection) -> float:
        packed = projection.order(centroids, order, None)
        rows = projection.rows(tried)
        *_, work = library.run(
            library.ops.pruned_search, tried, rows, guess, None, centroids, packed,
            *projection.arguments, 0.0,
        )  # fmt: skip
        screened, multiplied, decided = work.tolist()
        of_screen = screened * (projection.products + COST_OF_PANEL)
        return of_screen + multiplied * COST_OF_MARK + decided * COST_OF_DECISION

    return min(choices, key=cost)


def principal_axes(sample: Tensor) -> Tensor:
    """Of rows [n, d]: float64 [d, d], those of the largest variance first."""
    away = (sample - sample.mean(0)).double()
    return torch.linalg.eigh(away.T @ away)[1].T.flip(0)


def projections_of(
    sample: Tensor, centroids: Tensor, axes: Tensor, counts: Sequence[int | None]
) -> list[Projection]:
    """Along so many leading ones of the orthonormal axes [d, d] each, or with None all dimensions
    as they are; with steps that suit the unit rows of a sample."""
    means = torch.stack([sample.mean(0), centroids.mean(0)])
    away, axes = sample - means[0], axes.float()
    # Of norm 1 at most, any of them, whatever rounding has done: a norm is not above this one.
    norm = torch.linalg.matrix_norm(axes.double() @ axes.double().T, torch.inf).sqrt().item()
    axes = axes / (norm * (1 + SLACK))
    along = away @ axes.T
    beyond = away.double().square().sum(1)[:, None] - along.double().square().cumsum(1)
    found = []
    for count in counts:
        of = away if count is None else along[:, :count]
        outermost = of.abs().amax(1).quantile(0.99)
        rest = 0.0 if count is None else float(beyond[:, count - 1].clamp(min=0).median().sqrt())
        chosen = None if count is None else axes[:count].contiguous()
        found.append(Projection(means, chosen, float(outermost), rest))
    return found


class PrunedSearch:
    """The search of passes over the same rows, from the second pass on.

    Args:
        directory: for its files, made if need be; each rank has its own.
        source: the rows; this process has its share of them.
        ranks: that work together.
        engine: what searches where there is no room for the files.
        seed: of the sample by which axes are chosen.

    Attributes:
        failure: what went wrong with the files, if anything has.
        work: int64 [3], pairs of a row and a centroid in the last pass: those looked at, those of
            them that were multiplied, those of these that were decided in double.
    """

    def __init__(
        self, directory: Path, source: Rows, ranks: Ranks, engine: Engine, seed: int
    ) -> None:
        self._source, self._ranks, self.engine, self._seed = source, ranks, engine, seed
        self.rows, self.bounds = directory / "rows", directory / "bounds"
        self.projection: Projection | None = None
        self._before: Tensor | None = None  # the centroids of the last pass
        self.failure: OSError | None = None
        self.work = torch.zeros(3, dtype=torch.int64)

    def begin(self, centroids: Tensor) -> Nearest:
        """What a pass searches with, given centroids fp32 [k, d], unit vectors. All ranks call it.

        The rows of this process must come once and in their order, each with what the last pass has
        found as its guess.
        """
        self.work.zero_()
        if self.projection is None:
            self.projection = self._choose(centroids)
        try:
            if self._before is None:
                self.rows.parent.mkdir(parents=True, exist_ok=True)
                for path in (self.rows, self.bounds):
                    path.write_bytes(b"")
            if self.failure is None:
                return _Pass(self, self.projection, centroids, self._before)
        except OSError as error:
            self.failure = error
        finally:
            self._before = centroids
        return self.engine(centroids)

    def products(self) -> float:
        """Products of the last pass on all ranks, as a share of those of all rows and centroids."""
        if self.projection is None or self._before is None:
            return 1.0
        k, dim = self._before.shape
        begin, end = self._ranks.share(self._source.rows)
        if self.failure is not None:
            done = float(k * dim * (end - begin))
        else:
            screened, multiplied, decided = self.work.tolist()
            done = float(screened * self.projection.products + (multiplied + decided) * dim)
        total = self._ranks.sum(torch.tensor(done, dtype=torch.float64)).item()
        return total / (k * dim * self._source.rows)

    def failures(self) -> list[str]:
        """What went wrong with the files of any rank. All ranks call it."""
        own = None if self.failure is None else str(self.failure)
        return [words for _, words in exchange(own, None, self._ranks.group) if words is not None]

    def _choose(self, centroids: Tensor) -> Projection:
        """Of the first rank, for all."""
        chosen = None
        facts = torch.zeros(3, dtype=torch.float64)
        with self._ranks.together():
            if self._ranks.is_first:
                rng = np.random.default_rng(self._seed)
                chosen = choose_projection(seeds.unit_sample(self._source, SAMPLE, rng), centroids)
                count = 0 if chosen.axes is None else len(chosen.axes)
                facts = torch.tensor([count, chosen.range, chosen.rest], dtype=torch.float64)
        facts = self._ranks.broadcast(facts)
        count = int(facts[0])
        vectors = torch.empty(2 + count, centroids.shape[1])
        if chosen is not None:
            vectors[:2] = chosen.means
            if chosen.axes is not None:
                vectors[2:] = chosen.axes
        vectors = self._ranks.broadcast(vectors)
        axes = vectors[2:].contiguous() if count else None
        return Projection(vectors[:2].contiguous(), axes, *facts[1:].tolist())


class _Pass:
    """One pass of a `PrunedSearch`."""

    device = torch.device("cpu")

    def __init__(
        self,
        search: PrunedSearch,
        projection: Projection,
        centroids: Tensor,
        before: Tensor | None,
    ) -> None:
        self._search, self._projection, self._centroids = search, projection, centroids
        self._goes_on = before is not None
        # Without buffers: what cannot be written is known at once.
        self._rows, self._bounds = (FileIO(path, "r+b") for path in (search.rows, search.bounds))
        self._instead: Nearest | None = None
        self._margin = 0.0
        order, moved = torch.arange(len(centroids)), None
        if before is not None:
            moved, order = movement(before, centroids, projection.means[0]).sort(
                descending=True, stable=True
            )
            self._margin = margin_of(moved)
        self._packed = projection.order(centroids, order, moved)

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._instead is None:
            try:
                return self._pruned(rows, guess)
            except OSError as error:
                # Nothing is known of these rows, nor of where the files stand for the next ones.
                self._search.failure = error
                self._instead = self._search.engine(self._centroids)
        return self._instead.nearest(rows, guess)

    def _pruned(self, rows: Tensor, guess: Tensor | None) -> tuple[Tensor, Tensor]:
        bounds = None
        if self._goes_on:
            projected = _read(self._rows, np.uint8, len(rows), self._projection.row_bytes)
            bounds = _read(self._bounds, np.float32, len(rows))
            self._bounds.seek(-bounds.nbytes, os.SEEK_CUR)
        else:
            projected = self._projection.rows(rows)
            _write(self._rows, projected)
        index, score, bounds, work = library.run(
            library.ops.pruned_search, rows, projected, guess, bounds, self._centroids,
            self._packed, *self._projection.arguments, self._margin,
        )  # fmt: skip
        _write(self._bounds, bounds)
        self._search.work += work
        return index, score


def _read(file: FileIO, dtype: DTypeLike, *shape: int) -> Tensor:
    array: np.ndarray = np.empty(shape, dtype)
    if file.readinto(array.data) != array.nbytes:
        raise OSError(f"{file.name} is cut off")
    return torch.from_numpy(array)


def _write(file: FileIO, values: Tensor) -> None:
    left = values.numpy().reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def movement(before: Tensor, now: Tensor, row_mean: Tensor) -> Tensor:
    """What may have been added to the cosines of each centroid [k, d] with any row: fp32 [k], a
    bound as a share of max(LEAST_NORM, |row - mean|)."""
    difference = F.normalize(now.double()) - F.normalize(before.double())
    along = (difference @ row_mean.double()).clamp(min=0)
    moved = difference.norm(dim=1) + along / LEAST_NORM + SLACK
    return torch.nextafter(moved.float(), torch.tensor(torch.inf))


def margin_of(moved: Tensor) -> float:
    """How far below a row's cosine its bound should be, that it lasts for another pass; 0 while
    centroids move so far that it will not."""
    margin = max(LEAST_MARGIN, MARGIN_OF_MOVEMENT * float(moved.median()))
    return margin if margin < LARGEST_MARGIN else 0.0
