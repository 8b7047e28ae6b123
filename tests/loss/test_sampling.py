"""Random selection: what it draws, that it is fair, and that shards agree.

Statistical tests use fixed seeds and fail outside the central 1 - 1e-4 of the exact law.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import chdtr

from unicom_ext import _engine
from unicom_ext.sampling import select_classes, select_features

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = 2**64 - 1


def assert_chi_square(statistic: float, freedom: int) -> None:
    assert 5e-5 < chdtr(freedom, statistic) < 1 - 5e-5


# --- an oracle in plain Python integers ---------------------------------------
# It also pins what a seed means: a resumed run must draw what the interrupted one would have drawn.


def mix(word):
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def key_of(*values):
    key, *rest = values
    for value in rest:
        key = mix((key ^ value & WORD) + 0x9E3779B97F4A7C15 & WORD)
    return key


def feistel(value, bits, round_function):
    """Six rounds on two halves; round_function(round, half, width) has `width` bits."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    low, high = value % 2**low_bits, value >> low_bits
    for number in range(0, 6, 2):
        high ^= round_function(number, low, high_bits)
        low ^= round_function(number + 1, high, low_bits)
    return high << low_bits | low


def round_keys(key):
    return [mix(key + number * 0x9E3779B97F4A7C15 & WORD) for number in range(1, 7)]


def expected_block_order(key):
    tables = round_keys(key)
    return [feistel(i, 8, lambda r, x, _: tables[r] >> 4 * x & 15) for i in range(256)]


def expected_classes(num_classes, count, positives, seed, step):
    phase = key_of(1, seed, step) % num_classes
    chosen = []
    for block in range(-(-num_classes // 256)):
        begin, end = 256 * block, min(256 * block + 256, num_classes)
        quota = (count * end + phase) // num_classes - (count * begin + phase) // num_classes
        order = expected_block_order(key_of(2, seed, step, block))
        members = {p for p in positives if begin <= p < end}
        negatives = [begin + p for p in order if begin + p < end and begin + p not in members]
        members.update(negatives[: max(quota - len(members), 0)])
        chosen += sorted(members)
    return chosen


def expected_features(dim, count, seed, step):
    bits = max(8, (dim - 1).bit_length())
    keys = round_keys(key_of(3, seed, step))

    def drawn(value):
        value = feistel(value, bits, lambda r, x, width: key_of(keys[r], x) >> 64 - width)
        return value if value < dim else drawn(value)

    return sorted(drawn(i) for i in range(count))


# --- what is drawn ------------------------------------------------------------


@st.composite
def populations(draw):
    num_classes = draw(st.integers(1, 1200))
    rate = draw(st.floats(0.001, 1) | st.just(1.0) | st.just(0.0))
    positives = draw(st.lists(st.integers(0, num_classes - 1), max_size=50))
    return num_classes, rate, positives


def at_least(num_classes, rate):
    return max(1, int(rate * num_classes + 0.5)) if rate else 0


@given(population=populations(), seed=INT64, step=INT64)
@example(population=(1, 0.1, []), seed=0, step=0)
@example(population=(300, 0.0, [299, 1, 1]), seed=0, step=0)
@example(population=(300, 0.0, []), seed=0, step=0)
@example(population=(1, 1.0, [0, 0]), seed=0, step=0)
@example(population=(3, 0.34, [2]), seed=1, step=0)
@example(population=(257, 0.01, list(range(200, 257))), seed=-1, step=3)
def test_classes_equal_the_oracle(population, seed, step):
    num_classes, rate, positives = population
    count = at_least(num_classes, rate)
    selected = select_classes(num_classes, rate, positives, seed=seed, step=step)
    assert selected.dtype == torch.int64
    assert selected.tolist() == expected_classes(num_classes, count, positives, seed, step)


@given(population=populations(), seed=INT64, step=INT64)
def test_size_is_the_larger_of_quota_and_positives_in_each_block(population, seed, step):
    num_classes, rate, positives = population
    count = at_least(num_classes, rate)
    selected = select_classes(num_classes, rate, positives, seed=seed, step=step)
    quotas = _engine.block_quotas(num_classes, count, seed, step)
    present = np.bincount(np.unique(positives).astype(int) // 256, minlength=len(quotas))
    np.testing.assert_array_equal(
        np.bincount(selected.numpy() // 256, minlength=len(quotas)), np.maximum(quotas, present)
    )
    assert set(positives) <= set(selected.tolist())
    assert len(selected) <= min(num_classes, count + len(positives))
    if not positives:
        assert len(selected) == count


@given(dim=st.integers(1, 1100), share=st.floats(0, 1), seed=INT64, step=INT64)
def test_features_equal_the_oracle(dim, share, seed, step):
    count = max(1, round(share * dim))
    selected = select_features(dim, count / dim, seed=seed, step=step)
    assert selected.dtype == torch.int64
    assert selected.tolist() == expected_features(dim, count, seed, step)
    assert len(set(selected.tolist())) == count


@given(population=populations(), cuts=st.lists(st.integers(0, 1200), max_size=5), step=INT64)
def test_shards_concatenate_to_the_whole(population, cuts, step):
    num_classes, rate, positives = population
    edges = [0, *sorted(min(cut, num_classes) for cut in cuts), num_classes]
    shards = [
        select_classes(num_classes, rate, positives, seed=9, step=step, start=start, stop=stop)
        for start, stop in itertools.pairwise(edges)
    ]
    whole = select_classes(num_classes, rate, positives, seed=9, step=step)
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("num_classes", [1, 255, 256, 257, 1000])
def test_rate_one_is_everything(num_classes):
    selected = select_classes(num_classes, 1.0, [0], seed=0, step=0)
    assert torch.equal(selected, torch.arange(num_classes))
    assert torch.equal(select_features(num_classes, 1.0, seed=0, step=0), selected)


def test_tiny_rate_still_draws_one_class():
    drawn = {select_classes(500, 1e-6, [], seed=0, step=step).item() for step in range(200)}
    assert len(drawn) > 100


def test_more_positives_than_quota_are_all_kept_and_nothing_is_added():
    positives = list(range(100, 200))
    assert select_classes(256, 0.1, positives, seed=0, step=0).tolist() == positives


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_each_seed_and_step_draws_its_own_sets(vary):
    fixed = {"seed": 3, "step": 3}
    classes, features = set(), set()
    for value in [-(2**63), -1, *range(20), 2**40, 2**63 - 1]:
        at = {**fixed, vary: value}
        classes.add(tuple(select_classes(1000, 0.1, [], **at).tolist()))
        features.add(tuple(select_features(512, 0.5, **at).tolist()))
    assert len(classes) == len(features) == 24


def test_seed_and_step_do_not_stand_for_each_other():
    pairs = [(1, 2), (2, 1), (0, 3), (3, 0)]
    drawn = [select_classes(1000, 0.1, [], seed=seed, step=step) for seed, step in pairs]
    assert len({tuple(d.tolist()) for d in drawn}) == len(pairs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_positives_may_be_any_integers(dtype):
    expected = select_classes(1000, 0.05, [3, 200, 77], seed=0, step=0)
    assert {3, 77, 200} <= set(expected.tolist())
    strided = torch.tensor([77, 0, 200, 0, 3, 0, 77, 0], dtype=dtype)[::2]
    assert torch.equal(select_classes(1000, 0.05, strided, seed=0, step=0), expected)
    empty = torch.empty(0, dtype=dtype)
    assert torch.equal(
        select_classes(1000, 0.05, empty, seed=0, step=0),
        select_classes(1000, 0.05, [], seed=0, step=0),
    )


def test_the_step_may_be_a_buffer():
    at_seven = select_classes(1000, 0.1, [], seed=1, step=7)
    assert torch.equal(select_classes(1000, 0.1, [], seed=1, step=torch.tensor(7)), at_seven)


# --- that it is fair ----------------------------------------------------------


def class_draws(num_classes, count, positives, draws, vary):
    """Membership [draws, num_classes] of selections at consecutive seeds or steps."""
    labels = np.array(positives, np.int64)
    member = np.zeros((draws, num_classes), np.float32)
    for value in range(draws):
        at = (value, 11) if vary == "seed" else (11, value)
        index, _ = _engine.select_classes(labels, num_classes, count, *at, -100, 0, num_classes)
        member[value, index] = 1
    return member


def single_statistic(member):
    """Counts within a set of which each row draws a known number: chi-square with n - 1."""
    n = member.shape[1]
    share = member.mean(axis=1, dtype=np.float64)
    counts = member.sum(axis=0, dtype=np.float64)
    return np.sum((counts - counts.mean()) ** 2) / np.sum(share * (1 - share) * n / (n - 1))


def pair_statistic(member):
    """Counts of all pairs, single-class effects projected out: chi-square with n (n - 3) / 2.

    For uniform sets of q among n, the pair indicators' covariance acts on what is left after the
    projection as one number, p2 - 2 p3 + p4, with pk the probability of k given classes.
    """
    draws, n = member.shape
    q = int(member[0].sum())
    pairs = (member.T @ member).astype(np.float64)
    np.fill_diagonal(pairs, 0)
    row = pairs.sum(axis=1)
    mean = row.sum() / (n * (n - 1))
    effect = (row - row.mean()) / (n - 2)
    residual = pairs - mean - effect[:, None] - effect[None, :]
    p2 = q * (q - 1) / (n * (n - 1))
    p3 = p2 * (q - 2) / (n - 2)
    p4 = p3 * (q - 3) / (n - 3)
    upper = residual[np.triu_indices(n, 1)]
    return np.sum(upper**2) / (draws * (p2 - 2 * p3 + p4))


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize(("num_classes", "count"), [(1000, 100), (300, 2), (40, 7), (3, 1)])
def test_each_class_is_equally_likely(num_classes, count, vary):
    member = class_draws(num_classes, count, [], 2500, vary)
    assert np.all(member.sum(axis=1) == count)
    blocks = [member[:, begin : begin + 256] for begin in range(0, num_classes, 256)]
    within = sum(single_statistic(block) for block in blocks)
    assert_chi_square(within, num_classes - len(blocks))
    for block in blocks:
        fair = count * block.shape[1] / num_classes
        deviation = np.sqrt(len(block) * (fair % 1) * (1 - fair % 1))
        assert abs(block.sum() - len(block) * fair) <= 4 * deviation


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize(("num_classes", "count"), [(256, 26), (256, 200), (200, 20), (20, 5)])
def test_each_pair_in_a_block_is_equally_likely(num_classes, count, vary):
    member = class_draws(num_classes, count, [], 5000, vary)
    assert_chi_square(pair_statistic(member), num_classes * (num_classes - 3) // 2)


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize("distance", [1, 2])
def test_blocks_draw_independently(distance, vary):
    draws, quota, n = 5000, 26, 256
    member = class_draws(3 * n, 3 * quota, [], draws, vary)
    first, second = member[:, :n], member[:, distance * n :][:, :n]
    pairs = (first.T @ second).astype(np.float64)
    residual = pairs - pairs.mean(0) - pairs.mean(1, keepdims=True) + pairs.mean()
    variance = quota / n * (1 - quota / n) * n / (n - 1)
    assert_chi_square(np.sum(residual**2) / (draws * variance**2), (n - 1) ** 2)

    # The same counts gathered by XOR difference, where related keys would show first.
    position = np.arange(n)
    by_difference = np.array([pairs[position, position ^ d].sum() for d in range(n)])
    p, p2 = quota / n, quota * (quota - 1) / (n * (n - 1))
    spread = n * (p**2 - p**4) + n * (n - 1) * (p2**2 - p**4)
    centred = by_difference - draws * n * p**2
    assert_chi_square(np.sum(centred**2) / (draws * spread * n / (n - 1)), n - 1)


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_successive_draws_overlap_by_chance_only(vary):
    draws, q, n = 5000, 26, 256
    member = class_draws(n, q, [], draws, vary)
    overlap = (member[1:] * member[:-1]).sum(axis=1)
    variance = q * (q / n) * (1 - q / n) * (n - q) / (n - 1)
    assert abs(overlap.mean() - q * q / n) < 3.9 * np.sqrt(variance / (draws - 1))


def test_negatives_beside_positives_are_equally_likely():
    positives = [0, 1, 2, 100, 101, 250]
    member = class_draws(256, 30, positives, 2500, "step")
    assert np.all(member[:, positives] == 1)
    negatives = np.delete(member, positives, axis=1)
    assert np.all(negatives.sum(axis=1) == 24)
    assert_chi_square(single_statistic(negatives), 249)


@pytest.mark.parametrize("vary", ["seed", "step"])
@pytest.mark.parametrize(("dim", "count"), [(8, 3), (100, 25), (512, 256), (768, 100)])
def test_each_feature_and_each_pair_is_equally_likely(dim, count, vary):
    member = np.zeros((2500, dim), np.float32)
    for value in range(len(member)):
        at = {"seed": 5, "step": 5, vary: value}
        member[value, _engine.select_features(dim, count, **at)] = 1
    assert_chi_square(single_statistic(member), dim - 1)
    assert_chi_square(pair_statistic(member), dim * (dim - 3) // 2)


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0001, float("nan"), float("inf")])
def test_rates_outside_the_unit_interval_are_rejected(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        select_classes(100, rate, [], seed=0, step=0)
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"):
        select_features(100, rate, seed=0, step=0)


def test_a_rate_that_leaves_no_dimension_is_rejected():
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 0"):
        select_features(100, 0, seed=0, step=0)
    with pytest.raises(ValueError, match="at least one dimension"):
        select_features(100, 0.004, seed=0, step=0)
    assert len(select_features(100, 0.005, seed=0, step=0)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer in"),
        ({"num_classes": 2**32}, "num_classes must be an integer in"),
        ({"start": -1}, "start must be an integer in"),
        ({"start": 11, "stop": 10}, r"start must be an integer in \[0, 10\], got 11"),
        ({"stop": 101}, r"stop must be an integer in \[0, 100\], got 101"),
        ({"seed": 2**63}, "seed must be an integer that fits in int64, got"),
        ({"positives": [5, 99, 100, -1]}, r"num_classes = 100\), got 100 at position 2"),
        ({"positives": [0, -100]}, "got -100 at position 1"),
        (
            {"positives": torch.zeros(2, 2, dtype=torch.int64)},
            r"one-dimensional, got shape \(2, 2\)",
        ),
    ],
)
def test_bad_values_are_named(change, message):
    arguments = {"num_classes": 100, "rate": 0.1, "positives": [], "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=message):
        select_classes(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 10.0}, "num_classes must be an integer in .*, got 10.0"),
        ({"step": "1"}, "step must be an integer that fits in int64, got .1"),
        ({"rate": "half"}, r"rate must be a number in \[0, 1\], got str"),
        ({"positives": [0.5]}, "positives must hold integers"),
        ({"positives": torch.tensor([True])}, "positives must hold integers"),
    ],
)
def test_bad_types_are_named(change, message):
    arguments = {"num_classes": 100, "rate": 0.1, "positives": [], "seed": 0, "step": 0}
    with pytest.raises(TypeError, match=message):
        select_classes(**{**arguments, **change})
