"""Confidence intervals against all resamples there are, against SciPy, and how often they hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy
import torch

from unicom_ext.retrieval import bootstrap, evaluate

NAMES = ["Recall@1", "Recall@5", "mAP@R", "R-precision", "mAP@1", "mAP@5"]


def problem(seed=0, classes=12, dim=6):
    """Classes of many sizes, of which some are hard."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(torch.arange(classes) % 5 + 2)
    centers = torch.randn(classes, dim, generator=generator)
    spread = torch.rand(classes, 1, generator=generator)
    x = centers[labels] + spread[labels] * torch.randn(len(labels), dim, generator=generator)
    return x, labels


def per_query(x, labels, k):
    """Recall@k of each query, one at a time: float64 [n]."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = cosine.topk(k, dim=1).indices
    return (labels[nearest] == labels[:, None]).any(1).double().numpy()


def quantiles(values):
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20])
def test_the_intervals_are_those_of_all_resamples(block_bytes):
    """Of four units there are 4^4, all equally likely; the values are few, so quantiles are too."""
    sums = torch.tensor([[3, 3, 0.5], [1, 0, 0.25], [2, 1, 2], [1, 1, 0]], dtype=torch.float64)
    drawn = np.array(list(itertools.product(range(4), repeat=4)))
    total = sums.numpy()[drawn].sum(1)
    right = quantiles_of_columns(total[:, 1:] / total[:, :1])
    found = bootstrap.intervals(sums, 10_000, 0, block_bytes)
    assert np.array(found) == pytest.approx(right, abs=0.02)
    assert found == bootstrap.intervals(sums, 10_000, 0, 1 << 22)  # whatever fits at a time
    assert found != bootstrap.intervals(sums, 100, 1, 1 << 22)


def quantiles_of_columns(values):
    return np.array([quantiles(column) for column in values.T])


@pytest.mark.parametrize("over", ["classes", "queries"])
def test_intervals_are_scipys(over):
    """Which draws other resamples: as near as 3,000 of them make it."""
    x, labels = problem()
    (result,) = evaluate(x, labels, ks=[1, 5], bootstrap=3000, bootstrap_over=over)
    assert list(result.intervals) == list(result.figures) == NAMES
    for k in (1, 5):
        values = per_query(x, labels, k)
        units = labels.numpy() if over == "classes" else np.arange(len(labels))
        sums, sizes = np.bincount(units, values), np.bincount(units)

        def average(sums, sizes, axis):
            return sums.sum(axis) / sizes.sum(axis)

        right = scipy.stats.bootstrap(
            (sums, sizes), average, paired=True, n_resamples=3000, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        assert result.intervals[f"Recall@{k}"] == pytest.approx(tuple(right), abs=0.015)
        low, high = result.intervals[f"Recall@{k}"]
        assert low < result.recall[k] < high


def test_intervals_over_classes_hold_where_those_over_queries_do_not():
    """The true average lies within 95 % of the intervals over classes, of fewer over queries, where
    classes differ: 40 classes of 10 queries, 300 times."""
    rng = np.random.default_rng(0)
    hold = {"classes": 0, "queries": 0}
    for _ in range(300):
        share = rng.beta(2, 2, 40)  # of the queries of each class that are right: 1/2 on average
        values = torch.from_numpy(rng.random((40, 10)) < share[:, None]).double()
        tables = {
            "classes": torch.stack([torch.full((40,), 10.0).double(), values.sum(1)], 1),
            "queries": torch.stack([torch.ones(400).double(), values.flatten()], 1),
        }
        for over, sums in tables.items():
            ((low, high),) = bootstrap.intervals(sums, 200, 0, 1 << 24)
            hold[over] += low <= 0.5 <= high
    assert 0.90 < hold["classes"] / 300 < 0.98
    assert hold["queries"] / 300 < 0.80


def test_intervals_change_nothing_else_and_are_the_same_again():
    x, labels = problem()
    plain = evaluate(x, labels, dims=[2, 6])
    found = evaluate(x, labels, dims=[2, 6], bootstrap=100)
    assert [r._replace(intervals=None) for r in found] == plain
    assert found == evaluate(x, labels, dims=[2, 6], bootstrap=100)
    # Queries in any order: units are classes.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for r, other in zip(found, evaluate(x[order], labels[order], dims=[2, 6], bootstrap=100),
                        strict=True):  # fmt: skip
        for name in r.intervals:
            assert r.intervals[name] == pytest.approx(other.intervals[name], abs=1e-12)
    assert found != evaluate(x, labels, dims=[2, 6], bootstrap=100, seed=1)


def test_queries_that_count_not_are_not_drawn():
    """One without a label and one alone in its class: as if they were only in the gallery."""
    x, labels = problem()
    extra = torch.cat([labels, torch.tensor([-1, 99])])
    rows = torch.cat([x, torch.ones(2, 6)])
    (found,) = evaluate(rows, extra, bootstrap=200)
    (right,) = evaluate(
        x, labels, rows, extra, bootstrap=200,
        query_groups=torch.arange(len(x)), gallery_groups=torch.arange(len(rows)),
    )  # fmt: skip
    assert found.intervals == right.intervals


def on_ranks(group, x, labels):
    return evaluate(x, labels, bootstrap=200, ks=[1, 5], process_group=group)[0].intervals


def test_ranks_find_the_same(ranks):
    x, labels = problem()
    right = on_ranks(None, x, labels)
    for found in ranks.run(3, on_ranks, x, labels):
        for name, interval in right.items():
            assert found[name] == pytest.approx(interval, abs=1e-12)


X, Y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("error", "message", "labels", "keywords"),
    [
        (ValueError, "bootstrap: got 99, must be 0, for no intervals, or at least 100 resamples", Y,
         {"bootstrap": 99}),
        (ValueError, "bootstrap: got -1, must be 0, for no intervals, or at least 100 resamples", Y,
         {"bootstrap": -1}),
        (TypeError, "bootstrap: got 2.5, must be an int", Y, {"bootstrap": 2.5}),
        (TypeError, "seed: got 'a', must be an int", Y, {"seed": "a"}),
        (ValueError, "seed: got -1, must be from 0 to 2^63 - 1", Y, {"seed": -1}),
        (ValueError, "bootstrap_over: got 'rows', must be 'classes' or 'queries'", Y,
         {"bootstrap_over": "rows"}),
        (ValueError, "bootstrap: all queries that count have one label, and a bootstrap over "
         'classes needs several; bootstrap_over="queries" draws queries', torch.zeros_like(Y),
         {"bootstrap": 100}),
    ],
)  # fmt: skip
def test_errors(error, message, labels, keywords):
    with pytest.raises(error) as caught:
        evaluate(X, labels, **keywords)
    assert str(caught.value) == message
