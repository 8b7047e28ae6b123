"""The nearest centroid, at every instruction set, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.backends import EMULATED, EVERY_SET
from support.clusters import cosines, gaussian
from torch import Tensor

import unicom_ext
from unicom_ext import _engine
from unicom_ext.cluster import Centroids, nearest

CPU_ONLY = True  # test_cuda_nearest.py is about GPUs


def check(rows: Tensor, centroids: Tensor) -> Tensor:
    """The index is float64's but where two cosines are the same within its rounding."""
    index, score = nearest(rows, centroids)
    cosine = cosines(rows, centroids)
    right = cosine.max(dim=1).values
    chosen = cosine.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(chosen, right, rtol=0, atol=1e-14)
    torch.testing.assert_close(score.double(), right, rtol=0, atol=1e-7)
    return index


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 1), (7, 3, 2), (5, 16, 129), (100, 65, 5), (193, 64, 130), (300, 1000, 64)],
)
def test_awkward_sizes(capability, n, k, d):
    check(gaussian(n, d, 0), gaussian(k, d, 1))


def test_cosines_closer_than_bf16_can_tell_apart(capability):
    """All centroids within 1e-3 of each other: bf16 alone gets most of these rows wrong."""
    d = 48
    rows = F.normalize(gaussian(1, d, 0) + 1e-3 * gaussian(200, d, 1))
    centroids = F.normalize(gaussian(1, d, 0) + 1e-3 * gaussian(300, d, 2))
    check(rows, centroids)
    rounded = (rows.bfloat16().float() @ centroids.bfloat16().float().T).argmax(dim=1)
    wrong = rounded != cosines(rows, centroids).argmax(dim=1)
    assert wrong.float().mean() > 0.5


def test_gaps_of_one_part_in_a_hundred_million(capability):
    """The winner leads by 1e-8, less than fp32 resolves near 1; its neighbours share its lane."""
    d, k = 32, 256
    direction = F.normalize(gaussian(1, d, 3).double())
    other = F.normalize(gaussian(1, d, 4).double())
    other = F.normalize(other - (other @ direction.T) * direction)
    angle = 0.5 + 1e-8 * torch.randperm(k, generator=torch.Generator().manual_seed(5))
    centroids = (angle.cos()[:, None] * direction + angle.sin()[:, None] * other).float()
    index = check(direction.float(), centroids)
    assert index == cosines(direction.float(), centroids).argmax()


def test_the_first_of_equal_centroids_wins(capability):
    centroids = gaussian(150, 20, 0)
    centroids[[70, 71, 134, 149]] = centroids[6].clone()  # 70 and 134 in the lane of 6
    centroids[100:120] = centroids[20:40] * 7  # the same directions
    index = check(gaussian(400, 20, 1), centroids)
    assert not set(index.tolist()) & {70, 71, 134, 149}
    assert check(centroids, centroids).tolist()[70] == 6


def test_all_cosines_negative(capability):
    """Padding of the last panel has cosine 0 and must not win."""
    centroids = -gaussian(17, 6, 0).abs()
    index = check(gaussian(40, 6, 1).abs(), centroids)
    assert index.min() >= 0
    assert index.max() < 17


def test_rows_without_direction(capability):
    rows = gaussian(9, 5, 0)
    rows[2], rows[4, 1], rows[6, 0] = 0, math.nan, -math.inf
    index, score = nearest(rows, gaussian(20, 5, 1))
    bad = torch.tensor([2, 4, 6])
    assert index[bad].tolist() == [-1, -1, -1]
    assert score[2] == 0
    assert score[[4, 6]].isnan().all()
    good = torch.tensor([0, 1, 3, 5, 7, 8])
    alone = nearest(rows[good], gaussian(20, 5, 1))
    assert torch.equal(index[good], alone[0])
    assert torch.equal(score[good], alone[1])


def test_norms_at_the_ends_of_fp32():
    rows, centroids = gaussian(50, 12, 0), gaussian(40, 12, 1)
    index = check(rows, centroids)
    for scale in (1e-38, 1e-25, 1e25, 3e37):
        scaled = torch.rand(50, 1, generator=torch.Generator().manual_seed(2)) + 0.5
        assert torch.equal(nearest(rows * (scale * scaled), centroids)[0], index)
        assert torch.equal(nearest(rows, centroids * scale)[0], index)


@given(
    st.integers(1, 60),
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    st.integers(0, 2**20),
)
def test_any_problem(n, k, d, spread, seed):
    centre = gaussian(1, d, seed)
    check(
        centre + spread * gaussian(n, d, seed + 1),
        centre + spread * gaussian(k, d, seed + 2),
    )


def test_the_same_labels_everywhere(set_threads):
    """Not merely as good: the same, at any instruction set and number of threads."""
    rows = F.normalize(gaussian(500, 40, 0) + 3)
    centroids = rows[::3] + 1e-5 * gaussian(167, 40, 1)
    results = []
    for name in EVERY_SET:
        with unicom_ext.cpu_capability(name):
            results.append(nearest(rows, centroids))
    set_threads(2)
    results.append(nearest(rows, centroids))
    for index, score in results[1:]:
        assert torch.equal(index, results[0][0])
        assert torch.equal(score, results[0][1])


@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**20))
def test_values_of_any_size_within_a_row(k, d, seed):
    """Most of a row rounds to nothing beside its largest value, and yet decides."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.randint(-44, 2, (k + 30, d), generator=generator)
    values = gaussian(k + 30, d, seed + 1) * 10.0**power
    values[:, 0] = 1  # the same in all
    check(values[:30], values[30:])


@pytest.mark.parametrize("seed", range(5))
def test_rounding_at_its_worst(capability, seed):
    """One centroid loses .49 of a step in every value, another one gains .45 of a step, all in the
    direction of the row: as far off as the two scores can be. The first one is nearer."""
    d = 64
    vnni = _engine.cpu_capability() in ("avx512_bf16", "amx", *EMULATED)
    largest = 127 if vnni else 63  # steps in the largest value
    size = largest / 4
    row = torch.where(gaussian(1, d, seed) > 0, 1.0, -1.0)[0].double()
    whole = size * (gaussian(1, d, seed + 100)[0] + row)
    whole = whole.clamp(-0.75 * largest, 0.75 * largest).round().double()
    whole[0] = largest * row[0]  # a step is 1
    aside = row.clone()
    aside[0] = 0
    other = whole + 0.55 * aside
    for steps in range(1, 20):  # a few whole steps, which rounding keeps
        near = whole + 0.49 * aside
        near[1 : 1 + steps] += row[1 : 1 + steps]
        if near @ row / near.norm() > other @ row / other.norm():
            break
    assert steps < 10
    rounded = [w.round() @ row / w.norm() for w in (near, other)]
    assert rounded[1] - rounded[0] > 0.9 * (0.49 + 0.45) * (d - 1) / near.norm()
    pair = torch.stack([other, near])
    index = check(row[None].float(), torch.cat([pair, -pair]).float())  # of mean 0
    assert index.item() == 1


@pytest.mark.parametrize("d", [16, 1000, 1_100_000])
def test_largest_sums(capability, d):
    """All values of one sign and as large as they can be. Sums that left their integers would be
    smaller than those of half as many products."""
    ones, half = torch.ones(d), torch.arange(d) % 2.0
    centroids = torch.stack([ones, -ones, half, -half])  # of mean 0
    index = check(torch.stack([ones, -2 * ones, half]), centroids)
    assert index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("d", [1, 3, 40])
def test_one_direction_and_single_values(capability, d):
    unit = torch.eye(d)
    assert check(unit, torch.cat([unit, -unit])).tolist() == list(range(d))
    same = torch.full((20, d), 3.0)
    assert check(same, same[:17] * 5).tolist() == [0] * 20


def test_what_is_left_of_the_mean_is_denormal():
    centroids = torch.tensor([[1.0, 1e-40], [1.0, 1.2e-40], [1.0, 0.0]])
    rows = torch.tensor([[1.0, 1e-40], [1.0, -1e-40], [2.0, 0.0], [0.0, 1e-45]])
    for k in (1, 2, 3):
        index = check(rows, centroids[:k])
        assert index[:3].tolist() == [0, 0, 0]  # the same cosine, in double


def test_no_guess_changes_the_result(capability):
    rows, centroids = gaussian(300, 24, 0), gaussian(170, 24, 1)
    rows[5], rows[6, 3], rows[7] = 0, math.nan, rows[8]
    centroids[90:] = centroids[:80]  # the first of equals wins, even where another was guessed
    found = Centroids(centroids)
    index, score = found.nearest(rows)
    twin = torch.where((index >= 0) & (index < 80), index + 90, index)
    random = torch.randint(-1, 170, (300,), generator=torch.Generator().manual_seed(2))
    for guess in (index, twin, random, torch.zeros_like(index), torch.full_like(index, 169)):
        again, again_score = found.nearest(rows, guess)
        assert torch.equal(again, index)
        assert torch.equal(again_score.nan_to_num(7), score.nan_to_num(7))


def test_rows_of_other_dtypes_and_strides():
    rows, centroids = gaussian(30, 16, 0), Centroids(gaussian(40, 16, 1))
    index, score = centroids.nearest(rows)
    assert torch.equal(centroids.nearest(rows.double())[0], index)
    assert torch.equal(centroids.nearest(rows.T.contiguous().T)[1], score)
    wide = torch.zeros(30, 20)
    wide[:, :16] = rows
    assert torch.equal(centroids.nearest(wide[:, :16])[1], score)
    half = rows.half()
    assert torch.equal(centroids.nearest(half)[0], centroids.nearest(half.float())[0])
    empty = centroids.nearest(rows[:0])
    assert (len(empty[0]), len(empty[1])) == (0, 0)


def test_faiss_agrees():
    faiss = pytest.importorskip("faiss")
    rows, centroids = F.normalize(gaussian(2000, 64, 0)), F.normalize(gaussian(500, 64, 1))
    index = faiss.IndexFlatIP(64)
    index.add(centroids.numpy())
    score, found = index.search(rows.numpy(), 1)
    ours, our_score = nearest(rows, centroids)
    same = torch.from_numpy(found[:, 0]) == ours
    assert same.float().mean() > 0.999
    torch.testing.assert_close(our_score, torch.from_numpy(score[:, 0]), rtol=0, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "centroids", "error", "words"),
    [
        (torch.zeros(3, 4), torch.ones(2, 5), ValueError, ["centroids", "[k, 4]", "5"]),
        (torch.zeros(3, 4), torch.ones(0, 4), ValueError, ["centroids", "from 1 to"]),
        (torch.zeros(3), torch.ones(2, 4), ValueError, ["rows", "matrix", "[3]"]),
        (torch.zeros(3, 4).long(), torch.ones(2, 4), TypeError, ["rows", "int64"]),
        (torch.zeros(3, 4), [[1.0]], TypeError, ["centroids", "list"]),
        (
            torch.zeros(3, 2),
            torch.tensor([[1, 2], [3, math.nan]]),
            ValueError,
            ["centroids", "finite", "row 1"],
        ),
    ],
)
def test_bad_input(rows, centroids, error, words):
    with pytest.raises(error) as caught:
        nearest(rows, centroids)
    for word in words:
        assert word in str(caught.value)


def test_bad_guess():
    found = Centroids(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"guess must be in \[-1, 2\), got 2 at position 1"):
        found.nearest(torch.ones(3, 4), torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match=r"guess must be Long of shape \[3\]"):
        found.nearest(torch.ones(3, 4), torch.tensor([0, 1]))


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="centroids must be on the CPU or a CUDA device, got meta"):
        Centroids(torch.ones(2, 4, device="meta"))
    with pytest.raises(ValueError, match="rows must be on the CPU or a CUDA device, got meta"):
        Centroids(torch.ones(2, 4)).nearest(torch.ones(3, 4, device="meta"))


def test_packed_for_other_kernels():
    with unicom_ext.cpu_capability("emulated_avx512"):  # packs larger values
        found = Centroids(torch.ones(2, 4))
    with unicom_ext.cpu_capability("portable"), pytest.raises(ValueError, match="another CPU cap"):
        found.nearest(torch.ones(3, 4))
