"""Sub-centres: several prototypes of each class, on every backend."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.problems import (
    check_conditioned,
    check_fp32,
    random_problem,
    relative_error,
    solve,
    truth,
)
from support.updates import OPTIMIZERS, weights_after

from unicom_ext import ArcFace, CombinedMargin, CosFace, PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.optim import RowSGD
from unicom_ext.subcenters import SubCenters

# ---- the loss and its gradients ----


def test_is_the_loss_of_the_nearest_prototypes(any_backend):
    """Said in another way than the reference does: the winners are picked before the loss."""
    problem = random_problem(1, 30, 8, num_centers=3, margin=CosFace(0.2), dtype=torch.float64)
    x, w = problem.embeddings, problem.prototypes
    cosine = (F.normalize(x) @ F.normalize(w).T).view(30, 3)
    winner = 3 * torch.arange(30) + cosine.argmax(dim=1)
    got = solve(partial_margin_softmax, problem)
    options = {**problem.options, "num_centers": 1}
    own = w[winner].clone().requires_grad_()
    right = partial_margin_softmax(x, problem.labels, own, **options)
    right.backward()
    torch.testing.assert_close(got.loss, right.detach(), rtol=1e-13, atol=0)
    to_all = torch.zeros_like(w).index_copy(0, winner, own.grad)
    torch.testing.assert_close(got.grad_prototypes, to_all, rtol=1e-11, atol=1e-14)
    losers = torch.ones(90, dtype=torch.bool).index_fill(0, winner, False)
    assert (got.grad_prototypes[losers] == 0).all()


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 30),
    positives=st.none() | st.integers(1, 4),
    num_classes=st.integers(5, 120),
    dim=st.integers(8, 40),
    seed=st.integers(0, 10**6),
    features=st.none() | st.floats(0.5, 1),
    some=st.booleans(),
    num_centers=st.integers(2, 4),
    scale=st.sampled_from([0.1, 16.0, 64.0, 90.0, 300.0]),
    closeness=st.sampled_from([0.0, 1.0, 10.0]),
    margin=st.sampled_from([CombinedMargin(), ArcFace(0.5)]),
    multi_label=st.sampled_from(["average", "separate"]),
    interclass_filter=st.none() | st.sampled_from([-0.2, 0.3]),
    workspace_bytes=st.sampled_from([0, 50_000, 256 << 20]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    sparse_grad=st.booleans(),
)
def test_anything(any_backend, batch, num_classes, dim, features, some, **rest):
    problem = random_problem(
        batch,
        num_classes,
        dim,
        features=None if features is None else max(1, round(features * dim)),
        ignored=batch // 4,
        dtype=torch.float64,
        **rest,
    )
    if some:
        others = torch.arange(0, num_classes, 3)
        labels = problem.labels[problem.labels >= 0]
        problem = problem.having(class_index=torch.cat([labels, others]).unique())
    check_conditioned(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("num_centers", range(1, 17))
def test_any_number_of_centers(num_centers):
    problem = random_problem(50, 70, 16, num_centers=num_centers, sampled=65, features=12)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        got = solve(partial_margin_softmax, problem.to(dtype))
        for a, b in zip(got, truth(problem), strict=True):
            assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("num_centers", [2, 3, 5, 8])
@pytest.mark.parametrize("closeness", [0.0, 3.0])
def test_float32_is_within_its_budget(capability, num_centers, closeness):
    problem = random_problem(
        30, 300, 40, ignored=3, closeness=closeness, num_centers=num_centers, sampled=200
    )
    check_fp32(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("num_centers", [3, 16])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_operands(any_backend, precision, num_centers):
    problem = random_problem(40, 60, 64, scale=16.0, num_centers=num_centers)
    got = solve(partial_margin_softmax, problem.having(precision=precision))
    # Where two centres are as near as rounding, the gradient may go to the other.
    for a, b, allowed in zip(got, truth(problem), (0.01, 0.05, 0.1), strict=True):
        assert relative_error(a, b) < allowed


def test_gradcheck(any_backend):
    problem = random_problem(3, 7, 4, num_centers=3, ignored=1, positives=2, scale=8.0)
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))

    def loss(x, w):
        options = {**problem.options, "margin_grad": "exact"}
        return partial_margin_softmax(x, problem.labels, w, **options)

    assert torch.autograd.gradcheck(loss, (x, w), fast_mode=True)


def test_of_equal_centers_the_first_gets_the_gradient(any_backend):
    """As positives and as negatives; the loss is that of one centre."""
    problem = random_problem(20, 40, 8)
    once = solve(partial_margin_softmax, problem)
    w = problem.prototypes.repeat_interleave(4, 0)
    got = solve(
        partial_margin_softmax, problem.__class__(problem.embeddings, problem.labels, w,
                                                  {**problem.options, "num_centers": 4})
    )  # fmt: skip
    torch.testing.assert_close(got.loss, once.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.grad_embeddings, once.grad_embeddings, rtol=1e-4, atol=1e-6)
    by_class = got.grad_prototypes.view(40, 4, 8)
    torch.testing.assert_close(by_class[:, 0], once.grad_prototypes, rtol=1e-4, atol=1e-6)
    assert (by_class[:, 1:] == 0).all()


@pytest.mark.parametrize("of_class", ["positive", "negative"])
@pytest.mark.parametrize("center", [0, 1, 2])
def test_nan_is_not_passed_over(any_backend, of_class, center):
    problem = random_problem(5, 30, 8, num_centers=3)
    label = int(problem.labels[0])
    other = next(c for c in range(30) if c not in problem.labels)
    problem.prototypes[3 * (label if of_class == "positive" else other) + center, 0] = math.nan
    loss = partial_margin_softmax(
        problem.embeddings, problem.labels, problem.prototypes, **problem.options, reduction="none"
    )
    assert loss[0].isnan()


def test_what_does_not_count_may_hold_anything(any_backend):
    problem = random_problem(8, 30, 6, ignored=2, sampled=20, num_centers=3)
    ignored = problem.labels == -100
    outside = torch.ones(30, dtype=torch.bool)
    outside[problem.options["class_index"]] = False
    right = solve(partial_margin_softmax, problem)
    problem.embeddings[ignored] = math.nan
    problem.prototypes.view(30, 3, 6)[outside] = math.nan
    got = solve(partial_margin_softmax, problem)
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


def test_metrics_are_the_classes(any_backend):
    problem = random_problem(25, 60, 8, num_centers=4, closeness=1.0, dtype=torch.float64)
    call = problem.embeddings, problem.labels, problem.prototypes
    _, got = partial_margin_softmax(*call, **problem.options, return_metrics=True)
    _, right = reference.partial_margin_softmax(*call, **problem.options, return_metrics=True)
    assert torch.equal(got.top1, right.top1)
    for a, b in zip(got[:3], right[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_center_is_the_loss_without_bit_for_bit(any_backend):
    problem = random_problem(20, 90, 8, positives=2, interclass_filter=0.3)
    right = solve(partial_margin_softmax, problem)
    for a, b in zip(
        solve(partial_margin_softmax, problem.having(num_centers=1)), right, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_centers", [3, 5])
def test_has_the_same_bits_whatever_threads_and_memory(set_threads, num_centers, precision):
    problem = random_problem(300, 900, 24, num_centers=num_centers, precision=precision)
    set_threads(4)
    right = solve(partial_margin_softmax, problem)
    for threads, workspace in ((1, 256 << 20), (2, 0), (3, 400_000)):
        set_threads(threads)
        got = solve(partial_margin_softmax, problem.having(workspace_bytes=workspace))
        for a, b in zip(got, right, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rates", [(0.4, 0.5), (1.0, 1.0)])
def test_an_update_inside_backward_is_the_same(any_backend, optimizer, rates):
    problem = random_problem(16, 40, 8)
    options = {"sample_rate": rates[0], "feature_rate": rates[1], "num_centers": 3}
    after, inside = weights_after(
        OPTIMIZERS[optimizer],
        lambda: PartialMarginSoftmax(8, 40, seed=4, sparse_grad=True, **options),
        [(problem.embeddings, problem.labels)] * 4,
    )
    assert torch.equal(after, inside)


def test_all_centers_of_a_class_that_is_drawn_have_a_step(any_backend):
    """A row optimizer that decays moves them, also those that no sample is near to."""
    loss_fn = PartialMarginSoftmax(6, 50, sample_rate=0.2, num_centers=3, sparse_grad=True)
    before = loss_fn.weight.detach().clone()
    optimizer = RowSGD(loss_fn.parameters(), lr=0.1, weight_decay=0.5)
    loss_fn(torch.randn(4, 6), torch.arange(4)).backward()
    assert loss_fn.weight.grad.shape == (150, 6)
    optimizer.step()
    drawn = loss_fn.last_selection.class_index
    assert len(drawn) == 10
    moved = (loss_fn.weight != before).any(dim=1).view(50, 3)
    assert moved.all(dim=1).nonzero().flatten().tolist() == drawn.tolist()
    assert moved.any(dim=1).sum() == 10


def test_the_sparse_gradient_is_the_dense_one(any_backend):
    grads = []
    for sparse_grad in (False, True):
        loss_fn = PartialMarginSoftmax(
            6, 40, sample_rate=0.3, num_centers=3, sparse_grad=sparse_grad
        )
        problem = random_problem(9, 40, 6)
        loss_fn(problem.embeddings, problem.labels).backward()
        grads.append(loss_fn.weight.grad)
    assert grads[1].is_sparse
    assert torch.equal(grads[1].to_dense(), grads[0])


@pytest.mark.slow
def test_makes_one_graph():
    loss_fn = PartialMarginSoftmax(6, 20, num_centers=3, sample_rate=0.5, sparse_grad=True)
    twin = copy.deepcopy(loss_fn)
    x, y = torch.randn(5, 6), torch.arange(5)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    got, right = compiled(x, y, step=3), twin(x, y, step=3)
    torch.testing.assert_close(got, right, rtol=0, atol=0)
    got.backward()
    right.backward()
    assert torch.equal(loss_fn.weight.grad.to_dense(), twin.weight.grad.to_dense())


# ---- the module ----


def test_initial_prototypes_depend_on_the_class_alone():
    many, few = (PartialMarginSoftmax(5, n, num_centers=3, seed=7) for n in (700, 20))
    assert many.weight.shape == (2100, 5)
    assert torch.equal(many.weight[:60], few.weight)
    assert len(many.weight.unique(dim=0)) == 2100


def test_says_how_many_it_has_and_keeps_them():
    loss_fn = PartialMarginSoftmax(5, 20, num_centers=3)
    assert "num_centers=3" in repr(loss_fn)
    assert "num_centers" not in repr(PartialMarginSoftmax(5, 20))
    message = "num_centers cannot be set, got 2: the loss has 3 prototypes for each class; make "
    with pytest.raises(AttributeError, match=message):
        loss_fn.num_centers = 2
    assert loss_fn.num_centers == 3


def test_centroids_are_parted(tmp_path):
    centroids = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    centroids[4] = 0
    loss_fn = PartialMarginSoftmax.from_centroids(centroids, num_centers=3)
    w = loss_fn.weight.detach().double().view(10, 3, 6)
    cosine = F.cosine_similarity(w, torch.from_numpy(centroids).double()[:, None], dim=2)
    known = torch.arange(10) != 4
    assert (cosine[known] > 0.9).all()
    assert (cosine[known] < 0.99999).all()
    assert (w[4] == 0).all()
    assert len(w[known].flatten(0, 1).unique(dim=0)) == 27


def test_state_dict_goes_there_and_back():
    one, other = (PartialMarginSoftmax(5, 20, num_centers=3, seed=s) for s in (1, 2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, other.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PartialMarginSoftmax(5, 20, num_centers=2).load_state_dict(one.state_dict())


def nearest_cosines(x, loss_fn):
    x, w = F.normalize(x.double()), F.normalize(loss_fn.weight.detach().double())
    return (x @ w.T).unflatten(1, (-1, loss_fn.num_centers)).amax(dim=2)


@settings(max_examples=40)
@given(
    size=st.integers(0, 12),
    num_classes=st.integers(1, 60),
    num_centers=st.integers(1, 6),
    k=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    equal=st.booleans(),
)
def test_topk_takes_the_nearest_classes(size, num_classes, num_centers, k, seed, equal):
    torch.manual_seed(seed)
    loss_fn = PartialMarginSoftmax(7, num_classes, num_centers=num_centers)
    if equal:  # all rows are one of three
        with torch.no_grad():
            loss_fn.weight.copy_(torch.randn(3, 7)[torch.randint(3, (len(loss_fn.weight),))])
    x, k = torch.randn(size, 7), min(k, num_classes)
    cosine = nearest_cosines(x, loss_fn)
    got = loss_fn.topk(x, k)
    right = cosine.float().sort(dim=1, descending=True, stable=True)
    assert got.cosine.shape == (size, k)
    torch.testing.assert_close(got.cosine, right.values[:, :k], rtol=0, atol=1e-6)
    if equal:  # equal ones by their ids
        order = torch.stack([-got.cosine.double(), got.class_index.double()], dim=2)
        assert [row.tolist() == sorted(row.tolist()) for row in order] == [True] * size
    else:
        assert torch.equal(got.class_index, right.indices[:, :k])


def test_logits_are_of_the_nearest_centers():
    torch.manual_seed(0)
    loss_fn = PartialMarginSoftmax(7, 30, num_centers=3, scale=10.0)
    x, ids = torch.randn(4, 7), torch.tensor([29, 0, 0, 11])
    right = 10 * nearest_cosines(x, loss_fn)
    torch.testing.assert_close(loss_fn.logits(x).double(), right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_fn.logits(x, ids).double(), right[:, ids], rtol=1e-6, atol=1e-6)


# ---- bad input ----


@pytest.mark.parametrize("value", [0, -1, 17])
def test_a_number_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=rf"^num_centers must be an int in \[1, 16\], got {value}"):
        PartialMarginSoftmax(4, 8, num_centers=value)


@pytest.mark.parametrize("value", [2.0, "3", True, None])
def test_another_type_is_named(value):
    with pytest.raises(TypeError, match=r"^num_centers must be an int in \[1, 16\], got "):
        PartialMarginSoftmax(4, 8, num_centers=value)


def test_what_it_excludes():
    message = r"^label_smoothing must be 0 with several centers of a class \(num_centers = 3\), got"
    with pytest.raises(ValueError, match=message):
        PartialMarginSoftmax(4, 8, label_smoothing=0.1, num_centers=3)
    loss_fn = PartialMarginSoftmax(4, 8, num_centers=3)
    with pytest.raises(ValueError, match=message):
        loss_fn.label_smoothing = 0.1


@pytest.mark.parametrize("function", [partial_margin_softmax, reference.partial_margin_softmax])
def test_rows_that_are_no_whole_classes_are_named(function):
    message = r"^prototypes must be \[C \* 3, d\] with C, d >= 1, got \[20, 4\]$"
    with pytest.raises(ValueError, match=message):
        function(torch.randn(2, 4), torch.arange(2), torch.randn(20, 4), margin=ArcFace(0.3),
                 scale=8.0, num_centers=3)  # fmt: skip
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 7\) .*, got 7 at position 1$"):
        function(torch.randn(2, 4), torch.tensor([6, 7]), torch.randn(21, 4), margin=ArcFace(0.3),
                 scale=8.0, num_centers=3)  # fmt: skip


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 4), (torch.float32, 8)])
def test_what_cuda_can_take_is_said(emulated, dtype, most):
    problem = random_problem(3, 9, 6, num_centers=most + 1, dtype=dtype)
    message = f"^num_centers must be at most {most} in this precision .*, got {most + 1}$"
    with pytest.raises((ValueError, RuntimeError), match=message):
        solve(partial_margin_softmax, problem)


# ---- cleaning ----


def noisy(seed=0):
    """Samples of 12 classes in 16 dimensions, of which a quarter lies where another class does."""
    generator = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(12, 16, generator=generator))
    labels = torch.arange(12).repeat(40)
    wrong = torch.rand(480, generator=generator) < 0.25
    lies = torch.where(wrong, (labels + 5) % 12, labels)
    return means[lies] + 0.05 * torch.randn(480, 16, generator=generator), labels, wrong


def test_wrong_labels_gather_at_another_center():
    x, labels, wrong = noisy()
    agreement = {}
    for num_centers in (1, 3):
        loss_fn = PartialMarginSoftmax(
            16, 12, num_centers=num_centers, scale=16.0, margin=CosFace(0.1)
        )
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            loss_fn(x, labels).backward()
            optimizer.step()
        centers = SubCenters(loss_fn)
        nearest = torch.cat([centers.add(x[p], labels[p]) for p in (slice(100), slice(100, None))])
        assert centers.counts.sum(dim=1).tolist() == [40] * 12
        clean = centers.is_clean(x, labels)
        cosine = F.cosine_similarity(
            x, loss_fn.weight[labels * num_centers + centers.dominant[labels]]
        )
        assert torch.equal(clean, cosine >= math.cos(math.radians(75)))
        agreement[num_centers] = float((clean != wrong).double().mean())
    dominant = centers.dominant
    at_it = nearest == dominant[labels]
    assert at_it[~wrong].double().mean() > 0.95
    assert at_it[wrong].double().mean() < 0.3
    assert agreement[1] < 0.8 < 0.9 < agreement[3]
    assert centers.is_clean(x, labels, math.pi).all()

    single = centers.to_single_center()
    assert (single.num_centers, loss_fn.num_centers) == (1, 3)
    kept = loss_fn.weight.view(12, 3, 16)[torch.arange(12), dominant]
    assert torch.equal(single.weight, kept)
    assert single.weight.data_ptr() != loss_fn.weight.data_ptr()
    assert single.step == loss_fn.step
    assert single.scale == 16
    found = single.topk(x, 1).class_index[:, 0] == labels
    assert found[~wrong].double().mean() > 0.95
    single(x, labels).backward()
    assert loss_fn.weight.grad is not None
    assert single.weight.grad.shape == (12, 16)


def test_counts_the_first_of_equals_and_no_ignored_sample():
    loss_fn = PartialMarginSoftmax(6, 5, num_centers=2, ignore_index=-1)
    with torch.no_grad():
        loss_fn.weight[2] = loss_fn.weight[3]
    x, labels = torch.randn(4, 6), torch.tensor([1, -1, 1, 4], dtype=torch.int32)
    centers = SubCenters(loss_fn)
    nearest = centers.add(x, labels)
    assert nearest[:3].tolist() == [0, -1, 0]
    assert centers.counts[1].tolist() == [2, 0]
    assert centers.counts.sum() == 3
    assert centers.dominant[0] == 0
    assert centers.is_clean(x, labels, math.pi).tolist() == [True, False, True, True]
    assert centers.add(x[:0], labels[:0]).shape == (0,)


def test_a_single_loss_draws_as_before():
    loss_fn = PartialMarginSoftmax(
        6, 50, num_centers=3, sample_rate=0.2, feature_rate=0.5, sparse_grad=True, seed=3
    )
    loss_fn.step += 4
    single = SubCenters(loss_fn).to_single_center()
    x, y = torch.randn(4, 6), torch.arange(4)
    for fn in (loss_fn, single):
        fn(x, y)
    for a, b in zip(loss_fn.last_selection, single.last_selection, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": torch.arange(3)}, ValueError, r"^labels must have shape \[4\], got \[3\]$"),
        ({"labels": torch.rand(4)}, TypeError, "^labels must be an int32 or int64 tensor, got a "),
        (
            {"labels": torch.arange(9, 13)},
            ValueError,
            r"^labels must be in \[0, 9\) .* position 0$",
        ),
        ({"embeddings": torch.rand(4, 5)}, ValueError, r"^embeddings must be \[B, 6\] like the"),
        ({"embeddings": torch.full((4, 6), math.nan)}, ValueError, "^embeddings: row 0 holds NaN"),
    ],
)
def test_bad_samples_are_named(change, error, words):
    centers = SubCenters(PartialMarginSoftmax(6, 9, num_centers=2))
    given = {"embeddings": torch.randn(4, 6), "labels": torch.arange(4), **change}
    with pytest.raises(error, match=words):
        centers.add(**given)
    assert centers.counts.sum() == 0
    with pytest.raises(error, match=words):
        centers.is_clean(**given)


@pytest.mark.parametrize("angle", [0, -1.0, 75, math.nan, "1", True])
def test_a_bad_angle_is_named(angle):
    centers = SubCenters(PartialMarginSoftmax(6, 9, num_centers=2))
    with pytest.raises((TypeError, ValueError), match=r"^max_angle must be radians in \(0, pi\]"):
        centers.is_clean(torch.randn(4, 6), torch.arange(4), angle)


def test_something_else_than_a_loss_is_named():
    with pytest.raises(TypeError, match=r"^loss_fn must be a PartialMarginSoftmax, got Linear$"):
        SubCenters(torch.nn.Linear(2, 2))


def test_angles_are_exact_at_both_ends():
    for seed in range(20):
        loss_fn = PartialMarginSoftmax(5, 3, num_centers=2, seed=seed)
        centers, own = SubCenters(loss_fn), loss_fn.weight.detach()[::2]
        labels = torch.arange(3)
        assert centers.is_clean(own, labels, 1e-9).all()
        assert centers.is_clean(-own, labels, math.pi).all()
        assert not centers.is_clean(-own, labels, np.float32(3.1415)).any()


def test_what_fails_counts_nothing():
    loss_fn = PartialMarginSoftmax(512, 9, num_centers=3)
    with torch.no_grad():
        loss_fn.weight[-1] = math.nan
    centers = SubCenters(loss_fn)
    labels = torch.zeros(6000, dtype=torch.int64)
    labels[-1] = 8
    with pytest.raises((RuntimeError, ValueError), match="prototypes: row 26 holds NaN"):
        centers.add(torch.randn(6000, 512), labels)
    assert centers.counts.sum() == 0


def test_inference_mode():
    loss_fn = PartialMarginSoftmax(6, 9, num_centers=3)
    x, y = torch.randn(4, 6), torch.arange(4)
    with torch.inference_mode():
        centers = SubCenters(loss_fn)
        centers.add(x, y)
        single = centers.to_single_center()
    centers.add(x, y)
    assert centers.counts.sum() == 8
    single(x, y).backward()
    assert single.weight.grad is not None


def test_a_weight_made_of_others_has_no_single_centers():
    loss_fn = PartialMarginSoftmax(6, 9, num_centers=3)
    torch.nn.utils.parametrizations.weight_norm(loss_fn, "weight")
    centers = SubCenters(loss_fn)
    centers.add(torch.randn(4, 6), torch.arange(4))
    with pytest.raises(RuntimeError, match=r"^to_single_center\(\) cannot take prototypes from a "):
        centers.to_single_center()


def test_a_loss_that_moves_takes_its_counts_along():
    loss_fn = PartialMarginSoftmax(6, 9, num_centers=3, device="meta")
    centers = SubCenters(loss_fn)
    loss_fn.to_empty(device="cpu")
    loss_fn.reset_parameters()
    centers.add(torch.randn(4, 6), torch.arange(4))
    assert centers.counts.sum() == 4


def test_a_weight_of_other_rows_is_named():
    loss_fn = PartialMarginSoftmax(6, 9, num_centers=3)
    loss_fn.options = replace(loss_fn.options, num_centers=1)
    message = r"^weight must be \[9, 6\], num_centers = 1 for each class, got \[27, 6\]$"
    with pytest.raises(ValueError, match=message):
        loss_fn(torch.randn(4, 6), torch.arange(4))
