"""The tensor-free core: margin, bijections, block quotas, label search, selection with slots."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import chdtr

from unicom_ext import _engine

INT64 = st.integers(-(2**63), 2**63 - 1)
KEYS = st.integers(0, 2**64 - 1)


# --- margin -------------------------------------------------------------------


def mp_margin(cosine, m1, m2, m3, exact, linear):
    """The definition, in 50 digits."""
    with mpmath.workdps(50):
        c, m1, m2, m3 = (mpmath.mpf(float(v)) for v in (cosine, m1, m2, m3))
        c = min(max(c, mpmath.mpf(-1)), mpmath.mpf(1))
        theta, pi = mpmath.acos(c), mpmath.pi
        joint = min(max((pi - m2) / m1, mpmath.mpf(0)), pi)
        if linear and theta > joint:
            drop = max((pi - joint) * mpmath.sin(joint), 1 + mpmath.cos(joint))
            return float(c - drop - m3), 1.0
        angle = max(m1 * theta + m2, 0) if linear else m1 * theta + m2
        psi = mpmath.cos(angle) - m3
        slope = m1 * mpmath.sin(angle) / max(mpmath.sin(theta), mpmath.mpf("1e-6"))
        return float(psi), float(slope) if exact else 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("m1", "m2", "m3"),
    [
        (1, 0, 0),
        (1, 0.5, 0),
        (1, 0, 0.35),
        (1.35, 0, 0),
        (0.9, 0.4, 0.15),
        (3, 0.25, 0.1),
        (1, -0.3, 0),
    ],
)
def test_margin_matches_its_definition(dtype, exact, linear, m1, m2, m3):
    eps = np.finfo(dtype).eps
    m1, m2, m3 = (float(dtype(m)) for m in (m1, m2, m3))
    ends = 1 - np.geomspace(eps / 2, 1e-3, 12)
    cosine = np.concatenate([np.linspace(-0.999, 0.999, 101), ends, -ends, [1.0, -1.0]]).astype(
        dtype
    )
    joint = min(max((np.pi - m2) / m1, 0.0), np.pi)
    away_from_joint = np.abs(np.arccos(cosine.astype(np.float64)) - joint) > 1e-3
    # At the end itself the question is only whether rounding put theta past a joint at pi.
    cosine = cosine[away_from_joint | (joint == np.pi)]

    psi, slope = _engine.margin(cosine, m1, m2, m3, exact=exact, linear=linear)
    assert psi.dtype == slope.dtype == dtype

    expected = np.array([mp_margin(c, m1, m2, m3, exact, linear) for c in cosine])
    angle_error = 2 * eps * (m1 * np.pi + abs(m2))
    np.testing.assert_allclose(psi, expected[:, 0], rtol=0, atol=angle_error + 4 * eps)
    sine = np.maximum(np.sqrt(1 - cosine.astype(np.float64) ** 2), 1e-6)
    error = np.abs(slope - expected[:, 1])
    assert np.all(error <= m1 * angle_error / sine + 8 * eps * np.abs(expected[:, 1]))


@given(
    cosine=st.floats(-0.99, 0.99),
    m1=st.floats(0.5, 4),
    m2=st.floats(-0.5, 1),
    m3=st.floats(0, 0.5),
)
def test_exact_slope_is_the_derivative(cosine, m1, m2, m3):
    h = 1e-6
    (low, high), _ = _engine.margin(np.array([cosine - h, cosine + h]), m1, m2, m3)
    _, slope = _engine.margin(np.array([cosine]), m1, m2, m3, exact=True)
    assert slope[0] == pytest.approx((high - low) / (2 * h), rel=1e-6, abs=1e-6)


@given(m1=st.floats(0.25, 5), m2=st.floats(-3.14, 3.14), m3=st.floats(0, 1))
@example(m1=1.0, m2=0.5, m3=0.0)
@example(m1=1.0, m2=-0.4, m3=0.0)
@example(m1=4.0, m2=0.0, m3=0.0)
def test_linear_continuation_is_monotone(m1, m2, m3):
    cosine = np.cos(np.linspace(np.pi, 0, 2001))
    psi, slope = _engine.margin(cosine, m1, m2, m3, exact=True, linear=True)
    assert np.all(np.diff(psi) >= -1e-14)
    assert np.all(slope >= -1e-12)


def test_keep_is_not_monotone_where_linear_is():
    cosine = np.cos(np.linspace(np.pi, 0, 2001))
    assert np.any(np.diff(_engine.margin(cosine, 1.0, 0.5)[0]) < -1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_linear_holds_psi_where_the_angle_is_negative(exact):
    theta = np.array([0.0, 0.1, 0.39, 0.41, 0.8])
    psi, slope = _engine.margin(np.cos(theta), 1.0, -0.4, 0.1, exact=exact, linear=True)
    np.testing.assert_array_equal(psi[:3], 1 - 0.1)
    np.testing.assert_array_equal(slope[:3], 0.0 if exact else 1.0)
    np.testing.assert_allclose(psi[3:], np.cos(theta[3:] - 0.4) - 0.1, rtol=0, atol=1e-15)


def test_linear_is_the_continuation_of_arcface():
    m2 = 0.5
    cosine = np.linspace(-1, np.cos(np.pi - m2) - 1e-9, 50)
    psi, _ = _engine.margin(cosine, 1.0, m2, 0.0, linear=True)
    np.testing.assert_allclose(psi, cosine - m2 * np.sin(m2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("linear", [False, True])
def test_beyond_one_is_as_at_one_and_finite(dtype, linear):
    one = dtype(1)
    outside = np.array(
        [np.nextafter(one, dtype(2)), 1.5, -np.nextafter(one, dtype(2)), -1.5], dtype
    )
    at_the_end = np.sign(outside)
    for exact in (False, True):
        got = _engine.margin(outside, 1.2, 0.5, 0.1, exact=exact, linear=linear)
        end = _engine.margin(at_the_end, 1.2, 0.5, 0.1, exact=exact, linear=linear)
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got, end)


def test_nan_stays_nan():
    for linear in (False, True):
        psi, slope = _engine.margin(np.array([np.nan, 0.5]), 1.0, 0.5, exact=True, linear=linear)
        assert np.isnan(psi[0])
        assert np.isnan(slope[0])
        assert np.isfinite(psi[1])
        assert np.isfinite(slope[1])


@pytest.mark.parametrize("m1", [0.0, -1.0, np.inf, np.nan])
def test_margin_rejects_m1(m1):
    with pytest.raises(ValueError, match="m1"):
        _engine.margin(np.array([0.5]), m1)


# --- bijections ---------------------------------------------------------------


@given(size=st.integers(1, 3000), key=KEYS)
@example(size=1, key=0)
@example(size=256, key=0)
@example(size=257, key=2**64 - 1)
def test_bijection_visits_every_value_once(size, key):
    image = _engine.bijection(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 + 11, 2**40 + 1, 2**62])
def test_bijection_of_large_ranges(size):
    index = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)])
    image = _engine.bijection(index, size, 42)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == len(index)
    # Neighbours are sent everywhere: every sixteenth of the range gets its share, within 6 sigma.
    share = np.bincount(image // (size // 16 + 1), minlength=16)
    assert np.all(np.abs(share - len(index) / 16) < 6 * np.sqrt(len(index) / 16))


def test_bijection_keeps_the_shape_and_depends_on_the_key():
    index = np.arange(600).reshape(20, 30)
    first, second = (_engine.bijection(index, 1000, key) for key in (1, 2))
    assert first.shape == index.shape
    assert np.mean(first == second) < 0.02


@pytest.mark.parametrize(("index", "size"), [(5, 5), (-1, 5), (0, 0), (0, 2**62 + 1)])
def test_bijection_rejects(index, size):
    with pytest.raises(ValueError, match="must be in"):
        _engine.bijection(np.array([index]), size, 0)


@pytest.mark.parametrize("index", [[1.5], ["3"], [True]])
def test_bijection_takes_integers_alone(index):
    with pytest.raises(TypeError, match="index must be integers"):
        _engine.bijection(index, 5, 0)


@given(key=KEYS)
def test_block_order_is_a_permutation(key):
    np.testing.assert_array_equal(np.sort(_engine.block_order(key)), np.arange(256))


def test_differences_in_the_block_order_are_uniform():
    """The share of each XOR difference among the first 26 outputs: what too few rounds get wrong.

    Under a uniform order any two nonzero differences are alike (linear maps of GF(2)^8 carry one
    pair of them to any other), so the 255 counts have one variance and one covariance, and their
    sum is fixed: the statistic below is chi-square with 254 degrees of freedom.
    """
    drawn, trials, n = 26, 30_000, 256
    counts = np.zeros(n)
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    for start in range(0, trials, 5000):
        member = np.zeros((5000, n), np.float32)
        for row in range(5000):
            member[row, _engine.block_order(start + row)[:drawn]] = 1
        # Twice the pairs of each difference, by Wiener-Khinchin on the group.
        power = (member @ hadamard.astype(np.float32)).astype(np.float64) ** 2
        counts += hadamard @ power.sum(axis=0) / n / 2
    pair = drawn * (drawn - 1) / (n * (n - 1))
    quad = pair * (drawn - 2) * (drawn - 3) / ((n - 2) * (n - 3))
    variance = 128 * (pair - pair**2) + 128 * 127 * (quad - pair**2)
    centred = counts[1:] - trials * 128 * pair
    assert abs(centred.sum()) < 1e-3
    statistic = np.sum(centred**2) / (trials * variance * 255 / 254)
    assert 5e-5 < chdtr(254, statistic) < 1 - 5e-5


# --- quotas -------------------------------------------------------------------


@st.composite
def populations(draw, largest=5000):
    num_classes = draw(st.integers(1, largest))
    return num_classes, draw(st.integers(1, num_classes))


@given(population=populations(), seed=INT64, step=INT64)
def test_quotas_are_fair_shares_that_sum_to_the_count(population, seed, step):
    num_classes, count = population
    quotas = _engine.block_quotas(num_classes, count, seed, step)
    edges = np.minimum(np.arange(len(quotas) + 1) * _engine.BLOCK_SIZE, num_classes)
    sizes = np.diff(edges)
    assert edges[-1] == num_classes
    assert sizes.min() >= 1
    assert quotas.sum() == count
    assert np.all(quotas >= 0)
    assert np.all(quotas <= sizes)
    assert np.all(np.abs(quotas - count * sizes / num_classes) < 1)


def test_quotas_past_32_bits():
    num_classes, count = 3_000_000_001, 2_999_999_987
    quotas = _engine.block_quotas(num_classes, count, 0, 0)
    assert quotas.sum() == count
    assert quotas[:-1].min() >= 255
    assert quotas.max() == 256


def test_mean_quota_is_the_fair_share():
    num_classes, count, steps = 1000, 77, 20_000
    quotas = np.array([_engine.block_quotas(num_classes, count, 5, step) for step in range(steps)])
    fair = count * np.array([256, 256, 256, 232]) / num_classes
    deviation = np.sqrt(steps * (fair % 1) * (1 - fair % 1))
    assert np.all(np.abs(quotas.sum(axis=0) - steps * fair) < 4 * deviation)


@pytest.mark.parametrize(
    ("rate", "population", "size"), [(0.1, 1000, 100), (0.5, 5, 3), (0.5, 4, 2)]
)
def test_sample_size_rounds_half_up(rate, population, size):
    assert _engine.sample_size(rate, population) == size
    assert _engine.sample_size(1.0, population) == population


@pytest.mark.parametrize("rate", [math.nan, -0.1, 1.1, math.inf])
def test_sample_size_rejects(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        _engine.sample_size(rate, 100)


def test_a_name_that_c_would_cut_off():
    before = _engine.cpu_capability()
    assert not _engine.set_cpu_capability("portable\0")
    assert _engine.cpu_capability() == before


# --- selection with slots -----------------------------------------------------

IGNORED = -100


@st.composite
def selections(draw):
    num_classes, count = draw(populations(2000))
    labels = draw(st.lists(st.integers(0, num_classes - 1) | st.just(IGNORED), max_size=60))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, num_classes)] * 2)))
    return num_classes, count, labels, start, stop


@given(selection=selections(), seed=INT64, step=INT64, dtype=st.sampled_from([np.int32, np.int64]))
def test_slots_find_the_labels(selection, seed, step, dtype):
    num_classes, count, labels, start, stop = selection
    labels = np.array(labels, dtype)
    class_index, slot = _engine.select_classes(
        labels, num_classes, count, seed, step, IGNORED, start, stop
    )
    assert np.all(np.diff(class_index) > 0)
    assert np.all((class_index >= start) & (class_index < stop))
    owned = (labels != IGNORED) & (labels >= start) & (labels < stop)
    np.testing.assert_array_equal(slot >= 0, owned)
    np.testing.assert_array_equal(slot[~owned], np.where(labels[~owned] == IGNORED, -1, -2))
    np.testing.assert_array_equal(class_index[slot[owned]], labels[owned])


def test_ignored_labels_are_not_positives_even_if_they_name_a_class():
    labels = np.array([7, 7, 300])
    class_index, slot = _engine.select_classes(labels, 512, 2, 0, 0, 7, 0, 512)
    without, _ = _engine.select_classes(labels[2:], 512, 2, 0, 0, -100, 0, 512)
    np.testing.assert_array_equal(class_index, without)
    assert slot[0] == slot[1] == -1
    assert class_index[slot[2]] == 300


@pytest.mark.parametrize(("start", "stop"), [(0, 100_003), (1_001, 99_999), (50_000, 50_000)])
@pytest.mark.parametrize("count", [1, 10_000, 100_003])
def test_threads_do_not_change_the_result(start, stop, count):
    labels = np.random.default_rng(0).integers(0, 100_003, 500)
    one, *others = (
        _engine.select_classes(labels, 100_003, count, 3, 4, -100, start, stop, threads=threads)
        for threads in (1, 2, 7)
    )
    for other in others:
        np.testing.assert_array_equal(other[0], one[0])
        np.testing.assert_array_equal(other[1], one[1])


def test_selection_at_the_far_end_of_the_id_space():
    num_classes = _engine.MAX_CLASSES
    labels = np.array([num_classes - 1, 5, num_classes - 600])
    class_index, slot = _engine.select_classes(
        labels, num_classes, num_classes // 10, 0, 0, -100, num_classes - 1000, num_classes
    )
    assert class_index[-1] == num_classes - 1
    assert slot[1] == -2
    np.testing.assert_array_equal(class_index[slot[[0, 2]]], labels[[0, 2]])
    assert 60 < len(class_index) < 150


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 2**32}, "num_classes"),
        ({"count": -1}, "count"),
        ({"count": 101}, "count"),
        ({"start": -1}, "start"),
        ({"start": 60, "stop": 50}, "start"),
        ({"stop": 101}, "stop"),
        ({"threads": 0}, "threads"),
        ({"labels": np.zeros((2, 2), np.int64)}, "labels"),
    ],
)
def test_selection_rejects(change, named):
    valid = {
        "labels": np.zeros(3, np.int64),
        "num_classes": 100,
        "count": 10,
        "seed": 0,
        "step": 0,
        "ignore_index": -100,
        "start": 0,
        "stop": 100,
    }
    _engine.select_classes(**valid)
    with pytest.raises(ValueError, match=named):
        _engine.select_classes(**{**valid, **change})


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_first_bad_label_is_found(dtype):
    find = _engine.find_bad_label
    labels = np.array([0, 9, -100, 10, -1], dtype)
    assert find(labels, 10, -100) == 3
    assert find(labels, 11, -100) == 4
    assert find(labels, 10, 10) == 2
    assert find(labels[:3], 10, -100) == -1
    assert find(labels[:0], 10, -100) == -1


# --- build --------------------------------------------------------------------


def test_build_info_names_the_build():
    info = _engine.build_info()
    assert info["cxx_standard"] >= 201703
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert isinstance(info["flags"], str)
