"""The oracle itself, against 320-digit arithmetic, finite differences and the eager formula."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import (
    Problem,
    eager_partial_fc,
    per_sample_margin,
    random_problem,
    relative_error,
    row_errors,
    solve,
    truth,
)

from unicom_ext.margins import ArcFace, CombinedMargin, CosFace, SphereFace
from unicom_ext.reference import partial_margin_softmax

MARGINS = [ArcFace(0.3), CosFace(0.35), SphereFace(1.35), CombinedMargin(1.1, 0.2, 0.1)]


def decimal_cosface(x: list, target: int, rows: list[list], scale: float, m3: float):
    """Loss of one sample and its gradient to x, in as many digits as the context has."""
    scale, m3 = Decimal(scale), Decimal(m3)
    x, rows = [Decimal(v) for v in x], [[Decimal(v) for v in row] for row in rows]

    def unit(v):
        length = sum(a * a for a in v).sqrt()
        return [a / length for a in v], length

    (u, length), units = unit(x), [unit(row)[0] for row in rows]
    cosines = [sum(a * b for a, b in zip(u, w, strict=True)) for w in units]
    logits = [scale * (c - m3 if j == target else c) for j, c in enumerate(cosines)]
    others = sum((z - logits[target]).exp() for j, z in enumerate(logits) if j != target)
    loss = (1 + others).ln()
    slopes = [(z - logits[target]).exp() / (1 + others) for z in logits]
    slopes[target] = -others / (1 + others)
    direction = [
        scale * sum(g * w[k] for g, w in zip(slopes, units, strict=True)) for k in range(len(x))
    ]
    along = sum(a * b for a, b in zip(direction, u, strict=True))
    grad = [(a - along * b) / length for a, b in zip(direction, u, strict=True)]
    return float(loss), [float(g) for g in grad]


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
def test_against_decimal_arithmetic_from_converged_to_hopeless(scale):
    # The embedding turns from its own prototype to the opposite side, where all the others are.
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0.3, math.pi - 0.3, 41, dtype=torch.float64)
    x = torch.zeros(41, 4, dtype=torch.float64)
    x[:, 0], x[:, 1] = 3 * angle.cos(), 3 * angle.sin()
    w = 0.2 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    w[:, 0] -= 1
    w[0, 0] += 2
    labels = torch.zeros(41, dtype=torch.int64)
    options = {"margin": CosFace(0.1), "scale": scale, "reduction": "none"}
    got = solve(partial_margin_softmax, Problem(x, labels, w, options))
    with localcontext() as context:
        context.prec = 320  # digits, for 1 + 1e-290
        right = [decimal_cosface(row, 0, w.tolist(), scale, 0.1) for row in x.tolist()]
    losses = torch.tensor([loss for loss, _ in right], dtype=torch.float64)
    grads = torch.tensor([grad for _, grad in right], dtype=torch.float64)
    if scale == 64.0:
        assert losses.min() < math.exp(-90)
        assert losses.max() > 90
    # Rounding a logit of size s in the 16th digit changes a small loss by s times as much.
    held = losses > 1e-290  # by a float64; at s = 1000 the smallest are far below
    assert held.sum() > 20
    assert float(row_errors(got.loss, losses)[held].max()) < 1e-15 * (scale + 10)
    assert float(row_errors(got.grad_embeddings, grads)[held].max()) < 1e-14 * (scale + 10)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
@pytest.mark.parametrize("filtered", [None, 0.2])
def test_exact_gradients_are_those_of_finite_differences(margin, beyond_pi, filtered):
    problem = random_problem(7, 11, 6, ignored=1, dtype=torch.float64, sampled=9, features=5)
    x, w = problem.embeddings.requires_grad_(), problem.prototypes.requires_grad_()
    options = problem.options | {
        "margin": margin,
        "scale": 8.0,
        "margin_grad": "exact",
        "beyond_pi": beyond_pi,
        "interclass_filter": filtered,
        "reduction": "none",
    }
    assert torch.autograd.gradcheck(
        lambda x, w: partial_margin_softmax(x, problem.labels, w, **options),
        (x, w),
        fast_mode=True,
    )


@given(
    seed=st.integers(0, 10**6),
    margin=st.sampled_from([*MARGINS, per_sample_margin(9)]),
    margin_grad=st.sampled_from(["straight_through", "exact"]),
    beyond_pi=st.sampled_from(["keep", "linear"]),
    interclass_filter=st.sampled_from([None, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    sampled=st.sampled_from([None, 13]),
    features=st.sampled_from([None, 4]),
    ignored=st.integers(0, 8),
)
def test_agrees_with_the_eager_formula_where_that_is_sound(seed, **options):
    problem = random_problem(9, 17, 8, seed=seed, dtype=torch.float64, scale=10.0, **options)
    got, eager = truth(problem), solve(eager_partial_fc, problem)
    for a, b in zip(got, eager, strict=True):
        assert relative_error(a, b) < 1e-10


def test_straight_through_takes_the_slope_of_the_margin_as_one():
    # Then the gradient is that of CosFace with the per-sample m3 that gives the same logit.
    problem = random_problem(9, 17, 8, dtype=torch.float64, margin=ArcFace(0.5))
    options = problem.options | {"return_metrics": True}
    _, metrics = partial_margin_softmax(
        problem.embeddings, problem.labels, problem.prototypes, **options
    )
    c = metrics.target_cosine
    same_value = CosFace(c - (c.arccos() + 0.5).cos())
    for a, b in zip(truth(problem), truth(problem.having(margin=same_value)), strict=True):
        assert relative_error(a, b) < 1e-12
    # The exact slope is another one.
    exact = truth(problem.having(margin_grad="exact"))
    assert relative_error(exact.grad_embeddings, truth(problem).grad_embeddings) > 0.01


@pytest.mark.parametrize(
    "margin",
    [ArcFace(0.5), ArcFace(2.0), SphereFace(1.35), SphereFace(4.0), ArcFace(0.0), ArcFace(-0.4)],
    ids=repr,
)
def test_the_linear_continuation_is_monotone_and_changes_nothing_between_0_and_pi(margin):
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    x = torch.stack([theta.cos(), theta.sin()], dim=1)
    w = torch.eye(2, dtype=torch.float64)
    labels = torch.zeros(len(x), dtype=torch.int64)
    options = {"margin": margin, "scale": 1.0, "reduction": "none"}

    def psi(beyond_pi):  # the other logit is sin(theta), loss = log(1 + exp(sin(theta) - psi))
        loss = partial_margin_softmax(x, labels, w, beyond_pi=beyond_pi, **options)
        return theta.sin() - loss.expm1().log()

    before = margin.m1 * theta + margin.m2 <= math.pi
    held = margin.m1 * theta + margin.m2 < 0
    torch.testing.assert_close(psi("linear")[before & ~held], psi("keep")[before & ~held])
    torch.testing.assert_close(psi("linear")[held], torch.ones_like(theta[held]))
    assert (psi("linear").diff() <= 1e-12).all()
    if not before.all():
        after = ~before
        slope = psi("linear")[after].diff() / theta.cos()[after].diff()
        torch.testing.assert_close(slope, torch.ones_like(slope), atol=1e-6, rtol=0)
    if margin.m1 == 1:  # ArcFace's own continuation
        expected = theta.cos() - margin.m2 * math.sin(margin.m2)
        if margin.m2 == 0.5:
            torch.testing.assert_close(psi("linear")[~before], expected[~before])


def test_dtypes_are_promoted_to_float32_at_least():
    problem = random_problem(5, 7, 6)
    for x_dtype, w_dtype, loss_dtype in [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float16, torch.float64),
    ]:
        got = solve(partial_margin_softmax, problem.to(x_dtype, w_dtype))
        assert got.loss.dtype == loss_dtype
        assert got.grad_embeddings.dtype == x_dtype
        assert got.grad_prototypes.dtype == w_dtype
        right = truth(problem.to(x_dtype, w_dtype))
        assert relative_error(got.loss, right.loss) < 1e-5


def test_a_process_group_is_refused():
    problem = random_problem(2, 3, 4)
    with pytest.raises(NotImplementedError, match="process_group"):
        solve(partial_margin_softmax, problem.having(process_group=object()))
