"""The search that leaves out most products, against the one that computes all of them."""

from __future__ import annotations

import errno
import math
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.backends import EVERY_SET
from support.clusters import QUIET, config, cosines, gaussian
from torch import Tensor

import unicom_ext
from unicom_ext.cluster import Centroids, cluster, pictures, pruning
from unicom_ext.cluster.pruning import (
    LEAST_NORM,
    LEAST_PRUNED,
    Projection,
    PrunedSearch,
    choose_projection,
    movement,
    principal_axes,
    projections_of,
)
from unicom_ext.cluster.two_level import InMemory
from unicom_ext.data import source
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.ops import library

CPU_ONLY = True  # as the search is


def along_axes(sample: Tensor, centroids: Tensor, count: int) -> Projection:
    """Along so many principal axes, all dimensions as they are where that is all of them."""
    whole = count == sample.shape[1]
    (found,) = projections_of(sample, centroids, principal_axes(sample), [None if whole else count])
    return found


class Passes:
    """Passes over the same rows. What each finds is what all products find, and no cosine is above
    the bound that is kept of it."""

    def __init__(self, rows: Tensor, projection: Projection) -> None:
        self.rows, self.projection = rows, projection
        self.projected = projection.rows(rows)
        self.bound: Tensor | None = None
        self.before = torch.empty(0)
        self.work = [0, 0, 0]  # pairs that were screened, multiplied, decided

    def search(self, centroids: Tensor, guess: Tensor, margin: float = 0.0) -> Tensor:
        order, moved = torch.arange(len(centroids)), None
        if self.bound is not None:
            moved, order = movement(self.before, centroids, self.projection.means[0]).sort(
                descending=True, stable=True
            )
        index, score, self.bound, work = library.ops.pruned_search(
            self.rows, self.projected, guess, self.bound, centroids,
            self.projection.order(centroids, order, moved), *self.projection.arguments, margin,
        )  # fmt: skip
        self.before, self.work = centroids, work.tolist()
        right, right_score = Centroids(centroids).nearest(self.rows)
        assert torch.equal(index, right)
        assert torch.equal(bits(score), bits(right_score))
        good = index >= 0
        others = cosines(self.rows[good], centroids)
        others.scatter_(1, index[good][:, None], -math.inf)
        assert (self.bound[good] >= others.max(dim=1).values).all()
        return index


def bits(score: Tensor) -> Tensor:
    return score.nan_to_num(7).view(torch.int32)


def plain(dim: int, *, axes: Tensor | None = None, range: float = 1.0, rest: float = 0.5):
    return Projection(torch.zeros(2, dim), axes, range, rest)


# ---- any rows, any centroids ---------------------------------------------------------------------

KINDS = ("cone", "isotropic", "close", "lattice", "outliers", "norms")
MOVES = ("stay", "little", "some", "far", "split", "swap")


def make_rows(kind: str, n: int, d: int, seed: int) -> Tensor:
    rows = gaussian(n, d, seed)
    if kind == "lattice":  # equal rows, and equal cosines
        return rows.sign() * (rows.abs() > 0.7)
    if kind == "isotropic":
        return rows
    centre = gaussian(1, d, seed + 1)
    if kind == "close":
        return centre + 1e-4 * rows
    rows = centre + rows * torch.arange(1, d + 1) ** -0.7
    if kind == "outliers":
        rows[::5] = -rows[::5] - 3 * centre
    if kind == "norms":
        rows *= torch.tensor([1e-38, 1e-30, 1e-15, 1, 1e30, 1e38])[torch.arange(n) % 6, None]
    return rows


def make_centroids(rows: Tensor, k: int, seed: int) -> Tensor:
    """Some are rows, some lie near rows, some are equal."""
    generator = torch.Generator().manual_seed(seed)
    chosen = F.normalize(rows.double(), eps=1e-300).float().nan_to_num(1.0)
    centroids = chosen[torch.randint(len(rows), (k,), generator=generator)]
    aside = 0.1 * torch.randn(centroids.shape, generator=generator) / rows.shape[1] ** 0.5
    centroids[k // 2 :] += aside[k // 2 :]
    return centroids


def move(centroids: Tensor, how: str, seed: int) -> Tensor:
    k, d = centroids.shape
    generator = torch.Generator().manual_seed(seed)
    if how == "swap":
        return centroids[torch.randperm(k, generator=generator)]
    if how == "split":  # as an empty cluster gets half of another one
        which = torch.randint(k, (2, 1 + k // 20), generator=generator)
        aside = 0.01 * F.normalize(torch.randn(which.shape[1], d, generator=generator))
        moved = centroids.clone()
        moved[which[1]] = centroids[which[0]] + aside
        moved[which[0]] = centroids[which[0]] - aside
        return moved
    size = {"stay": 0, "little": 1e-5, "some": 1e-3, "far": 0.2}[how]
    which = torch.rand(k, 1, generator=generator) < 0.7
    return F.normalize(centroids) + size * which * F.normalize(
        torch.randn(k, d, generator=generator)
    )


@settings(max_examples=300)
@given(
    capability=st.sampled_from(EVERY_SET),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    d=st.sampled_from([1, 2, 7, 64, 65, 130]),
    axes=st.sampled_from([1, 3, 28, 60, 200]),
    reach=st.sampled_from([1.0, 0.3, 0.01]),
    bad=st.booleans(),
    passes=st.lists(
        st.tuples(st.sampled_from(MOVES), st.sampled_from([0.0, 1e-5, 1e-3, 0.03])), max_size=4
    ),
    seed=st.integers(0, 2**20),
)
def test_passes_find_what_all_products_find(
    capability, kind, n, k, d, axes, reach, bad, passes, seed
):
    rows = make_rows(kind, n, d, seed)
    if bad:
        for at, value in ((1, 0.0), (2, math.nan), (4, math.inf)):
            rows[at::9] = value
    centroids = make_centroids(rows, k, seed + 2)
    units = F.normalize(rows.double(), eps=1e-300)
    units = units[units.isfinite().all(dim=1)].float()
    sample = units if len(units) else torch.zeros(1, d)
    guess = torch.randint(-1, k, (n,), generator=torch.Generator().manual_seed(seed))
    with unicom_ext.cpu_capability(capability):
        projection = along_axes(sample, centroids, min(axes, d))
        # Values beyond what bytes hold, of the coordinates or of the rest.
        projection.range *= reach
        projection.rest *= reach
        right, _ = Centroids(centroids).nearest(rows)
        guess[::2] = right[::2]
        search = Passes(rows, projection)
        index = search.search(centroids, guess)
        for number, (how, margin) in enumerate(passes):
            centroids = move(centroids, how, seed + number)
            index = search.search(centroids, index, margin)


@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_more_centroids_than_are_screened_at_once(capability, margin):
    k = 16 * 1024 + 16 * 5 + 3
    rows, centroids = gaussian(25, 3, 0), F.normalize(gaussian(k, 3, 1))
    search = Passes(rows, along_axes(F.normalize(rows), centroids, 2))
    index = search.search(centroids, torch.full((25,), -1))
    search.search(move(centroids, "split", 2), index, margin)


def test_a_block_of_rows_that_stop_at_different_places(capability):
    """More rows than are searched together, of which many stop early: those that are searched are
    not those beside them."""
    rows, centroids = make_rows("cone", 500, 16, 0), gaussian(200, 16, 1)
    search = Passes(rows, along_axes(F.normalize(rows), centroids, 8))
    index = search.search(centroids, torch.full((500,), -1))
    index = search.search(centroids, index, 0.02)
    moved = centroids.clone()
    moved[:60] += 0.3 * gaussian(60, 1, 2).abs() * gaussian(60, 16, 3)
    search.search(moved, index, 0.02)
    assert 0 < search.work[0] < 500 * 200


@given(
    n=st.integers(1, 20),
    d=st.sampled_from([1, 2, 9]),
    step=st.sampled_from([1e-7, 1e-4, 0.1, 2.0]),
    mean=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_no_cosine_grows_by_more_than_the_movement(n, d, step, mean, seed):
    rows, before = F.normalize(gaussian(n, d, seed)), gaussian(30, d, seed + 1)
    now = before + step * gaussian(30, d, seed + 2)
    now[3], now[5], before[6] = 0, before[5] * 9, 0
    row_mean = mean * F.normalize(gaussian(1, d, seed + 3)[0], dim=0)
    reach = (rows.double() - row_mean.double()).norm(dim=1).clamp(min=LEAST_NORM)
    grown = cosines(rows, now) - cosines(rows, before)
    assert (grown <= reach[:, None] * movement(before, now, row_mean)).all()


def test_what_is_left_out(capability):
    """Rows around centres that are far apart: few products but those with the guess, and none where
    nothing moved."""
    k = 300
    centres = F.normalize(gaussian(k, 96, 0) * torch.arange(1, 97) ** -0.3)
    rows = centres.repeat(4, 1) + 0.01 * gaussian(4 * k, 96, 1)
    projection = choose_projection(F.normalize(rows), centres)
    assert projection.axes is not None
    search = Passes(rows, projection)
    index = search.search(centres, torch.arange(k).repeat(4))
    screened, multiplied, decided = search.work
    assert screened == 4 * k * k
    assert multiplied < 2 * 4 * k
    assert decided < 4 * k // 10
    index = search.search(centres, index, 0.02)
    assert search.work[0] == 4 * k * k  # nothing was known of what lies below the cosine
    search.search(centres, index, 0.02)
    assert search.work == [0, 0, 0]
    search.search(F.normalize(centres + 5e-4 * gaussian(k, 96, 2)), index, 0.02)
    assert search.work == [0, 0, 0]


def test_centroids_that_come_back(tmp_path):
    """What has moved since the last pass counts, not since the first."""
    rows = make_rows("cone", 300, 24, 0)
    here = make_centroids(rows, 60, 1)
    search = PrunedSearch(tmp_path, InMemory(rows), Ranks(None), Centroids, 0)
    index = torch.full((300,), -1)
    for centroids in (here, here + 0.02 * gaussian(60, 24, 2), here, here, here):
        nearest = search.begin(F.normalize(centroids))
        parts = zip(rows.split(77), index.split(77), strict=True)
        found = [nearest.nearest(*part) for part in parts]
        index, score = map(torch.cat, zip(*found, strict=True))
        right, right_score = Centroids(F.normalize(centroids)).nearest(rows)
        assert torch.equal(index, right)
        assert torch.equal(score, right_score)
    assert search.failure is None
    assert search.work[0] < 300 * 60 / 2


# ---- bounds that are just reached ----------------------------------------------------------------
#
# A centroid is as near to a row as a bound allows. Another one, the guess, is 3 % of that bound
# farther away: the nearest is found, and would not be if the bound were 10 % smaller. And where the
# guess is 10 % of it nearer, the other one is passed over.


def just_reached(row: Tensor, near: Tensor, bound: float, projection: Projection, stage: int):
    """stage: of `Passes.work`, at which `near` is passed over."""
    row, near = F.normalize(row.double(), dim=0), F.normalize(near.double(), dim=0)
    span = torch.linalg.qr(torch.stack([row, near], dim=1))[0]
    aside = gaussian(1, len(row), 0)[0].double() * (near != 0) * (row != 0)
    aside = F.normalize(aside - span @ (span.T @ aside), dim=0)
    counts = []
    for behind in (0.03, -0.1):
        cosine = row @ near - behind * bound
        guess = cosine * row + (1 - cosine.square()).sqrt() * aside
        search = Passes(row.float()[None], projection)
        index = search.search(torch.stack([guess, near]).float(), torch.tensor([0]))
        assert index.item() == (behind > 0)
        counts.append(search.work[stage])
    assert counts[0] == counts[1] + 1


def signs(d: int, seed: int) -> Tensor:
    return torch.where(gaussian(1, d, seed)[0] > 0, 1.0, -1.0)


def halves(d: int, most: int, seed: int) -> Tensor:
    """Whole numbers from 0 to most, and .49: what rounding takes is nearly half of a step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most + 1, (d,), generator=generator) + 0.49


@pytest.mark.parametrize("means", [(0.0, 0.0), (0.3, -0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_what_lies_outside_of_the_axes_is_parallel(capability, means, seed):
    outside = F.normalize(gaussian(1, 65, seed))[0]
    outside[0] = 0
    outside = F.normalize(outside, dim=0)
    axis = torch.eye(65)[:1]
    row, near = 0.6 * axis[0] + 0.8 * outside, -0.5 * axis[0] + 0.75**0.5 * outside
    projection = plain(65, axes=axis, range=0.6 - means[0], rest=0.8)
    projection.means[:, 0] = torch.tensor(means)
    just_reached(row, near, 0.8 * 0.75**0.5, projection, stage=1)


@pytest.mark.parametrize("seed", range(3))
def test_all_rounding_of_a_row_is_in_the_direction_of_a_centroid(capability, seed):
    size, near = halves(64, 2, seed), signs(64, seed)
    step = 1 / size.norm().item()
    projection = plain(64)
    projection.range = step * projection.largest
    just_reached(size * near, near, 0.49 * 8 * step, projection, stage=1)


@pytest.mark.parametrize("seed", range(3))
def test_all_rounding_of_a_centroid_is_in_the_direction_of_a_row(capability, seed):
    row = signs(64, seed)
    near = halves(64, 5, seed) * row
    row[0], near[0] = 0, plain(1).largest  # a step is 1
    bound = 0.49 * 63**0.5 / near.norm().item()
    just_reached(row, near, bound, plain(64, range=63**-0.5), stage=1)


@pytest.mark.parametrize("of", ["row", "centroid"])
@pytest.mark.parametrize("seed", range(3))
def test_all_rounding_of_the_whole_product_is_in_one_direction(capability, of, seed):
    """All centroids are multiplied: no byte holds what of the row lies outside of the axis."""
    flat = signs(64, seed)
    uneven = halves(64, 5, seed) * flat
    flat[0], uneven[0] = 0, plain(1).largest
    row, near = (uneven, flat) if of == "row" else (flat, uneven)
    bound = 0.49 * 63**0.5 / uneven.norm().item()
    just_reached(row, near, bound, plain(64, axes=torch.eye(64)[:1], rest=1e-3), stage=2)


def test_cosines_that_float32_cannot_tell_apart(capability):
    """The rows are their mean, so nothing is left to be multiplied: cosines are the products with
    the mean, which are rounded once. The nearest centroid leads by a unit in the last place of its
    smallest value."""
    for seed in range(50):
        row = F.normalize(gaussian(1, 64, seed))[0]
        near = F.normalize(row + 0.05 * gaussian(1, 64, seed + 100)[0], dim=0)
        at = near.abs().argmin()
        guess = near.clone()
        guess[at] = torch.nextafter(near[at], -row[at])
        centroids = torch.stack([guess, near])
        projection = plain(64)
        projection.means[0] = row
        search = Passes(row[None], projection)
        assert search.search(centroids, torch.tensor([0])) == 1


def test_what_no_byte_holds_is_no_bound(capability):
    """Rows that reach ten times as far as bytes do, along the axis or beside it."""
    axis, beside = torch.eye(8)[0], torch.eye(8)[1]
    for row, near in ((axis, axis), (beside, beside), (axis + beside, axis + beside)):
        near = near + 0.3 * torch.eye(8)[2]
        centroids = torch.stack([near + 0.01 * torch.eye(8)[3], near])
        for reach in ({"range": 0.1}, {"rest": 0.05}, {"range": 0.1, "rest": 0.05}):
            search = Passes(row[None], plain(8, axes=axis[None], **reach))
            assert search.search(F.normalize(centroids), torch.tensor([0])) == 1


def at_cosine(cosine: float, aside: int) -> Tensor:
    """A unit vector at that cosine to the first axis."""
    vector = torch.zeros(40)
    vector[0], vector[aside] = cosine, (1 - cosine**2) ** 0.5
    return vector


# With row - mean of norm 1, as short as kLeastNorm, and shorter.
MEANS = (0.0, 0.5, 0.55)


@pytest.mark.parametrize("mean", MEANS)
def test_a_centroid_that_moves_straight_towards_a_row(capability, mean):
    """Along the mean of the rows, too."""
    row, way = at_cosine(1, 1), 0.2
    projection = plain(40)
    projection.means[0] = mean * row
    for behind in (0.02, -0.1):
        guess = at_cosine((0.5 - behind) * way, 1)
        search = Passes(row[None], projection)
        then, now = at_cosine(-way / 2, 2), at_cosine(way / 2, 2)
        search.search(torch.stack([guess, then]), torch.tensor([0]), margin=2 * way)
        index = search.search(torch.stack([guess, now]), torch.tensor([0]))
        assert index.item() == (behind > 0)
        assert search.work[0] == (2 if behind > 0 else 0)


@pytest.mark.parametrize("others", ["stay", "jump"])
def test_a_centroid_that_creeps_towards_a_row(capability, others):
    """Ten steps, none of which is enough. The row is not searched, or only among those that jump,
    until the last one."""
    row, way = at_cosine(1, 1), 0.2
    guess = at_cosine(0.48 * way, 1)
    search = Passes(row[None], plain(40))
    for step in range(11):
        near = at_cosine((step / 10 - 0.5) * way, 2)
        jumped = [at_cosine(-0.9 + 0.5 * (step % 2 and others == "jump"), 3 + i) for i in range(32)]
        index = search.search(torch.stack([guess, near, *jumped]), torch.tensor([0]), 2 * way)
        if 0 < step < 10:
            assert search.work[0] == (32 if others == "jump" else 0)
        assert index.item() == (step == 10)


# ---- whole clusterings ---------------------------------------------------------------------------

ROWS, DIM, K = 2400, 80, LEAST_PRUNED


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Rows in a narrow cone in two shards, some zero or not finite, and so many of them equal that
    a half of their cluster is empty in each pass; and initial centroids, many of them equal too."""
    path = tmp_path_factory.mktemp("features")
    rows = make_rows("cone", ROWS, DIM, 0)
    rows[5], rows[ROWS // 2 + 7, 3] = 0, math.nan
    rows[900:1500] = rows[900].clone()
    (path / "rows").mkdir()
    np.save(path / "rows" / "a.npy", rows[: ROWS // 2].half())
    np.save(path / "rows" / "b.npy", rows[ROWS // 2 :].half())
    init = F.normalize(rows[100 : 100 + K])
    init[400:] = init[:1]
    np.save(path / "init.npy", init)
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])


def run(features: Path, output: Path, console: Console = QUIET, **more) -> dict:
    options = {name: more.pop(name) for name in ("resume", "overwrite") if name in more}
    how = config(**{"clusters": K, "passes": 7, "init": str(features / "init.npy"), **more})
    return cluster(how, features / "rows", output, console=console, **options)


def steady(result: dict) -> tuple:
    """What is the same with and without pruning."""
    names = ("pass", "kind", "rows", "objective", "changed", "empty")
    passes = [{name: facts[name] for name in names} for facts in result["passes"]]
    return result["sha256"], result["objective"], result["sizes"], passes


@pytest.fixture(scope="module")
def unpruned(features, tmp_path_factory) -> dict:
    """What all products find."""
    with mock.patch.object(pictures, "draw", return_value=[]):
        return run(features, tmp_path_factory.mktemp("unpruned") / "out", prune=False)


def test_pruning_changes_nothing(capability, features, unpruned, tmp_path):
    pruned = run(features, tmp_path / "out")
    assert steady(pruned) == steady(unpruned)
    assert [facts["products"] for facts in unpruned["passes"]] == [1.0] * 7
    first, *others = [facts["products"] for facts in pruned["passes"]]
    assert first == 1  # nothing was known before
    assert max(others) < 1
    assert min(others) < 0.5
    assert pruned["passes"][0]["empty"] > 100
    assert min(facts["empty"] for facts in pruned["passes"]) > 0
    assert not (tmp_path / "out" / "state" / "pruning").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"method": "two-level", "coarse": 4, "refine_passes": 4, "passes": 3, "init": "random"},
        {"early_passes": 2, "merge_above": 0.99, "positives": 3},
        {"rows_per_cluster": 2},
        {"clusters": LEAST_PRUNED - 1, "init": "random"},
    ],
    ids=["two-level", "early and merged", "sampled", "few clusters"],
)
def test_pruning_changes_nothing_in_other_ways(features, tmp_path, more):
    results = [run(features, tmp_path / str(p), prune=p, **more) for p in (True, False)]
    assert steady(results[0]) == steady(results[1])
    products = [facts["products"] for facts in results[0]["passes"]]
    if "method" in more:
        assert products[:3] == [None] * 3  # in cells
        assert max(products[3:]) < 1
    elif "early_passes" in more:
        assert products[:3] == [None, None, 1.0]
        assert max(products[3:]) < 1
    else:
        assert products == [1.0] * 7


def test_pruning_is_switched_on_and_off_by_a_run_that_goes_on(features, unpruned, tmp_path):
    for passes, prune in ((3, True), (5, False), (7, True)):
        result = run(features, tmp_path / "out", passes=passes, prune=prune, resume=passes > 3)
    assert steady(result) == steady(unpruned)
    products = [facts["products"] for facts in result["passes"]]
    assert products[3:5] == [1.0, 1.0]
    assert max(products[1:3] + products[5:]) < 1


def test_rows_rest_where_nothing_moves(tmp_path):
    rows = F.normalize(gaussian(K, 24, 0))
    np.save(tmp_path / "rows.npy", rows.repeat(2, 1) + 1e-3 * gaussian(2 * K, 24, 1))
    np.save(tmp_path / "init.npy", rows)
    more = config(clusters=K, init=str(tmp_path / "init.npy"), passes=6)
    result = cluster(more, tmp_path / "rows.npy", tmp_path / "out", console=QUIET)
    assert [facts["products"] for facts in result["passes"][3:]] == [0.0] * 3


def test_pruning_in_blocks_of_any_size(features, unpruned, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 4 * DIM * 200)
    assert steady(run(features, tmp_path / "out")) == steady(unpruned)


@contextmanager
def writing_fails(after: int, times: float = math.inf):
    """A disk that is full after so many writes, for so many: half of each is there, and no more."""
    write, writes = pruning._write, 0

    def full(file, values):
        nonlocal writes
        writes += 1
        if after < writes <= after + times:
            write(file, values[: len(values) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, values)

    with mock.patch.object(pruning, "_write", full):
        yield


def text_of(console: Console) -> str:
    return console.file.getvalue()


# In the first pass over two shards there are two writes for each, in later passes one.
@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 7])
def test_no_room_for_what_passes_remember(features, unpruned, tmp_path, after):
    console = Console(file=StringIO(), width=200)
    with writing_fails(after):
        result = run(features, tmp_path / "out", console)
    assert steady(result) == steady(unpruned)
    text = text_of(console)
    assert text.count("No room to remember what passes have found") == 1
    assert "([Errno 28] No space left on device): those that follow compute all products" in text
    products = [facts["products"] for facts in result["passes"]]
    # The one that fails, too.
    failed = 1 if after < 4 else 2 + (after - 4) // 2
    assert max(products[1:failed], default=0) < 1
    assert products[failed:] == [1.0] * (7 - failed)
    assert not (tmp_path / "out" / "state" / "pruning").exists()


def test_room_comes_back_within_a_pass(tmp_path):
    """Where the files stand after half a write are the bounds of other rows: here of such as are
    far from all centroids, for rows that are near to two of them."""
    near = torch.eye(8)[1] + torch.eye(8)[2] + 1e-4 * gaussian(100, 8, 0)
    blocks = [torch.ones(100, 8), near]
    search = PrunedSearch(tmp_path, InMemory(torch.cat(blocks)), Ranks(None), Centroids, 0)
    there = torch.eye(8)
    moved = F.normalize(there + 5e-4 * gaussian(8, 8, 1))
    guesses = [torch.full((100,), -1)] * 2
    for centroids in (there, there, moved):
        with writing_fails(0 if centroids is moved else 4, times=1):
            nearest = search.begin(centroids)
            before, guesses = (
                guesses,
                [nearest.nearest(*each)[0] for each in zip(blocks, guesses, strict=True)],
            )
    assert search.failure is not None
    assert (guesses[1] != before[1]).any()
    assert torch.equal(guesses[1], Centroids(moved).nearest(near)[0])


def test_no_place_for_what_passes_remember(features, unpruned, tmp_path):
    (tmp_path / "out" / "state").mkdir(parents=True)
    (tmp_path / "out" / "state" / "pruning").write_text("")  # where a directory should be
    console = Console(file=StringIO(), width=200)
    assert steady(run(features, tmp_path / "out", console)) == steady(unpruned)
    assert text_of(console).count("No room to remember what passes have found ([Errno 20]") == 1


def test_what_passes_remember_is_cut_off(features, unpruned, tmp_path, monkeypatch):
    begin, begun = pruning.PrunedSearch.begin, 0

    def cut(search, centroids):
        nonlocal begun
        begun += 1
        if begun == 3:
            with open(search.bounds, "r+b") as file:
                file.truncate(ROWS)
        return begin(search, centroids)

    monkeypatch.setattr(pruning.PrunedSearch, "begin", cut)
    console = Console(file=StringIO(), width=200)
    assert steady(run(features, tmp_path / "out", console)) == steady(unpruned)
    assert "No room to remember what passes have found" in text_of(console)
    assert "bounds is cut off" in text_of(console)


def on_a_rank(group, features: Path, output: Path, failing: int) -> tuple[tuple, list, str]:
    console = Console(file=StringIO(), width=200)
    fails = writing_fails(2 if torch.distributed.get_rank() == failing else 1000)
    with mock.patch.object(pictures, "draw", return_value=[]), fails:
        result = run(features, output, console)
    return steady(result), [facts["products"] for facts in result["passes"]], text_of(console)


@pytest.mark.slow
def test_four_processes_of_which_one_has_no_room(ranks, features, unpruned, tmp_path):
    """It alone computes all products; the first says so."""
    whole = ranks.run(4, on_a_rank, features, tmp_path / "whole", -1)
    found = ranks.run(4, on_a_rank, features, tmp_path / "out", 2)
    for results in (whole, found):
        assert [same for same, _, _ in results] == [steady(unpruned)] * 4
        assert not (tmp_path / "out" / "state" / "pruning").exists()
    _, products, text = whole[0]
    assert max(products[1:]) < 1
    assert "No room" not in text
    _, more, text = found[0]
    assert text.count("No room to remember what passes have found") == 1
    for a, b in zip(products[3:], more[3:], strict=True):
        assert a < b < 1


# ---- bad input -----------------------------------------------------------------------------------


def search_with(**other):
    """The operators of a search with these arguments in place of good ones."""
    rows, centroids = gaussian(6, 8, 0), F.normalize(gaussian(4, 8, 1))
    given = {
        "rows": rows, "guess": torch.zeros(6, dtype=torch.int64), "bound": torch.ones(6),
        "centroids": centroids, "order": torch.arange(4), "moved": torch.zeros(4),
        "means": torch.zeros(2, 8), "axes": torch.eye(8)[:2], "step": 0.01, "rest_step": 0.01,
        "largest": library.ops.largest_byte(rows), "margin": 0.0, **other,
    }  # fmt: skip
    kind = [given[name] for name in ("means", "axes", "step", "rest_step", "largest")]
    projected = other.get("projected", library.ops.project_rows(given["rows"], *kind))
    packed = library.ops.order_centroids(given["centroids"], given["order"], given["moved"], *kind)
    return library.ops.pruned_search(
        given["rows"], projected, given["guess"], given["bound"], given["centroids"],
        other.get("packed", packed), *kind, given["margin"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("rows", torch.ones(6), "rows must be a matrix, got 1 dimensions"),
        ("rows", torch.ones(6, 8).double(), "rows must be float32, got Double"),
        ("rows", torch.ones(6, 7), r"means must be contiguous, Float, of shape \[2, 7\]"),
        ("centroids", torch.ones(0, 8), "centroids must have from 1 to .* rows, got 0"),
        ("centroids", torch.full((4, 8), math.nan), "centroids must be finite, but row 0 is not"),
        ("guess", torch.tensor([0, 1, 2, 3, 4, 0]), r"guess must be in \[-1, 4\), got 4 at pos"),
        ("guess", torch.zeros(6), r"guess must be Long of shape \[6\]"),
        ("guess", torch.zeros(12).long()[::2], "guess must be contiguous"),
        ("bound", torch.zeros(5), r"bound must be Float of shape \[6\]"),
        ("bound", torch.zeros(6).double(), r"bound must be Float of shape \[6\]"),
        ("bound", torch.zeros(1).expand(6), "bound must be contiguous"),
        ("order", torch.arange(3), r"order must be Long of shape \[4\]"),
        ("order", torch.tensor([0, 2, 2, 1]), "order must have each of 0 .. 3 once, got 2 at pos"),
        ("order", torch.tensor([0, -1, 2, 1]), "order must have each of 0 .. 3 once, got -1 at"),
        ("moved", torch.zeros(3), r"moved must be Float of shape \[4\]"),
        ("moved", torch.arange(4.0), "moved must not be negative and not increase, got 1 at pos"),
        ("moved", torch.full((4,), math.nan), "moved must not be negative and not incr.*, got nan"),
        ("means", torch.zeros(2, 9), r"means must be contiguous, Float, of shape \[2, 8\]"),
        ("means", torch.zeros(2, 8).double(), "means must be contiguous, Float"),
        ("axes", torch.eye(9)[:2], r"axes must be contiguous, Float, of shape \[m, 8\]"),
        ("axes", torch.zeros(0, 8), r"axes must be contiguous, Float, of shape \[m, 8\]"),
        ("axes", torch.tensor(1.0), r"axes must be contiguous, Float, of shape \[m, 8\]"),
        ("axes", torch.eye(8).double(), r"axes must be contiguous, Float, of shape \[m, 8\]"),
        ("step", 0.0, "step and rest_step must be at least 1e-4|0.0001, got 0 and 0.01"),
        ("rest_step", math.nan, "step and rest_step must be at least .*, got 0.01 and nan"),
        ("largest", 128, "rows were projected for another CPU capability than is in use now"),
        ("largest", 2**32 + 1, "rows were projected for another CPU capability"),
        ("largest", 0, "rows were projected for another CPU capability"),
        ("margin", -0.1, "margin must not be negative, got -0.1"),
        ("margin", math.nan, "margin must not be negative, got nan"),
        ("projected", torch.zeros(6, 9).byte(), "projected must come from project_rows with the"),
        ("packed", torch.zeros(9).byte(), "packed must come from order_centroids with the same"),
    ],
)
def test_bad_input(argument, value, message):
    search_with()
    with pytest.raises(ValueError, match=message):
        search_with(**{argument: value})


def test_centroids_of_other_dimensions():
    rows, projection = gaussian(6, 8, 0), plain(8)
    packed = plain(9).order(gaussian(4, 9, 0), torch.arange(4), None)
    with pytest.raises(ValueError, match=r"centroids must be \[k, 8\] like the rows, got \[4, 9\]"):
        library.ops.pruned_search(
            rows, projection.rows(rows), torch.zeros(6).long(), None, gaussian(4, 9, 0), packed,
            *projection.arguments, 0.0,
        )  # fmt: skip


def test_rows_in_the_bytes_of_another_capability():
    rows, centroids = gaussian(6, 8, 0), gaussian(4, 8, 1)
    with unicom_ext.cpu_capability("emulated_avx512"):  # whose bytes are larger
        search = Passes(rows, plain(8))
    with unicom_ext.cpu_capability("portable"), pytest.raises(ValueError, match="another CPU cap"):
        search.search(centroids, torch.zeros(6).long())
    with unicom_ext.cpu_capability("portable"):
        search = Passes(rows, plain(8))
    with unicom_ext.cpu_capability("emulated_avx512"):
        search.search(centroids, torch.zeros(6).long())
