"""Label smoothing, on every backend."""

from __future__ import annotations

import math

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

from unicom_ext import ArcFace, CombinedMargin, PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax


def test_is_torchs(any_backend):
    problem = random_problem(12, 50, 8, margin=CombinedMargin(), dtype=torch.float64)
    x, y, w = problem.embeddings, problem.labels, problem.prototypes
    logits = 64 * F.normalize(x) @ F.normalize(w).T
    for smoothing in (0.0, 0.1, 0.9):
        options = {**problem.options, "label_smoothing": smoothing}
        right = F.cross_entropy(logits, y, label_smoothing=smoothing)
        for implementation in (partial_margin_softmax, reference.partial_margin_softmax):
            got = implementation(x, y, w, **options)
            torch.testing.assert_close(got, right, rtol=1e-13, atol=0)


def test_is_torchs_over_sampled_classes_and_each_of_several_positives():
    problem = random_problem(
        9, 40, 8, positives=3, sampled=30, margin=CombinedMargin(), label_smoothing=0.2
    )
    problem = problem.having(reduction="none").to(torch.float64)
    x, y, w = problem.embeddings, problem.labels, problem.prototypes
    index = problem.options["class_index"]
    logits = 64 * F.normalize(x) @ F.normalize(w[index]).T
    right = torch.zeros(9, dtype=torch.float64)
    for i, row in enumerate(y):
        slots = torch.searchsorted(index, row[row >= 0].unique())
        for slot in slots:
            others = slots[slots != slot]
            kept = torch.ones(30, dtype=torch.bool).index_fill(0, others, False)
            target = (slot - (others < slot).sum())[None]
            right[i] += F.cross_entropy(logits[i : i + 1, kept], target, label_smoothing=0.2) / len(
                slots
            )
    got = partial_margin_softmax(x, y, w, **problem.options)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 40),
    positives=st.none() | st.integers(1, 5),
    num_classes=st.integers(6, 300),
    dim=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    features=st.none() | st.floats(0, 1),
    some=st.booleans(),
    scale=st.sampled_from([0.1, 16.0, 64.0, 90.0, 300.0]),
    closeness=st.sampled_from([0.0, 1.0, 10.0]),
    margin=st.sampled_from([CombinedMargin(), ArcFace(0.5)]),
    label_smoothing=st.sampled_from([1e-6, 0.1, 0.999]),
    workspace_bytes=st.sampled_from([0, 256 << 20]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_anything(any_backend, batch, num_classes, dim, features, some, **rest):
    problem = random_problem(
        batch,
        num_classes,
        dim,
        features=None if features is None else max(1, round(features * dim)),
        ignored=batch // 4,
        **rest,
    )
    if some:
        others = torch.arange(0, num_classes, 3)
        labels = problem.labels[problem.labels >= 0]
        problem = problem.having(class_index=torch.cat([labels, others]).unique())
    check_conditioned(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("closeness", [0.0, 3.0])
def test_float32_is_within_its_budget(capability, reduction, closeness):
    problem = random_problem(
        30, 700, 40, ignored=3, closeness=closeness, reduction=reduction, label_smoothing=0.1
    )
    check_fp32(solve(partial_margin_softmax, problem), problem)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_operands(any_backend, precision):
    problem = random_problem(40, 900, 64, scale=16.0, closeness=0.5, label_smoothing=0.2)
    got = solve(partial_margin_softmax, problem.having(precision=precision))
    for a, b in zip(got, truth(problem), strict=True):
        assert relative_error(a, b) < 0.02


@pytest.mark.parametrize("positives", [None, 3])
def test_gradcheck_with_a_learned_margin(any_backend, positives):
    problem = random_problem(6, 20, 5, positives=positives, ignored=1, scale=8.0)
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))
    m2 = torch.rand(problem.labels.shape, dtype=torch.float64, requires_grad=True)

    def loss(x, w, m2):
        return partial_margin_softmax(
            x,
            problem.labels,
            w,
            margin=CombinedMargin(1.0, m2, 0.1),
            scale=8.0,
            margin_grad="exact",
            label_smoothing=0.3,
        )

    assert torch.autograd.gradcheck(loss, (x, w, m2), fast_mode=True)


def test_what_does_not_count_may_hold_anything(any_backend):
    problem = random_problem(8, 30, 6, ignored=2, sampled=20, label_smoothing=0.1)
    ignored = problem.labels == -100
    outside = torch.ones(30, dtype=torch.bool)
    outside[problem.options["class_index"]] = False
    right = solve(partial_margin_softmax, problem)
    problem.embeddings[ignored] = math.nan
    problem.prototypes[outside] = math.nan
    got = solve(partial_margin_softmax, problem)
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)
    assert (got.grad_embeddings[ignored] == 0).all()


def test_a_class_alone_has_neither_loss_nor_gradient(any_backend):
    problem = random_problem(4, 1, 5, label_smoothing=0.5)
    assert all((part == 0).all() for part in solve(partial_margin_softmax, problem))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_has_the_same_bits_for_any_number_of_threads(threads):
    problem = random_problem(300, 3000, 24, label_smoothing=0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        right = solve(partial_margin_softmax, problem)
        torch.set_num_threads(threads)
        got = solve(partial_margin_softmax, problem)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("sample_rate", [0.4, 1.0])
def test_an_update_inside_backward_is_the_same(any_backend, optimizer, sample_rate):
    problem = random_problem(16, 40, 8)
    options = {"sample_rate": sample_rate, "label_smoothing": 0.2, "sparse_grad": True}
    after, inside = weights_after(
        OPTIMIZERS[optimizer],
        lambda: PartialMarginSoftmax(8, 40, seed=4, **options),
        [(problem.embeddings, problem.labels)] * 3,
    )
    assert torch.equal(after, inside)


def test_zero_is_the_loss_without_bit_for_bit(any_backend):
    problem = random_problem(20, 90, 8, interclass_filter=0.3)
    right = solve(partial_margin_softmax, problem)
    for a, b in zip(
        solve(partial_margin_softmax, problem.having(label_smoothing=0.0)), right, strict=True
    ):
        assert torch.equal(a, b)


def test_makes_one_graph():
    loss_fn = PartialMarginSoftmax(6, 20, label_smoothing=0.1, sample_rate=0.5)
    x, y = torch.randn(5, 6), torch.arange(5)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, step=3), loss_fn(x, y, step=3), rtol=0, atol=0)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan, math.inf])
def test_a_value_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=rf"^label_smoothing must be in \[0, 1\), got {value}$"):
        PartialMarginSoftmax(4, 8, label_smoothing=value)


@pytest.mark.parametrize("value", ["0.1", True, torch.tensor(0.1)])
def test_another_type_is_named(value):
    with pytest.raises(TypeError, match=r"^label_smoothing must be a number, got "):
        PartialMarginSoftmax(4, 8, label_smoothing=value)


def test_what_it_excludes():
    filters = r"^interclass_filter must be None with label_smoothing, .*, got 0\.4$"
    with pytest.raises(ValueError, match=filters):
        PartialMarginSoftmax(4, 8, label_smoothing=0.1, interclass_filter=0.4)
    separate = r'^label_smoothing must be 0 with multi_label="separate", .*, got 0\.1$'
    with pytest.raises(ValueError, match=separate):
        PartialMarginSoftmax(4, 8, label_smoothing=0.1, multi_label="separate")
    loss_fn = PartialMarginSoftmax(4, 8, interclass_filter=0.4)
    with pytest.raises(ValueError, match=filters):
        loss_fn.label_smoothing = 0.1
    assert loss_fn.label_smoothing == 0
