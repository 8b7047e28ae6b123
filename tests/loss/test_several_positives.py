"""Labels with several positives for each sample: both forms of the loss, on every backend."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.problems import (
    Problem,
    check_conditioned,
    check_fp32,
    random_problem,
    relative_error,
    solve,
    truth,
)

from unicom_ext import ArcFace, CombinedMargin, PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.optim import RowAdamW, RowSGD

FORMS = ["average", "separate"]


@pytest.mark.parametrize("multi_label", FORMS)
@pytest.mark.parametrize("positives", [1, 2, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float32_is_within_its_budget(capability, multi_label, positives, reduction):
    problem = random_problem(
        20, 500, 24, positives=positives, ignored=3, multi_label=multi_label, reduction=reduction
    )
    check_fp32(solve(partial_margin_softmax, problem), problem)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 30),
    positives=st.integers(1, 9),
    num_classes=st.integers(10, 300),
    dim=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    features=st.none() | st.floats(0, 1),
    some=st.booleans(),
    scale=st.sampled_from([0.1, 16.0, 64.0, 90.0, 300.0]),
    closeness=st.sampled_from([0.0, 1.0, 10.0]),
    margin=st.sampled_from([CombinedMargin(), ArcFace(0.5), "sample", "positive"]),
    interclass_filter=st.sampled_from([None, 0.2]),
    workspace_bytes=st.sampled_from([0, 20_000, 256 << 20]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    multi_label=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_anything(any_backend, batch, positives, num_classes, dim, seed, features, margin, **rest):
    some = rest.pop("some")
    if not isinstance(margin, CombinedMargin):
        shape = (batch,) if margin == "sample" else (batch, positives)
        generator = torch.Generator().manual_seed(seed)
        margin = CombinedMargin(1.0, torch.rand(shape, generator=generator), 0.1)
    problem = random_problem(
        batch,
        num_classes,
        dim,
        seed=seed,
        positives=positives,
        features=None if features is None else max(1, round(features * dim)),
        ignored=batch // 4,
        margin=margin,
        **rest,
    )
    if some:
        others = torch.arange(0, num_classes, 3)
        labels = problem.labels[problem.labels >= 0]
        problem = problem.having(class_index=torch.cat([labels, others]).unique())
    check_conditioned(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("multi_label", FORMS)
def test_half_operands(any_backend, precision, multi_label):
    problem = random_problem(
        40, 900, 64, positives=4, scale=16.0, closeness=0.5, multi_label=multi_label
    )
    got = solve(partial_margin_softmax, problem.having(precision=precision))
    for a, b in zip(got, truth(problem), strict=True):
        assert relative_error(a, b) < 0.03


@pytest.mark.parametrize("multi_label", FORMS)
@pytest.mark.parametrize("scale", [64.0, 200.0])
def test_converged_and_hopeless_samples(any_backend, multi_label, scale):
    """Each sample's loss and gradient by itself, from e^-30 to hundreds."""
    generator = torch.Generator().manual_seed(0)
    prototypes = 0.1 * torch.randn(60, 16, generator=generator).double()
    prototypes[:, 0] -= 1  # all classes lie together, but for two that lie opposite
    prototypes[10:12, 0] += 2
    turn = torch.linspace(0, math.pi, 20).double()
    embeddings = 0.05 * torch.randn(20, 16, generator=generator).double()
    embeddings[:, :2] += torch.stack([turn.cos(), turn.sin()], dim=1)
    problem = Problem(
        embeddings,
        torch.tensor([[10, 11]]).expand(20, 2),
        prototypes,
        {
            "margin": ArcFace(0.3),
            "scale": scale,
            "multi_label": multi_label,
            "reduction": "none",
        },
    )
    got, right = solve(partial_margin_softmax, problem), truth(problem)
    assert 0 < right.loss.min() < 1e-13
    assert right.loss.max() > 1.5 * scale
    torch.testing.assert_close(got.loss, right.loss, rtol=1e-11, atol=0)
    for a, b in zip(got.grad_embeddings, right.grad_embeddings, strict=True):
        assert relative_error(a, b) < 1e-10
    assert relative_error(got.grad_prototypes, right.grad_prototypes) < 1e-12


def test_one_positive_changes_no_bit(capability):
    for seed, options in enumerate([{}, {"precision": "bf16"}, {"scale": 200.0}]):
        problem = random_problem(33, 700, 20, seed=seed, sampled=300, ignored=4, **options)
        one = solve(partial_margin_softmax, problem)
        matrix = replace(problem, labels=problem.labels[:, None])
        padded = replace(
            problem, labels=torch.stack([torch.full((33,), -100), problem.labels], dim=1)
        )
        for other in (matrix, padded):
            for a, b in zip(one, solve(partial_margin_softmax, other), strict=True):
                assert torch.equal(a, b)


def test_mlcd_by_its_formula():
    """arXiv:2407.17331, eq. 5, without margin: in plain sums that need no care at this scale."""
    problem = random_problem(
        9, 40, 12, positives=3, scale=8.0, margin=CombinedMargin(), reduction="none",
        multi_label="separate", dtype=torch.float64,
    )  # fmt: skip
    x = problem.embeddings / problem.embeddings.norm(dim=1, keepdim=True)
    w = problem.prototypes / problem.prototypes.norm(dim=1, keepdim=True)
    z = 8.0 * x @ w.T
    loss = partial_margin_softmax(
        problem.embeddings, problem.labels, problem.prototypes, **problem.options
    )
    for i, row in enumerate(problem.labels):
        own = sorted({int(y) for y in row if y != -100})
        others = [j for j in range(40) if j not in own]
        expected = torch.log1p(z[i, others].exp().sum()) + torch.log1p((-z[i, own]).exp().sum())
        assert loss[i].item() == pytest.approx(expected.item() if own else 0.0, rel=1e-13)


@pytest.mark.parametrize("multi_label", FORMS)
def test_gradients_by_differences(multi_label):
    problem = random_problem(
        5, 12, 4, positives=3, scale=8.0, dtype=torch.float64, multi_label=multi_label
    )
    m2 = torch.rand(5, 3, dtype=torch.float64)
    m3 = torch.rand(5, dtype=torch.float64)

    def loss(x, w, m2, m3):
        options = {**problem.options, "margin": CombinedMargin(1.0, m2, m3), "margin_grad": "exact"}
        return partial_margin_softmax(x, problem.labels, w, **options)

    inputs = problem.embeddings, problem.prototypes, m2, m3
    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize("multi_label", FORMS)
def test_what_a_positive_that_does_not_count_holds_reaches_nothing(any_backend, multi_label):
    problem = random_problem(6, 50, 8, positives=3, multi_label=multi_label)
    labels = [[3, 7, 3], [-100, 9, 9], [-100] * 3, [1, 2, 4], [5, -100, -100], [6] * 3]
    labels = torch.tensor(labels)
    spoilt = torch.tensor([[0, 0, 1], [1, 0, 1], [1] * 3, [0] * 3, [0, 1, 1], [0, 1, 1]]).bool()
    m2 = torch.rand(6, 3)
    grads = []
    for bad in (0.0, math.nan):
        given = m2.masked_fill(spoilt, bad).requires_grad_()
        x = problem.embeddings.clone()
        x[2] = bad  # the sample without any positive
        x.requires_grad_()
        options = {**problem.options, "margin": CombinedMargin(1.0, given), "return_metrics": True}
        loss, metrics = partial_margin_softmax(x, labels, problem.prototypes, **options)
        loss.backward()
        assert (given.grad[spoilt] == 0).all()
        assert (given.grad[~spoilt] != 0).all()
        assert (metrics.target_cosine[spoilt] == 0).all()
        assert metrics.loss[2] == 0
        assert metrics.largest_negative[2] == -math.inf
        assert not metrics.top1[2]
        assert (x.grad[2] == 0).all()
        grads.append((loss, given.grad, x.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_metrics(any_backend):
    problem = random_problem(
        30, 200, 12, positives=4, ignored=2, closeness=2.0, dtype=torch.float64
    )
    arguments = problem.embeddings, problem.labels, problem.prototypes
    options = {**problem.options, "return_metrics": True}
    _, got = partial_margin_softmax(*arguments, **options)
    _, right = reference.partial_margin_softmax(*arguments, **options)
    assert got.target_cosine.shape == (30, 4)
    assert 5 < right.top1.sum() < 28
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def pair_of(labels):
    kept = labels != -100
    return labels[kept], torch.cat([torch.zeros(1), kept.sum(dim=1).cumsum(0)]).to(labels.dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_pair_of_ids_and_offsets_is_a_padded_matrix(any_backend, dtype):
    problem = random_problem(12, 90, 8, positives=5, ignored=2)
    problem = replace(problem, labels=problem.labels.to(dtype))
    as_pair = replace(problem, labels=pair_of(problem.labels))
    for a, b in zip(
        solve(partial_margin_softmax, problem), solve(partial_margin_softmax, as_pair), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    reference_too = solve(reference.partial_margin_softmax, as_pair)
    assert torch.equal(reference_too.loss, solve(reference.partial_margin_softmax, problem).loss)


def test_pairs_without_any_id():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    empty = torch.zeros(0).long(), torch.zeros(4).long()
    options = {"margin": ArcFace(0.3), "scale": 16.0}
    assert partial_margin_softmax(x, empty, w, **options) == 0
    none = torch.zeros(0).long(), torch.zeros(1).long()
    assert partial_margin_softmax(x[:0], none, w, **options) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            (torch.tensor([1, 2]), torch.tensor([0, 1, 1])),
            "labels: offsets must rise from 0 to the number of ids, 2; they go from 0 to 1",
        ),
        (
            (torch.tensor([1, 2]), torch.tensor([1, 1, 2])),
            "labels: offsets must rise from 0 to the number of ids, 2; they go from 1 to 2",
        ),
        (
            (torch.tensor([1, 2]), torch.tensor([0, 3, 2])),
            "labels: offsets must rise from 0 to the number of ids, 2; they go from 0 to 2 and "
            "fall 1 times",
        ),
        (
            (torch.tensor([1, 2]), torch.tensor([]).long()),
            "labels: offsets must hold B + 1 numbers, got none",
        ),
        (
            (torch.tensor([[1, 2]]), torch.tensor([0, 1])),
            "labels: ids must be a vector, got the shape [1, 2]",
        ),
        (
            (torch.tensor([1.0, 2.0]), torch.tensor([0, 1, 2])),
            "labels: ids must be int32 or int64, got torch.float32",
        ),
        (
            (torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2, 3])),
            "labels must have shape [2], or [2, P] for several positives, got [3, 1]",
        ),
        (
            torch.zeros(2, 0).long(),
            "labels must have shape [2], or [2, P] for several positives, got [2, 0]",
        ),
        (
            torch.zeros(2, 3, 4).long(),
            "labels must have shape [2], or [2, P] for several positives, got [2, 3, 4]",
        ),
        (
            torch.zeros(2, 6).long(),
            "labels must have shape [2], or [2, P] for P class ids of each sample; got [2, 6], "
            "which look like a one-hot code of 6 classes",
        ),
        (
            torch.tensor([[1, 2], [3, 6]]),
            "labels must be in [0, 6) or ignore_index (-100), got 6 at position [1, 1]",
        ),
        (
            torch.tensor([[1, -1], [3, 6]]),
            "labels must be in [0, 6) or ignore_index (-100), got -1 at position [0, 1]",
        ),
    ],
)
@pytest.mark.parametrize("how", ["function", "module", "reference"])
def test_bad_labels_are_named(labels, message, how):
    x = torch.randn(2, 4)
    module = PartialMarginSoftmax(4, 6, sample_rate=0.5)
    functions = {"function": partial_margin_softmax, "reference": reference.partial_margin_softmax}
    if how == "module":
        call = functools.partial(module, x, labels)
    else:
        call = functools.partial(
            functions[how], x, labels, torch.randn(6, 4), margin=ArcFace(0.3), scale=8.0
        )
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        call()
    assert module.step == 0


def test_a_label_outside_of_the_given_classes_is_named():
    with pytest.raises(ValueError, match=r"label.* 3 at position \[1, 0\]"):
        partial_margin_softmax(
            torch.randn(2, 4), torch.tensor([[1, 2], [3, 1]]), torch.randn(6, 4),
            margin=ArcFace(0.3), scale=8.0, class_index=torch.tensor([1, 2, 5]),
        )  # fmt: skip


def test_a_margin_of_another_shape_is_named():
    x, labels, w = torch.randn(2, 4), torch.tensor([[1, 2, 3], [3, 1, 4]]), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"^margin.m2 must .* \[2\] or \[2, 3\], got \[2, 2\]$"):
        partial_margin_softmax(x, labels, w, margin=ArcFace(torch.zeros(2, 2)), scale=8.0)


@pytest.mark.parametrize("multi_label", FORMS)
def test_the_module_draws_every_positive(multi_label):
    module = PartialMarginSoftmax(
        6, 400, sample_rate=0.05, feature_rate=0.5, multi_label=multi_label, scale=16.0
    )
    problem = random_problem(12, 400, 6, positives=5, ignored=1)
    loss = module(problem.embeddings, problem.labels)
    classes, features = module.last_selection
    assert torch.isin(problem.labels[problem.labels >= 0], classes).all()
    assert len(classes) == max(20, len(problem.labels[problem.labels >= 0].unique()))
    right = reference.partial_margin_softmax(
        problem.embeddings, problem.labels, module.weight, margin=module.margin, scale=16.0,
        class_index=classes, feature_index=features, multi_label=multi_label,
    )  # fmt: skip
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-6)
    assert module.step == 1


def test_threads_change_no_bit(set_threads):
    problem = random_problem(40, 3000, 33, positives=6, sampled=None)
    problem = replace(problem, labels=problem.labels % 50)  # classes of many samples
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(solve(partial_margin_softmax, problem))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_sparse_gradients_hold_the_same_rows(any_backend, sparse_grad):
    problem = random_problem(20, 300, 12, positives=4, closeness=1.0)
    labels = problem.labels[problem.labels >= 0]
    classes = torch.cat([labels, torch.arange(0, 300, 7)]).unique()
    problem = problem.having(class_index=classes, sparse_grad=sparse_grad)
    check_fp32(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("make", [lambda p: RowSGD(p, lr=0.5, momentum=0.9), RowAdamW])
def test_updates_inside_backward_are_those_after_it(any_backend, make):
    results = []
    for inside in (False, True):
        loss = PartialMarginSoftmax(
            12, 300, sample_rate=0.2, seed=1, sparse_grad=True, multi_label="separate"
        )
        optimizer = make(loss.parameters())
        if inside:
            optimizer.update_in_backward(loss)
        for step in range(3):
            problem = random_problem(20, 300, 12, seed=step, positives=4, ignored=2)
            x = problem.embeddings.requires_grad_()
            optimizer.zero_grad()
            loss(x, problem.labels).backward()
            optimizer.step()
        results.append((loss.weight.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-6


def test_a_bad_label_on_a_device_spoils_its_own_sample_alone(emulated):
    """Where nobody looks at values: loss NaN, no gradient, and nothing of it in the others."""
    problem = random_problem(8, 100, 6, positives=3, reduction="none")
    labels = torch.arange(24).reshape(8, 3)
    bad = labels.clone()
    bad[3, 1] = 100
    bad[5] = torch.tensor([-7, -100, 2])
    x, w = problem.embeddings.clone(), problem.prototypes.clone().requires_grad_()
    x[3] = math.nan  # must not matter either
    x.requires_grad_()
    loss = partial_margin_softmax(x, bad, w, **problem.options)
    assert loss.isnan().tolist() == [i in (3, 5) for i in range(8)]
    loss.nansum().backward()
    without = labels.clone()
    without[[3, 5]] = -100
    right = solve(reference.partial_margin_softmax, replace(problem, labels=without, upstream=None))
    torch.testing.assert_close(x.grad, right.grad_embeddings, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w.grad, right.grad_prototypes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [2**40, -(2**40)])
def test_int32_labels_with_an_ignore_index_beyond_them(ignore_index):
    problem = random_problem(5, 9, 4)
    call = {**problem.options, "ignore_index": ignore_index}
    labels = torch.tensor([[0, 1], [3, 3], [5, 2], [1, 1], [8, 7]], dtype=torch.int32)
    pair = (
        torch.tensor([0, 1, 3, 5, 2, 1, 8, 7], dtype=torch.int32),
        torch.tensor([0, 2, 3, 5, 6, 8]),
    )
    right = partial_margin_softmax(
        problem.embeddings, labels.long(), problem.prototypes, **problem.options
    )
    for either in (labels, pair):
        got = partial_margin_softmax(problem.embeddings, either, problem.prototypes, **call)
        assert torch.equal(got, right)
