"""Retrieval against a brute-force oracle in float64, its tie rule, its memory, its errors."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import LiveBytes
from torch.utils._python_dispatch import TorchDispatchMode

from unicom_ext.retrieval import Result, evaluate, topk
from unicom_ext.utils import search

BLOCK_BYTES = st.sampled_from([1500, 4000, 20_000, search.DEFAULT_BLOCK_BYTES])


def unit(x):
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def cosines(queries, gallery, dim):
    """float64 [Nq, Ng]; -inf where a query meets itself (gallery None)."""
    q = unit(queries[:, :dim].double().numpy())
    if gallery is None:
        c = q @ q.T
        np.fill_diagonal(c, -np.inf)
        return c
    return q @ unit(gallery[:, :dim].double().numpy()).T


def hide_own_groups(cosine, query_groups, gallery_groups):
    """-inf where an item is of the query's own group."""
    if query_groups is None:
        return cosine
    mine, theirs = query_groups.numpy()[:, None], gallery_groups.numpy()
    return np.where((mine == theirs) & (mine >= 0), -np.inf, cosine)


def relevance(query_labels, gallery_labels):
    """bool [Nq, Ng] of labels [Nq] and [Ng] or [Ng, P]."""
    rows = gallery_labels.reshape(len(gallery_labels), -1).tolist()
    return np.array([[label >= 0 and label in row for row in rows] for label in query_labels])


def oracle(cosine, query_labels, gallery_labels, ks, bonus=0.0):
    """The definitions by full sorting, as a Result of dim 0.

    cosine: [Nq, Ng], -inf where they do not meet; bonus: added to that of every relevant item.
    """
    recall, precision_at_k = {k: [] for k in ks}, {k: [] for k in ks}
    precision_at_r, r_precision, alone, unlabelled = [], [], 0, 0
    relevant = relevance(query_labels, gallery_labels)
    for c, label, right in zip(cosine, query_labels, relevant, strict=True):
        if label < 0:
            unlabelled += 1
            continue
        item = np.isfinite(c)
        wrong = ~right[item]
        r = int((~wrong).sum())
        if r == 0:
            alone += 1
            continue
        order = np.lexsort((~wrong, -(c[item] + bonus * ~wrong)))  # ties: the wrong one first
        right = ~wrong[order]
        # P(i) rel(i)
        terms = right * np.cumsum(right) / np.arange(1, len(right) + 1)
        for k in ks:
            recall[k].append(right[:k].any())
            precision_at_k[k].append(terms[:k].sum() / min(k, r))
        precision_at_r.append(terms[:r].sum() / r)
        r_precision.append(right[:r].sum() / r)
    return Result(
        dim=0,
        recall={k: np.mean(v) for k, v in recall.items()},
        map_at_r=np.mean(precision_at_r),
        num_queries=len(precision_at_r),
        num_excluded=alone,
        r_precision=np.mean(r_precision),
        map_at_k={k: np.mean(v) for k, v in precision_at_k.items()},
        num_unlabelled=unlabelled,
        num_distractors=int((gallery_labels.reshape(len(gallery_labels), -1) < 0).all(1).sum()),
    )


def figures(result):
    """All averages, one after the other."""
    averages = result.map_at_r, result.r_precision
    return np.array([*result.recall.values(), *averages, *result.map_at_k.values()])


def counts(result):
    return result.num_queries, result.num_excluded, result.num_unlabelled, result.num_distractors


@st.composite
def tied_rows(draw, min_rows=2, max_rows=14):
    """[n, 16] whose cosines are exact in fp32 at 1, 4 and 16 dimensions, so ties are real ties."""
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=16, max_size=16)
    axis = st.tuples(st.integers(0, 5), st.sampled_from([-8.0, 0.0, 0.25])).map(
        lambda a: [a[1] * (i == a[0]) for i in range(16)]
    )
    rows = draw(st.lists(signs | axis, min_size=min_rows, max_size=max_rows))
    copies = draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))  # exact duplicates
    return torch.tensor(rows + [rows[i] for i in copies])


def labels_for(draw, rows):
    """Ragged: label 0 is common, others are rare; some rows have none."""
    label = st.sampled_from([0, 0, 0, 1, 1, 2, 7, -1, -3])
    return torch.tensor(draw(st.lists(label, min_size=len(rows), max_size=len(rows))))


@st.composite
def retrieval_problem(draw, rows):
    """Queries and gallery with labels as `evaluate` takes them; groups as its keywords."""
    queries = draw(rows)
    gallery = draw(st.none() | rows)
    both = [queries] if gallery is None else [queries, gallery]
    problem = [x for rows in both for x in (rows, labels_for(draw, rows))]
    if gallery is not None and draw(st.booleans()):  # several labels of an item, some of them equal
        others = [labels_for(draw, gallery) for _ in range(draw(st.integers(0, 2)))]
        problem[3] = torch.stack([problem[3], *others], dim=1)
    groups = {}
    if draw(st.booleans()):
        groups = {
            name: labels_for(draw, rows)
            for name, rows in zip(("query_groups", "gallery_groups"), both, strict=False)
        }
    return problem, groups


def expected(problem, groups, dim, ks, bonus=0.0):
    """What the oracle says; None where no query has a relevant item."""
    queries, query_labels, gallery, gallery_labels = (*problem, None, None)[:4]
    mine = groups.get("query_groups")
    cosine = cosines(queries, gallery, dim)
    cosine = hide_own_groups(cosine, mine, groups.get("gallery_groups", mine))
    among = query_labels if gallery is None else gallery_labels
    if not (relevance(query_labels.numpy(), among.numpy()) & np.isfinite(cosine)).any():
        return None
    return oracle(cosine, query_labels.numpy(), among.numpy(), ks, bonus)


@st.composite
def random_rows(draw):
    """Gaussian rows of any scale, with exact copies among them."""
    n, d = draw(st.integers(2, 25)), draw(st.sampled_from([6, 9]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(n, 9, generator=generator)
    x[:, d:] = 0.5
    x *= draw(st.sampled_from([1.0, 1e-30, 1e30]))
    return x[torch.randint(n, (n + 3,), generator=generator)]


@settings(max_examples=30)
@given(
    retrieval_problem(tied_rows()),
    st.lists(st.sampled_from([1, 2, 3, 100]), min_size=1, unique=True),
    BLOCK_BYTES,
)
@pytest.mark.filterwarnings("ignore:gallery")
def test_metrics_are_exact_with_ties(problem, ks, block_bytes):
    problem, groups = problem
    if expected(problem, groups, 16, ks) is None:
        with pytest.raises(ValueError, match="no query"):
            evaluate(*problem, **groups)
        return
    dims = [16, 1, 4]
    results = evaluate(*problem, **groups, dims=dims, ks=ks, block_bytes=block_bytes)
    assert [r.dim for r in results] == dims
    for result in results:
        right = expected(problem, groups, result.dim, ks)
        assert counts(result) == counts(right)
        assert list(result.recall) == list(result.map_at_k) == ks
        assert figures(result) == pytest.approx(figures(right), abs=1e-12)


@settings(max_examples=25)
@given(retrieval_problem(random_rows()), BLOCK_BYTES)
@pytest.mark.filterwarnings("ignore:gallery")
def test_metrics_on_any_rows(problem, block_bytes):
    """Rounding may swap neighbours, so the truth lies between two shifts of the relevant items."""
    problem, groups = problem
    dims, ks = [9, 5], [1, 2, 10]
    if expected(problem, groups, 9, ks) is None:
        return
    for result in evaluate(*problem, **groups, dims=dims, ks=ks, block_bytes=block_bytes):
        low, high = (
            figures(expected(problem, groups, result.dim, ks, bonus)) for bonus in (-2e-6, 2e-6)
        )
        assert (low - 1e-9 <= figures(result)).all()
        assert (figures(result) <= high + 1e-9).all()


@settings(max_examples=25)
@given(tied_rows(), st.none() | tied_rows(), st.data(), BLOCK_BYTES)
def test_topk_breaks_ties_by_index(queries, gallery, data, block_bytes):
    available = len(queries) - 1 if gallery is None else len(gallery)
    k = data.draw(st.integers(1, available))
    cosine, index = topk(queries, gallery, k, block_bytes=block_bytes)
    c = cosines(queries, gallery, 16)
    expected = np.stack([np.lexsort((np.arange(c.shape[1]), -row))[:k] for row in c])
    assert np.array_equal(index.numpy(), expected)
    assert np.array_equal(cosine.numpy(), np.take_along_axis(c, expected, 1))


@settings(max_examples=25)
@given(random_rows(), st.none() | random_rows(), st.data(), BLOCK_BYTES)
def test_topk_on_any_rows(queries, gallery, data, block_bytes):
    k = data.draw(st.integers(1, len(queries) - 1 if gallery is None else len(gallery)))
    cosine, index = topk(queries, gallery, k, block_bytes=block_bytes)
    c = cosines(queries, gallery, 9)
    assert np.allclose(cosine, np.take_along_axis(c, index.numpy(), 1), atol=1e-6)
    assert np.allclose(cosine, -np.sort(-c, axis=1)[:, :k], atol=1e-6)
    assert (cosine.abs() <= 1).all()
    assert all(len(set(row)) == k for row in index.tolist())
    if gallery is None:
        assert (index != torch.arange(len(queries))[:, None]).all()


@st.composite
def rows_of_any_kind(draw):
    """Clusters of rows as near as may be, or equal, of norms from one end to the other."""
    n, dim = draw(st.integers(4, 40)), draw(st.sampled_from([1, 3, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    centers = torch.randn(draw(st.integers(1, 4)), dim, generator=generator, dtype=torch.float64)
    away = draw(st.sampled_from([0.0, 1e-9, 3e-8, 1e-6, 1e-3, 1.0]))
    x = centers[torch.randint(len(centers), (n,), generator=generator)]
    x = x + away * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x = x[torch.randint(n, (n,), generator=generator)]  # some of them equal
    low, high = draw(st.sampled_from([(0, 0), (-3, 3), (-30, 30), (-250, 37)]))
    # Powers of two, so that equal rows stay it.
    power = torch.randint(low, high + 1, (n, 1), generator=generator) * 3
    x = x * torch.exp2(power.clamp(max=120).double())
    x[torch.rand(n, generator=generator) < 0.1] = 0
    return x if low < -30 else x.to(draw(st.sampled_from([torch.float32, torch.float64])))


def double_search(x, groups=None):
    """fp32 cosines of all rows with one another, by one product in double; -inf where not met."""
    largest = x.double().abs().amax(dim=1, keepdim=True)
    x = x.double() / largest.where(largest > 0, 1)
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1)
    cosine = (x @ x.T).float().fill_diagonal_(-torch.inf)
    if groups is not None:
        own = (groups[:, None] == groups) & (groups >= 0)
        cosine.masked_fill_(own, -torch.inf)
    return cosine


@settings(max_examples=25)
@given(rows_of_any_kind(), st.data(), BLOCK_BYTES)
def test_the_best_are_those_of_a_search_in_double(x, data, block_bytes):
    k = data.draw(st.integers(1, len(x) - 1))
    cosine, index = topk(x, k=k, block_bytes=block_bytes)
    right, order = double_search(x).sort(dim=1, descending=True, stable=True)
    # A double in the middle of two floats may have been rounded to either.
    torch.testing.assert_close(cosine, right[:, :k].clamp(-1, 1), rtol=2e-7, atol=1e-15)
    differ = index != order[:, :k]
    if differ.any():
        found = double_search(x).gather(1, index)
        assert (found - right[:, :k])[differ].abs().max() <= 6e-8


def test_a_copy_of_the_query_is_an_ordinary_item():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [-4.0, 3.0], [-4.0, 3.0]])
    assert topk(x, k=1)[1].flatten().tolist() == [1, 0, 3, 2]
    assert evaluate(x, torch.tensor([0, 0, 1, 1]))[0].recall[1] == 1
    # Copies with other labels: the only perfect match is wrong.
    assert evaluate(x, torch.tensor([0, 1, 0, 1]))[0].recall == {1: 0, 5: 1, 10: 1}
    # A gallery that happens to be the queries is a gallery: nothing is left out.
    with pytest.warns(
        UserWarning, match="gallery: 2 of the 2 queries find a row in it that is their"
    ):
        (result,) = evaluate(x, torch.tensor([0, 1, 2, 3]), x, torch.tensor([0, 4, 2, 5]))
    assert result.recall == {1: 0, 5: 1, 10: 1}
    assert (result.map_at_r, counts(result)) == (0, (2, 2, 0, 0))


def on_a_circle(*angles):
    angle = torch.tensor(angles)
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_known_figures():
    """R = 3, relevant items at positions 1, 3 and 5."""
    gallery = on_a_circle(0.1, 0.2, 0.3, 0.4, 0.5)
    (result,) = evaluate(
        torch.tensor([[2.0, 0.0]]), torch.tensor([1]), gallery, torch.tensor([1, 0, 1, 0, 1]),
        ks=[1, 2, 5, 10],
    )  # fmt: skip
    assert result == Result(
        dim=2,
        recall={1: 1, 2: 1, 5: 1, 10: 1},
        map_at_r=pytest.approx((1 + 2 / 3) / 3),  # 5 is beyond R
        num_queries=1,
        num_excluded=0,
        r_precision=pytest.approx(2 / 3),
        map_at_k={1: 1, 2: 0.5} | dict.fromkeys((5, 10), pytest.approx((1 + 2 / 3 + 3 / 5) / 3)),
        num_unlabelled=0,
        num_distractors=0,
    )


@pytest.mark.filterwarnings("ignore:gallery")
def test_a_negative_label_is_none():
    """It matches nothing, nor itself: wrong in the gallery, left out and counted as a query."""
    x = on_a_circle(0.0, 0.1, 0.3, 0.31, 2.0)
    (result,) = evaluate(x, torch.tensor([4, -1, 4, -1, 8]), ks=[1, 2])
    # 0 finds a distractor, then 2; 2 finds a distractor, another one, then 0.
    assert result.recall == {1: 0, 2: 0.5}
    assert result.map_at_k == {1: 0, 2: 0.25}
    assert (result.map_at_r, result.r_precision) == (0, 0)
    assert counts(result) == (2, 1, 2, 2)
    (result,) = evaluate(x, torch.tensor([4, -1, 4, -2, 8]), x[1:4], torch.tensor([-2, 4, -1]))
    assert counts(result) == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="no query has another item with its label"):
        evaluate(x, torch.full((5,), -1))


@pytest.mark.filterwarnings("error")
def test_items_of_the_querys_own_group_are_neither_right_nor_wrong():
    x = on_a_circle(0.0, 0.1, 0.2, 0.3)
    labels, cameras = torch.tensor([0, 0, 1, 0]), torch.tensor([5, 5, 5, 6])
    (result,) = evaluate(x, labels, query_groups=cameras, ks=[1])
    # 0 and 1 find 3 alone; 3 finds 2, which is wrong, then 1 and 0; 2 finds nothing of its label.
    assert result.recall == {1: pytest.approx(2 / 3)}
    assert result.map_at_r == pytest.approx((1 + 1 + 0.25) / 3)
    assert result.r_precision == pytest.approx((1 + 1 + 0.5) / 3)
    assert counts(result) == (3, 1, 0, 0)
    # Queries that lie in the gallery too, as in benchmarks of products, each with its copy in a
    # group: as if they were searched among the others.
    groups = torch.arange(4)
    assert evaluate(x, labels, x, labels, query_groups=groups, gallery_groups=groups) == evaluate(
        x, labels
    )
    # A negative group is none.
    nobody = torch.full((4,), -1)
    assert evaluate(x, labels, query_groups=nobody) == evaluate(x, labels)


@pytest.mark.parametrize("dims", [None, [2, 8]])
def test_queries_that_lie_in_the_gallery_are_noticed(dims):
    generator = torch.Generator().manual_seed(0)
    x, others = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.arange(20) % 4
    elsewhere = torch.cat([others, 3 * x[:7].flip(0).double()])  # in other places, of other norm
    gallery_labels = torch.cat([torch.arange(30) % 4, labels[:7].flip(0)])
    with pytest.warns(UserWarning, match="^gallery: ") as noticed:
        evaluate(x, labels, elsewhere, gallery_labels, dims=dims)
    assert [str(w.message) for w in noticed] == [
        "gallery: 7 of the 20 queries find a row in it that is their own. If these are the queries "
        "themselves, they say nothing about the model: "
        "leave the gallery out, or give a query and its copy one group"
    ]
    assert noticed[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_neighbours_that_are_near_are_no_copies():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4
    near = x + 1e-5
    assert evaluate(x, labels, near, labels, ks=[1])[0].recall == {1: 1}
    evaluate(x, labels, x[:, :1] * torch.ones(8), labels, dims=[1])  # the same at one dimension
    evaluate(torch.zeros(20, 8), labels, torch.zeros(20, 8), labels)
    evaluate(torch.cat([x, x]), torch.cat([labels, labels]))  # searched among the others


def test_a_collapsed_model_scores_zero_in_any_order():
    labels = torch.arange(40) // 8
    for row in (torch.zeros(1, 4), torch.ones(1, 4)):
        assert evaluate(row.expand(40, 4), labels, ks=[1, 32])[0].recall == {1: 0.0, 32: 0.0}
        assert evaluate(row.expand(40, 4), labels, ks=[33])[0].recall == {33: 1.0}


def test_rows_are_normalised_again_after_truncation():
    # At two dimensions the first gallery row has the larger cosine, but by far the smaller product
    # once the rows have been normalised over all three.
    query, labels = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])
    gallery = torch.tensor([[0.01, 0.0, 5.0], [1.0, 1.0, 0.0]])
    full, cut = evaluate(query, labels, gallery, torch.tensor([0, 1]), dims=[3, 2], ks=[1])
    assert (full.recall[1], cut.recall[1]) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_in_other_dtypes_give_the_same_cosines(dtype):
    torch.manual_seed(0)
    x, labels = torch.randn(50, 12).to(dtype), torch.arange(50) % 7
    assert evaluate(x, labels.int()) == evaluate(x.float(), labels)
    assert topk(x, k=3)[0].dtype == torch.float32
    assert torch.equal(topk(x, k=3)[0], topk(x.float(), k=3)[0])


def test_precision_does_not_depend_on_the_callers_settings():
    class Settings(TorchDispatchMode):
        """(dtype, allowed precisions) of every matrix product; many CPUs ignore the latter."""

        seen = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.mm.default:
                self.seen += ((args[0].dtype, *(b.fp32_precision for b in backends)),)
            return op(*args, **(kwargs or {}))

    torch.manual_seed(0)
    x = torch.randn(64, 128)
    expected = topk(x, k=5)
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [b.fp32_precision for b in backends]
    try:
        for backend, precision in zip(backends, ("bf16", "tf32"), strict=True):
            backend.fp32_precision = precision
        with torch.autocast("cpu", dtype=torch.bfloat16), Settings() as settings:
            actual = topk(x, k=5)
        assert [b.fp32_precision for b in backends] == ["bf16", "tf32"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    assert {dtype for dtype, *_ in settings.seen} == {torch.float64}  # which nothing makes coarser
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dim", [16, 100, 512])
def test_one_point_scores_nothing_in_any_order(dim):
    """Products of equal rows round alike, wherever in a block they stand."""
    row = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim))
    labels = torch.arange(1449) % 7
    x = row.expand(1449, dim).contiguous()
    orders = torch.arange(1449), torch.arange(1449).flip(0)
    for num_queries, order in itertools.product((1, 40, 1449), orders):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the queries are in the gallery
            (result,) = evaluate(x[:num_queries], labels[:num_queries], x[order] * 2, labels[order])
        assert result.map_at_r == result.recall[10] == 0
    (result,) = evaluate(x, labels)
    assert result.map_at_r == result.recall[10] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_that_are_in_the_gallery_in_half_precision(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(60, 64), torch.arange(60) % 6
    stored = x.to(dtype)
    for gallery in (stored, stored.float()):
        with pytest.warns(UserWarning, match="60 of the 60 queries find a row in it that is their"):
            evaluate(x, y, gallery, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(x, y, (x + 0.1 * torch.randn(60, 64)).to(dtype), y)


def test_inputs_may_be_strided_and_need_gradients():
    torch.manual_seed(0)
    wide = torch.randn(30, 16, requires_grad=True)
    labels = torch.stack([torch.arange(30) % 4, torch.zeros(30, dtype=torch.int64)], 1)[:, 0]
    before = wide.detach().clone()
    assert evaluate(wide[:, ::2], labels) == evaluate(before[:, ::2].contiguous(), labels.clone())
    assert not topk(wide, k=2)[0].requires_grad
    assert torch.equal(wide, before)


def on_ranks(group, arguments, keywords):
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        found = evaluate(*arguments, **keywords, process_group=group)
    return found, [str(w.message) for w in noticed]


def refused(group, queries, labels, gallery):
    with pytest.raises(ValueError, match="holds NaN") as caught:
        evaluate(queries, labels, gallery, labels[: len(gallery)], process_group=group)
    return str(caught.value)


@pytest.mark.parametrize("where", ["queries", "gallery"])
def test_every_rank_refuses_what_one_would_meet(ranks, where):
    x = {"queries": torch.randn(9, 4), "gallery": torch.randn(7, 4)}
    x[where][4, 2] = torch.nan
    message = f"{where}: row 4 holds NaN or a value outside fp32, it has no cosine"
    found = ranks.run(2, refused, x["queries"], torch.zeros(9, dtype=torch.int64), x["gallery"])
    assert found == [message] * 2


def on_different_ranks(group, changes):
    """What this rank raises where the second one has other arguments."""
    arguments = {
        "queries": torch.randn(9, 4, generator=torch.Generator().manual_seed(0)),
        "query_labels": torch.arange(9) % 3,
        "ks": [1],
    }
    if dist.get_rank(group) == 1:
        arguments.update(changes)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        evaluate(**arguments, process_group=group)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.full((9, 4), torch.nan)}, "queries: row 0 holds NaN"),
        ({"query_labels": torch.zeros(9)}, "query_labels: got dtype torch.float32"),
        ({"query_labels": torch.arange(9) % 2}, "query_labels (CRC-32) must be the same on every"),
        ({"queries": torch.ones(9, 5)}, "shapes must be the same on every rank, got [[9, 4]"),
        ({"bootstrap": 100}, "bootstrap must be the same on every rank, got [0, 'classes', 0] on"),
        ({"ks": [1, 2]}, "ks must be the same on every rank, got [1] on rank 0"),
    ],
    ids=str,
)
def test_ranks_with_other_arguments_all_raise(ranks, changes, message):
    for raised in ranks.run(2, on_different_ranks, changes):
        assert message in raised


def test_ranks_share_the_queries(ranks):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=generator) for n in (37, 50))
    labels, among = torch.arange(37) % 6 - 1, torch.arange(50) % 5 - 1
    y[:3] = x[2:5]
    keywords = {
        "query_groups": torch.arange(37) % 4, "gallery_groups": torch.arange(50) % 3,
        "dims": [4, 8], "ks": [1, 7],
    }  # fmt: skip
    right, warned = on_ranks(None, (x, labels, y, among), keywords)
    assert len(warned) == 1
    found = ranks.run(3, on_ranks, (x, labels, y, among), keywords)
    assert [messages for _, messages in found] == [warned, [], []]
    for results, _ in found:
        for result, expected_ in zip(results, right, strict=True):
            assert counts(result) == counts(expected_)
            assert figures(result) == pytest.approx(figures(expected_), abs=1e-12)


# ---- memory --------------------------------------------------------------------------------------


def rows_of_kind(kind, n, d):
    torch.manual_seed(0)
    if kind == "all equal":
        return torch.ones(n, d)
    if kind == "zero":
        return torch.zeros(n, d)
    if kind == "getting closer":  # every block of the gallery beats the one before
        angle = torch.linspace(3.0, 0.0, n)
        return torch.stack([angle.cos(), angle.sin()], 1).repeat(1, d // 2)
    return torch.randn(n, d, dtype=torch.float64 if kind == "float64" else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "classes"),  # 5 and 80: lists of R = 79 candidates, and of 4
    [("random", 5), ("random", 80), ("float64", 80), ("all equal", 5), ("zero", 80),
     ("getting closer", 5), ("getting closer", 80)],
)  # fmt: skip
def test_memory_does_not_grow_with_gallery_times_queries(kind, classes):
    n, d, block_bytes = 400, 8, 1 << 17
    assert n * n * 4 > 4 * block_bytes  # a full matrix of scores would be seen at once
    x, labels = rows_of_kind(kind, n, d), torch.arange(n) % classes
    with LiveBytes(x, labels) as memory:
        evaluate(x, labels, block_bytes=block_bytes)
    per_row = 8 * 8  # labels sorted, R, order: a few integers per row
    assert block_bytes / 8 < memory.peak < block_bytes + n * per_row
    with LiveBytes(x) as memory:
        topk(x, k=5, block_bytes=block_bytes)
    assert block_bytes / 8 < memory.peak < block_bytes + n * (5 * 12 + 8)  # outputs and order


@given(
    st.integers(1, 10**7), st.integers(1, 10**8), st.integers(1, 10**6), st.integers(1, 10**5),
    st.integers(1, 1 << 32),
)  # fmt: skip
def test_blocks_fit(num_queries, num_items, k, dim, block_bytes):
    q, g = search.block_shape(num_queries, num_items, k, dim, block_bytes)
    assert 1 <= q <= num_queries
    assert 1 <= g <= num_items
    used = (
        q * g * search.PAIR_BYTES + q * k * search.BEST_BYTES + (q + g) * dim * search.VALUE_BYTES
    )
    assert q == 1 or used <= block_bytes
    assert g == 1 or g * (search.PAIR_BYTES + dim * search.VALUE_BYTES) <= block_bytes


# ---- errors --------------------------------------------------------------------------------------

X, Y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "queries: got list", lambda: evaluate([[1.0]], Y)),
        (TypeError, "queries: got dtype torch.int64", lambda: topk(Y[:, None])),
        (ValueError, r"queries: got shape \[6\]", lambda: topk(X[:, 0])),
        (ValueError, r"queries: got shape \[6, 0\]", lambda: topk(X[:, :0])),
        (TypeError, "query_labels: got dtype torch.float32", lambda: evaluate(X, Y.float())),
        (TypeError, "query_labels: got list", lambda: evaluate(X, Y.tolist())),
        (ValueError, r"query_labels: got shape \[5\]", lambda: evaluate(X, Y[:5])),
        (ValueError, r"gallery_labels: got shape \[6\]", lambda: evaluate(X, Y, X[:2], Y)),
        (ValueError, r"gallery_labels: .* must be \[2\], one per row of gallery, or \[2, P\]$",
         lambda: evaluate(X, Y, X[:2], Y[None])),
        (ValueError, r"query_labels: got shape \[6, 1\], must be \[6\], one per row of queries$",
         lambda: evaluate(X, Y[:, None])),
        (ValueError, "gallery and gallery_labels", lambda: evaluate(X, Y, X)),
        (ValueError, "^gallery_groups: was given without a gallery, must be None$",
         lambda: evaluate(X, Y, gallery_groups=Y)),
        (ValueError, "^query_groups and gallery_groups: give both or neither$",
         lambda: evaluate(X, Y, X, Y, query_groups=Y)),
        (ValueError, "^query_groups and gallery_groups: give both or neither$",
         lambda: evaluate(X, Y, X, Y, gallery_groups=Y)),
        (TypeError, "^query_groups: got dtype torch.float32, must be an integer type$",
         lambda: evaluate(X, Y, query_groups=Y.float())),
        (ValueError, r"^gallery_groups: got shape \[5\], must be \[6\], one per row of gallery$",
         lambda: evaluate(X, Y, X, Y, query_groups=Y, gallery_groups=Y[:5])),
        (ValueError, "its label in the gallery, outside its own group$",
         lambda: evaluate(X, Y, query_groups=Y)),
        (ValueError, "gallery: got 3 dimensions, .* 4", lambda: evaluate(X, Y, X[:, :3], Y)),
        (ValueError, "gallery: is on meta", lambda: topk(X, X.to("meta"))),
        (ValueError, r"dims: got \[4, 5\].* from 1 to 4", lambda: evaluate(X, Y, dims=[4, 5])),
        (ValueError, r"dims: got \[\]", lambda: evaluate(X, Y, dims=[])),
        (ValueError, r"ks: got \[0\]", lambda: evaluate(X, Y, ks=[0])),
        (TypeError, r"ks: got \[1.5\], must be a list", lambda: evaluate(X, Y, ks=[1.5])),
        (TypeError, "dims: got 2, must be a list of ints", lambda: evaluate(X, Y, dims=2)),
        (TypeError, "queries: got a torch.sparse", lambda: evaluate(X.to_sparse(), Y)),
        (ValueError, "block_bytes: got 0", lambda: evaluate(X, Y, block_bytes=0)),
        (ValueError, "k: got 6, must be 1 to 5", lambda: topk(X, k=6)),
        (ValueError, "k: got 7, must be 1 to 6", lambda: topk(X, X, k=7)),
        (ValueError, "k: got 0", lambda: topk(X, k=0)),
        (ValueError, "no query", lambda: evaluate(X, torch.arange(6))),
        (ValueError, "no query", lambda: evaluate(X[:0], Y[:0])),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_values_without_a_cosine_are_named(value, block_bytes):
    bad = X.clone()
    bad[4, 2] = value
    with pytest.raises(ValueError, match="queries: row 4"):
        topk(bad, X, k=1, block_bytes=block_bytes)
    with pytest.raises(ValueError, match="gallery: row 4"):
        evaluate(X, Y, bad, Y, block_bytes=block_bytes)
