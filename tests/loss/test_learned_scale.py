"""A scale that is a tensor, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.problems import random_problem
from torch import nn
from torch.func import grad

from unicom_ext import ArcFace, CombinedMargin, PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.optim import RowAdamW, RowSGD


def scale_gradient(implementation, problem, scale, dtype):
    """The gradient alone, with neither embeddings nor prototypes that want one."""
    problem = problem.to(dtype).having(scale=scale.detach().clone().requires_grad_())
    loss = implementation(problem.embeddings, problem.labels, problem.prototypes, **problem.options)
    loss.backward(None if problem.upstream is None else problem.upstream.to(loss))
    return problem.options["scale"].grad


def sizes_of_terms(problem, scale):
    """What the gradient of a sample's loss is a difference of, at most, and the smallest sine of an
    angle between an embedding and its prototype."""
    loss, metrics = reference.partial_margin_softmax(
        problem.embeddings.double(),
        problem.labels,
        problem.prototypes.double(),
        **problem.having(scale=float(scale), reduction="none", return_metrics=True).options,
    )
    weight = -torch.expm1(-loss) + problem.options.get("label_smoothing", 0)
    if problem.upstream is not None:
        weight = weight * problem.upstream
    elif problem.options["reduction"] == "mean":
        weight = weight / max(1, int((problem.labels.view(len(loss), -1) >= 0).any(1).sum()))
    return 2 * float(weight.sum()), (1 - metrics.target_cosine**2).clamp(min=0).sqrt().min()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 30),
    positives=st.none() | st.integers(1, 4),
    num_classes=st.integers(6, 200),
    dim=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 16.0, 64.0, 90.0, 300.0]),
    closeness=st.sampled_from([0.0, 1.0, 10.0]),
    margin=st.sampled_from([CombinedMargin(), ArcFace(0.5), CombinedMargin(1.0, 0.2, 0.1)]),
    form=st.sampled_from(
        [
            {},
            {"label_smoothing": 0.2},
            {"interclass_filter": 0.2},
            {"multi_label": "separate"},
        ]
    ),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_is_the_references(any_backend, batch, num_classes, dim, scale, form, dtype, **rest):
    scale = torch.tensor(scale, dtype=torch.float64)
    problem = random_problem(batch, num_classes, dim, ignored=batch // 4, **form, **rest)
    if dtype == torch.float32 and form.get("interclass_filter"):
        return  # a cosine beside the filter may be on either side
    got = scale_gradient(partial_margin_softmax, problem, scale, dtype)
    right = scale_gradient(reference.partial_margin_softmax, problem, scale, torch.float64)
    eps = torch.finfo(dtype).eps
    size, sine = sizes_of_terms(problem, scale)
    # A logit's relative error makes one scale times as large in each softmax, and an angle near 0
    # or pi is less certain than its cosine.
    allowed = 4 * (float(scale) / max(float(sine), eps**0.5) + 25) * eps * size
    assert abs(float(got - right)) <= allowed + 1e-300


@pytest.mark.parametrize("positives", [None, 3])
def test_gradcheck_beside_the_others(any_backend, positives):
    problem = random_problem(6, 20, 5, positives=positives, ignored=1)
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))
    m2 = torch.rand(problem.labels.shape, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(x, w, m2, log_scale):
        return partial_margin_softmax(
            x,
            problem.labels,
            w,
            margin=CombinedMargin(1.0, m2, 0.1),
            scale=log_scale.exp(),
            margin_grad="exact",
            label_smoothing=0.1,
        )

    assert torch.autograd.gradcheck(loss, (x, w, m2, log_scale), fast_mode=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_operands(any_backend, precision):
    problem = random_problem(40, 900, 64, closeness=0.5, reduction="mean", precision=precision)
    scale = torch.tensor(16.0)
    got = scale_gradient(partial_margin_softmax, problem, scale, torch.float32)
    right = scale_gradient(reference.partial_margin_softmax, problem, scale, torch.float64)
    assert float(got) == pytest.approx(float(right), rel=0.02)


def test_a_converged_samples_gradient_keeps_its_digits(any_backend):
    w = torch.tensor([[1.0, 0.1], [-1.0, 0.2], [-1.0, -0.3]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    problem = random_problem(1, 3, 2, margin=CombinedMargin(), reduction="sum")
    problem = type(problem)(x, torch.tensor([0]), w, problem.options)
    scale = torch.tensor(30.0, dtype=torch.float64)
    got = scale_gradient(partial_margin_softmax, problem, scale, torch.float64)
    right = scale_gradient(reference.partial_margin_softmax, problem, scale, torch.float64)
    assert 0 < -float(right) < 1e-20
    assert float(got) == pytest.approx(float(right), rel=1e-9)


@pytest.mark.parametrize("scale", [torch.tensor(20.0), torch.tensor([20.0]).half()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_is_that_of_a_number_bit_for_bit(scale, dtype, any_backend):
    problem = random_problem(9, 40, 8, dtype=dtype, scale=20.0)
    right = partial_margin_softmax(
        problem.embeddings, problem.labels, problem.prototypes, **problem.options
    )
    scale.requires_grad_()
    got = partial_margin_softmax(
        problem.embeddings,
        problem.labels,
        problem.prototypes,
        **problem.having(scale=scale).options,
    )
    assert torch.equal(got, right)
    (to_scale,) = torch.autograd.grad(got, scale)
    assert (to_scale.shape, to_scale.dtype) == (scale.shape, scale.dtype)


def test_what_does_not_count_may_hold_anything(any_backend):
    problem = random_problem(8, 30, 6, ignored=3, reduction="none")
    scale = torch.tensor(16.0)
    ignored = problem.labels == -100
    right = scale_gradient(partial_margin_softmax, problem, scale, torch.float32)
    problem.embeddings[ignored] = math.nan
    problem.upstream[ignored] = math.nan
    got = scale_gradient(partial_margin_softmax, problem, scale, torch.float32)
    assert torch.equal(got, right)


def test_a_batch_without_samples_gives_zero(any_backend):
    for batch in (0, 3):
        problem = random_problem(batch, 9, 4, ignored=batch, reduction="mean")
        scale = torch.tensor(16.0)
        assert scale_gradient(partial_margin_softmax, problem, scale, torch.float32) == 0


@pytest.mark.parametrize("optimizer", [RowAdamW, RowSGD])
def test_an_update_inside_backward_leaves_it_its_gradient(any_backend, optimizer):
    problem = random_problem(16, 40, 8)
    results = []
    for inside in (False, True):
        loss_fn = PartialMarginSoftmax(8, 40, sample_rate=0.4, sparse_grad=True, seed=4)
        rows = optimizer(loss_fn.parameters(), lr=0.1)
        if inside:
            rows.update_in_backward(loss_fn)
        scale = torch.tensor(20.0, requires_grad=True)
        for _ in range(3):
            rows.zero_grad()
            loss_fn(problem.embeddings, problem.labels, scale=scale).backward()
            rows.step()
        results.append((loss_fn.weight.detach(), scale.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_it_is_learned():
    """The best scale for samples that lie at a known angle to their prototypes."""
    generator = torch.Generator().manual_seed(0)
    loss_fn = PartialMarginSoftmax(16, 30, margin=CombinedMargin()).requires_grad_(False)
    labels = torch.randint(30, (400,), generator=generator)
    unit = nn.functional.normalize(loss_fn.weight.detach())
    x = unit[labels] + 0.4 * torch.randn(400, 16, generator=generator)
    log_scale = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.Adam([log_scale], lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        loss_fn(x, labels, scale=log_scale.exp()).backward()
        optimizer.step()
    scales = torch.linspace(1, 30, 400)
    losses = torch.tensor([float(loss_fn(x, labels, scale=float(s)).detach()) for s in scales])
    assert float(log_scale.exp()) == pytest.approx(float(scales[losses.argmin()]), abs=0.15)
    assert loss_fn.scale == 64.0


def test_under_torch_func():
    problem = random_problem(6, 20, 5)

    def call(scale):
        return partial_margin_softmax(
            problem.embeddings,
            problem.labels,
            problem.prototypes,
            **problem.having(scale=scale).options,
        )

    scale = torch.tensor(16.0)
    leaf = scale.clone().requires_grad_()
    (right,) = torch.autograd.grad(call(leaf), leaf)
    assert torch.equal(grad(call)(scale), right)


def test_compiled_it_is_read_between_graphs():
    loss_fn = PartialMarginSoftmax(6, 20)
    x, y = torch.randn(5, 6), torch.arange(5)
    scale = torch.tensor(16.0, requires_grad=True)
    right = loss_fn(x, y, step=0, scale=scale)
    (right_gradient,) = torch.autograd.grad(right, scale)
    got = torch.compile(loss_fn, backend="aot_eager")(x, y, step=0, scale=scale)
    (gradient,) = torch.autograd.grad(got, scale)
    torch.testing.assert_close(got, right, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-6, atol=0)


def test_it_is_differentiated_once():
    problem = random_problem(6, 20, 5)
    problem.embeddings.requires_grad_()
    scale = torch.tensor(16.0, requires_grad=True)
    loss = partial_margin_softmax(
        problem.embeddings,
        problem.labels,
        problem.prototypes,
        **problem.having(scale=scale).options,
    )
    (first,) = torch.autograd.grad(loss, scale, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        first.backward()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_value_is_named(value):
    loss_fn = PartialMarginSoftmax(4, 8)
    x, y = torch.randn(2, 4), torch.arange(2)
    for scale in (value, torch.tensor(value, requires_grad=True)):
        with pytest.raises(ValueError, match=rf"^scale must be a finite number > 0, got {value}$"):
            loss_fn(x, y, scale=scale)
    assert int(loss_fn.step) == 0


def test_a_bad_tensor_is_named():
    loss_fn = PartialMarginSoftmax(4, 8)
    x, y = torch.randn(2, 4), torch.arange(2)
    for scale, what in ((torch.ones(2), "float32"), (torch.tensor(3), "int64")):
        with pytest.raises(TypeError, match=rf"^scale must be a number or .*, got a torch.{what}"):
            loss_fn(x, y, scale=scale)


def test_the_module_keeps_a_number():
    one_for_each_call = r"^scale must be a number, got a torch\.float32 tensor: give a tensor to"
    with pytest.raises(TypeError, match=one_for_each_call):
        PartialMarginSoftmax(4, 8, scale=torch.tensor(30.0))
    loss_fn = PartialMarginSoftmax(4, 8)
    with pytest.raises(TypeError, match=one_for_each_call):
        loss_fn.scale = torch.tensor(30.0)
    assert loss_fn.scale == 64.0
