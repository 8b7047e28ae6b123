"""Sums of unit rows in whole numbers: the same bits whatever the order, and on every kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import EVERY_SET
from support.clusters import all_labels, config, gaussian, make_dump, run
from torch import Tensor

import unicom_ext
from unicom_ext.cluster import UnitSums, pictures
from unicom_ext.cluster.sums import MAX_SHIFT, shift_for


def squares(values: np.ndarray) -> np.ndarray:
    """Of each row in double: eight sums of every eighth square, after that of what is left over."""
    whole = values.shape[1] // 8 * 8
    parts, total = np.zeros((len(values), 8)), np.zeros(len(values))
    for k in range(0, whole, 8):
        parts += values[:, k : k + 8] ** 2
    for k in range(whole, values.shape[1]):
        total += values[:, k] ** 2
    for i in range(8):
        total += parts[:, i]
    return total


def reference(rows: Tensor, index: Tensor, k: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and directions, row after row in NumPy."""
    x = rows.double().numpy()
    sums, counts = np.zeros((k, x.shape[1]), np.int64), np.zeros(k, np.int64)
    for row, square, j in zip(x, squares(x), index.tolist(), strict=True):
        if j >= 0 and 0 < square < math.inf:
            sums[j] += np.rint(2.0**shift / np.sqrt(square) * row).astype(np.int64)
            counts[j] += 1
    norm = np.sqrt(squares(sums.astype(np.float64)))[:, None]
    units = np.divide(sums, norm, out=np.zeros(sums.shape), where=norm > 0)
    return torch.from_numpy(sums), torch.from_numpy(counts), torch.from_numpy(units).float()


def awkward_rows(n: int, d: int) -> Tensor:
    """Of all norms that fp32 has; one is zero, one not finite."""
    rows = gaussian(n, d, 0) * torch.logspace(-37, 37, n)[:, None]
    rows[n // 2] = 0
    rows[n // 3, d // 2] = math.nan
    return rows


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1000, 13, 7), (77, 200, 300)])
@pytest.mark.parametrize("most", [1000, 2**45])
def test_every_bit_is_the_formula_s(capability, n, k, d, most):
    rows = awkward_rows(n, d)
    index = torch.randint(-1, k, (n,), generator=torch.Generator().manual_seed(1))
    sums = UnitSums(k, d, rows=most)
    sums.add(rows[: n // 3], index[: n // 3])
    sums.add(rows[n // 3 :], index[n // 3 :])
    right, counts, directions = reference(rows, index, k, shift_for(most))
    assert torch.equal(sums.values, right)
    assert torch.equal(sums.counts, counts)
    assert torch.equal(sums.directions(), directions)


def test_threads_do_not_show(set_threads):
    rows = awkward_rows(1000, 7)
    before, index = torch.randint(-1, 13, (2, 1000), generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        sums = UnitSums(13, 7, rows=1000)
        sums.add(rows, before)
        sums.add(rows, index, before)
        found.append((sums.values, sums.counts, sums.directions()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


labels = st.lists(st.integers(-1, 4), min_size=24, max_size=24).map(torch.tensor)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(labels, min_size=1, max_size=4), st.permutations(range(24)), st.integers(1, 24))
def test_sums_that_were_moved_are_sums_made_anew(any_backend, passes, order, block):
    """In any order of the rows, and in blocks of any size."""
    rows, order = awkward_rows(24, 5), torch.tensor(order)
    moved = UnitSums(5, 5, rows=24)
    before = None
    for index in passes:
        for part in order.split(block):
            moved.add(rows[part], index[part], None if before is None else before[part])
        before = index
    anew = UnitSums(5, 5, rows=24)
    anew.add(rows, passes[-1])
    assert torch.equal(moved.values, anew.values)
    assert torch.equal(moved.counts, anew.counts)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("most", "there"), [(2**12, 0), (2**12 + 1, 0), (2**40, 2**40 - 1)])
def test_as_many_equal_rows_as_there_is_room_for(any_backend, most, there, sign):
    sums = UnitSums(1, 2, rows=most)
    sums.values[0, 0] = sign * there << sums.shift
    rows = torch.tensor([[3.0 * sign, 0.0]]).expand(most - there, 2)
    sums.add(rows, torch.zeros(most - there, dtype=torch.int64))
    assert sums.values.tolist() == [[sign * most << sums.shift, 0]]
    assert sums.values[0, 0].abs() > 2**61  # there is no more room than that
    assert sums.directions().tolist() == [[sign, 0]]


def test_room():
    assert [shift_for(n) for n in (1, 4096, 4097, 10**6, 4 * 10**8, 2**62)] == [
        MAX_SHIFT, 50, 49, 42, 33, 0,
    ]  # fmt: skip
    sums, coarse = (UnitSums(3, 40, rows=n) for n in (4096, 4097 * 64))
    rows, index = gaussian(60, 40, 0), torch.arange(60) % 3
    sums.add(rows, index)
    sums.make_room(4097 * 64)
    assert sums.shift == coarse.shift == 43
    coarse.add(rows, index)
    # Each sum is rounded once in place of each of its twenty rows.
    assert (sums.values - coarse.values).abs().max() <= 20 // 2
    assert 0 < sums.values.abs().max() < 21 << sums.shift
    negative = UnitSums(1, 5, rows=1 << 12)
    negative.values += torch.tensor([[-5, -4, 4, 5, 7]])
    negative.make_room(1 << 14)
    assert negative.values.tolist() == [[-1, -1, 1, 1, 2]]


def test_a_clustering_has_the_same_bits_on_every_instruction_set(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])
    make_dump(tmp_path / "dump")
    kinds = {"lloyd": {}, "minibatch": {"batch_rows": 100}, "two-level": {"coarse": 3}}
    for method, more in kinds.items():
        found = []
        for name in EVERY_SET:
            output = tmp_path / f"{method}-{name}"
            with unicom_ext.cpu_capability(name):
                run(tmp_path / "dump", output, config(method=method, joint="concat", **more))
            found.append((all_labels(output), np.load(output / "centroids.npy")))
        for other in found[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- bad input -----------------------------------------------------------------------------------


ROWS, INDEX = torch.ones(3, 4), torch.tensor([0, -1, 1])


@pytest.mark.parametrize(
    ("rows", "index", "before", "words"),
    [
        (ROWS, torch.tensor([0, 2, 1]), None, r"index must be in \[-1, 2\), got 2 at position 1"),
        (ROWS, INDEX, torch.tensor([-2, 0, 0]), r"before must be in \[-1, 2\), got -2 at positi"),
        (ROWS, INDEX[:2], None, r"index must be Long of shape \[3\]"),
        (ROWS, INDEX, INDEX[:2], r"before must be Long of shape \[3\]"),
        (ROWS, INDEX, INDEX.int(), r"before must be Long of shape \[3\]"),
        (ROWS.double(), INDEX, None, "rows must be float32, got Double"),
        (ROWS[:, :3], INDEX, None, r"sums must be \[k, 3\] like the rows, got \[2, 4\]"),
        (ROWS[0], INDEX, None, "rows must be a matrix, got 1 dimensions"),
    ],
)
def test_bad_rows_change_nothing(rows, index, before, words):
    sums = UnitSums(2, 4, rows=3)
    with pytest.raises(ValueError, match=words):
        sums.add(rows, index, before)
    assert not sums.values.any()
    assert not sums.counts.any()


def test_bad_sums():
    sums = UnitSums(2, 4, rows=3)
    sums.values = sums.values.double()
    with pytest.raises(ValueError, match="sums must be int64, got Double"):
        sums.add(ROWS, INDEX)
    with pytest.raises(ValueError, match="sums must be int64, got Double"):
        sums.directions()


def test_bad_room():
    for rows in (0, 2**62 + 1):
        with pytest.raises(ValueError, match=rf"rows must be from 1 to 2\*\*62, got {rows}"):
            UnitSums(2, 4, rows=rows)
    sums = UnitSums(2, 4, rows=5)
    with pytest.raises(ValueError, match=r"rows must be from 5 to 2\*\*62, got 4"):
        sums.make_room(4)
    assert (sums.rows, sums.shift) == (5, 50)
