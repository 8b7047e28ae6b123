"""Where losses of this kind break: converged and hopeless samples, cos = +-1, zeros, nothing,
extreme scales. The operator on every instruction set; what is a definition, on the reference too.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import backends
from support.problems import (
    Problem,
    check_fp32,
    distance,
    per_sample_margin,
    random_problem,
    relative_error,
    row_errors,
    solve,
    truth,
)

from unicom_ext import functional, reference
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace

op = functional.partial_margin_softmax


DEFINITIONS = {
    "op fp32": (op, torch.float32),
    "op fp64": (op, torch.float64),
    "reference": (reference.partial_margin_softmax, torch.float64),
}


@pytest.fixture(params=DEFINITIONS.values(), ids=DEFINITIONS)
def definition(request, capability):
    """(implementation, dtype) of everything that has to keep to the defined corners."""
    return request.param


# --- converged and hopeless samples


def from_converged_to_hopeless(dim: int = 24, num_classes: int = 50, scale=64.0, **options):
    """Embeddings that turn from their prototype to the opposite side, where the others are."""
    generator = torch.Generator().manual_seed(dim)
    turns = torch.linspace(0.2, math.pi - 0.2, 101)
    x = 0.02 * torch.randn(101, dim, generator=generator)
    x[:, 0] += turns.cos()
    x[:, 1] += turns.sin()
    w = 0.05 * torch.randn(num_classes, dim, generator=generator)
    w[:, 0] -= 1
    w[3, 0] += 2
    labels = torch.full((101,), 3)
    problem = Problem(
        x, labels, w, {"margin": ArcFace(0.3), "scale": scale, "reduction": "none", **options}
    )
    loss = truth(problem).loss  # log(1 + exp t), t = A - z_y
    kept = (loss > math.exp(-90)) & (loss < 90)
    assert kept.sum() > 40
    assert loss[kept].min() < math.exp(-85)
    assert loss[kept].max() > 85
    return Problem(x[kept], labels[kept], w, problem.options)


@pytest.mark.pairs
@pytest.mark.parametrize("margin", [CombinedMargin(), CosFace(0.1), ArcFace(0.3)], ids=repr)
@pytest.mark.parametrize("margin_grad", ["straight_through", "exact"])
def test_every_sample_is_right_however_converged(margin, margin_grad, capability):
    # cross_entropy gives exactly 0 where the loss is small, so it is no yardstick here: the stable
    # formula in float32 is.
    problem = from_converged_to_hopeless(margin=margin, margin_grad=margin_grad)
    got, right = solve(op, problem), truth(problem)
    stable = solve(reference.partial_margin_softmax, problem)
    for name in ("loss", "grad_embeddings"):
        a, b, c = (getattr(outcome, name) for outcome in (got, right, stable))
        errors, allowed = row_errors(a, b), 3 * row_errors(c, b).max() + 3e-6
        # What is left of the smallest numbers, around 1e-39, are multiples of 2^-149.
        size = b.reshape(len(b), -1).norm(dim=1)
        slack = 2 * 2**-149 * math.sqrt(problem.embeddings.shape[1]) / size
        assert (errors <= allowed + slack).all(), (name, errors.tolist(), float(allowed))


def test_prototype_gradients_are_right_however_converged(capability):
    problem = from_converged_to_hopeless()
    x, w = problem.embeddings, problem.prototypes.requires_grad_()
    loss = op(x, problem.labels, w, **problem.options)
    right_w = w.detach().double().requires_grad_()
    right_loss = reference.partial_margin_softmax(
        x.double(), problem.labels, right_w, **problem.options
    )
    for i in range(len(x)):
        (got,) = torch.autograd.grad(loss[i], w, retain_graph=True)
        (right,) = torch.autograd.grad(right_loss[i], right_w, retain_graph=True)
        if float(right.norm()) > 1e-32:  # else it is made of the last numbers before zero
            assert relative_error(got, right) < 3e-5, (i, float(right_loss[i]))


def test_converged_samples_with_bf16_operands(capability):
    # At 24 dimensions a logit may be off by some tenths, and a small loss by as much relatively;
    # what must not happen is that 1 - p is computed from a rounded p.
    problem = from_converged_to_hopeless(precision="bf16")
    got, right = solve(op, problem), truth(problem)
    for name in ("loss", "grad_embeddings"):
        assert row_errors(getattr(got, name), getattr(right, name)).max() < 0.3


@pytest.mark.parametrize("scale", [80.0, 200.0, 1000.0])
def test_converged_samples_at_large_scales(scale, capability):
    problem = from_converged_to_hopeless().having(scale=scale)
    got, right = solve(op, problem), truth(problem)
    stable = solve(reference.partial_margin_softmax, problem)
    held = right.loss > 1e-36
    assert held.sum() > 30
    for name in ("loss", "grad_embeddings"):
        a, b, c = (getattr(outcome, name) for outcome in (got, right, stable))
        errors, allowed = row_errors(a, b)[held], 3 * row_errors(c, b)[held].max() + 3e-6
        assert (errors <= allowed).all(), (name, errors.tolist(), float(allowed))
        assert not (a[~held].abs() > 1e-30).any()


def test_a_converged_batch_still_has_a_gradient(capability):
    # All of them at once: nothing large hides what is lost.
    problem = random_problem(64, 500, 64, closeness=50.0, scale=30.0, margin=CosFace(0.2))
    right = truth(problem)
    assert right.loss < 1e-5
    check_fp32(solve(op, problem), problem)
    got = solve(op, problem)
    assert relative_error(got.grad_embeddings, right.grad_embeddings) < 1e-5
    assert relative_error(got.grad_prototypes, right.grad_prototypes) < 1e-5


# --- extreme scales


@pytest.mark.pairs
@pytest.mark.parametrize("scale", [1e-3, 1.0, 64.0, 78.9, 79.0, 79.1, 80.0, 200.0, 1000.0])
@pytest.mark.parametrize("closeness", [0.0, 0.7])
@pytest.mark.parametrize("margin", [ArcFace(0.3), per_sample_margin(48)], ids=["one", "each"])
def test_scales(scale, closeness, margin, capability):
    problem = random_problem(
        48, 300, 40, scale=scale, closeness=closeness, margin=margin, ignored=5
    )
    check_fp32(solve(op, problem), problem)


@pytest.mark.parametrize("scale", [64.0, 79.0, 1000.0])
def test_all_cosines_at_one_end(scale, capability):
    # Sums of |S| equal terms exp(s) or exp(-s): the shift must neither overflow nor underflow.
    w = torch.randn(1, 16).expand(3000, 16) + 1e-3 * torch.randn(3000, 16)
    for sign in (1, -1):
        problem = Problem(
            sign * w[:20] * 3.0,
            torch.arange(20),
            w,
            {"margin": CombinedMargin(), "scale": scale, "reduction": "none"},
        )
        got, right = solve(op, problem), truth(problem)
        # All logits agree to 1e-3, so the loss is near log |S| at any scale.
        assert float((right.loss - math.log(3000)).abs().max()) < 0.1
        assert float((got.loss - right.loss).abs().max()) < 1e-6 * scale
        for gradient in got[1:]:
            assert gradient.isfinite().all()


# --- cos = +-1


@pytest.mark.pairs
@pytest.mark.parametrize("margin_grad", ["straight_through", "exact"])
@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
@pytest.mark.parametrize(
    "margin", [ArcFace(0.5), ArcFace(0.0), CosFace(0.35), CombinedMargin(1.35, 0.2)], ids=repr
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_embeddings_along_their_prototype(margin_grad, beyond_pi, margin, sign, definition):
    implementation, dtype = definition
    problem = random_problem(
        30,
        50,
        20,
        margin=margin,
        margin_grad=margin_grad,
        beyond_pi=beyond_pi,
        reduction="none",
        dtype=dtype,
    )
    # Multiples of powers of two and others: cosines on, above and below +-1 after rounding.
    lengths = torch.linspace(0.3, 4.0, 30, dtype=dtype).round(decimals=1)[:, None]
    problem.embeddings[:] = sign * lengths * problem.prototypes[problem.labels]
    problem.embeddings[:10] = sign * 2 * problem.prototypes[problem.labels[:10]]
    got = solve(implementation, problem)
    theta = 0.0 if sign > 0 else math.pi
    psi = math.cos(margin.m1 * theta + margin.m2) - margin.m3
    if beyond_pi == "linear" and margin.m1 * theta + margin.m2 > math.pi:
        last = (math.pi - margin.m2) / margin.m1
        psi = -1 - max((math.pi - last) * math.sin(last), 1 + math.cos(last)) - margin.m3
    x, w = problem.embeddings.double(), problem.prototypes.double()
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    cosine[torch.arange(30), problem.labels] = psi
    right = torch.nn.functional.cross_entropy(64 * cosine, problem.labels, reduction="none")
    # An angle near 0 is only known to the root of a rounding error, 3e-4 in float32.
    tolerance = 64 * 1e-3 if dtype == torch.float32 else 64 * 1e-7
    if sign > 0:  # some of these losses are small
        assert float((got.loss - right).abs().max()) < tolerance
    else:
        torch.testing.assert_close(got.loss.double(), right, rtol=0, atol=tolerance)
    # The gradient is finite. Along the target there is nothing left of it after the projection;
    # with the exact slope, of up to 1e6, rounding errors of the cosine are what may be seen.
    expected = truth(problem)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.isfinite().all()
        if margin_grad == "straight_through":
            assert distance(a, b) < 1e-3 * float(b.norm()) + 64 * 1e-6
        else:
            assert float(a.abs().max()) < 1e3


@pytest.mark.parametrize("margin_grad", ["straight_through", "exact"])
def test_one_dimension(margin_grad, definition):
    # Every cosine is +-1 and no gradient survives the projection.
    implementation, dtype = definition
    problem = random_problem(17, 23, 1, dtype=dtype, margin_grad=margin_grad, reduction="none")
    got, right = solve(implementation, problem), truth(problem)
    assert row_errors(got.loss, right.loss).max() < 1e-5
    size = 64 / problem.prototypes.abs().min()
    assert got.grad_embeddings.isfinite().all()
    assert got.grad_prototypes.isfinite().all()
    if margin_grad == "straight_through":
        assert float(got.grad_embeddings.abs().max()) < 1e-5 * 64 / problem.embeddings.abs().min()
        assert float(got.grad_prototypes.abs().max()) < 1e-4 * size


def test_one_selected_feature(capability):
    problem = random_problem(17, 23, 9, features=1, reduction="none")
    got, right = solve(op, problem), truth(problem)
    assert row_errors(got.loss, right.loss).max() < 1e-5
    outside = torch.ones(9, dtype=torch.bool)
    outside[problem.options["feature_index"]] = False
    assert not got.grad_embeddings[:, outside].any()
    assert not got.grad_prototypes[:, outside].any()


# --- labels and classes


@pytest.mark.parametrize("batch", [2, 7, 64, 200])
def test_all_labels_equal(batch, capability):
    problem = random_problem(batch, 100, 24, closeness=0.3)
    problem.labels[:] = 41
    check_fp32(solve(op, problem), problem)


def test_many_samples_of_few_labels(capability):
    problem = random_problem(150, 100, 24)
    problem.labels.remainder_(3)
    check_fp32(solve(op, problem), problem)


def test_only_the_positives_are_sampled(capability):
    problem = random_problem(20, 1000, 24)
    positives = problem.labels.unique()
    check_fp32(
        solve(op, problem.having(class_index=positives)), problem.having(class_index=positives)
    )


def test_two_classes(capability):
    problem = random_problem(20, 2, 24)
    check_fp32(solve(op, problem), problem)
    problem = random_problem(20, 1000, 24)
    problem.labels.fill_(999)
    problem = problem.having(class_index=torch.tensor([0, 999]))
    check_fp32(solve(op, problem), problem)


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("scale", [64.0, 1000.0])
def test_no_other_class(reduction, selected, scale, definition):
    implementation, dtype = definition
    problem = random_problem(
        9, 7 if selected else 1, 12, dtype=dtype, reduction=reduction, scale=scale
    )
    if selected:
        problem.labels.fill_(4)
        problem = problem.having(class_index=torch.tensor([4]))
    got = solve(implementation, problem)
    assert not any(value.any() for value in got)  # exactly 0, not NaN
    _, metrics = implementation(
        problem.embeddings,
        problem.labels,
        problem.prototypes,
        **problem.options,
        return_metrics=True,
    )
    assert (metrics.largest_negative == -math.inf).all()
    assert metrics.top1.all()


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("selected", [None, 0, 1, 60])
def test_all_samples_ignored(reduction, selected, definition):
    implementation, dtype = definition
    solve(implementation, random_problem(9, 100, 12, dtype=dtype))  # whose memory is used again
    problem = random_problem(
        9, 100, 12, dtype=dtype, reduction=reduction, ignored=9, sampled=selected
    )
    got = solve(implementation, problem)
    assert got.loss.shape == ((9,) if reduction == "none" else ())
    assert got.grad_embeddings.shape == (9, 12)
    assert got.grad_prototypes.shape == (100, 12)
    assert not any(value.any() for value in got)


def test_no_label_is_among_no_classes(any_backend):
    problem = random_problem(9, 100, 12).having(class_index=torch.empty(0, dtype=torch.int64))
    if any_backend == backends.BEST:
        message = f"class_index must hold every label, but {int(problem.labels[0])} at position 0"
        with pytest.raises(ValueError, match=message):
            solve(op, problem)
    else:
        assert solve(op, problem).loss.isnan()


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_empty_batch(reduction, label_dtype, definition):
    implementation, dtype = definition
    problem = random_problem(
        0, 100, 12, dtype=dtype, reduction=reduction, margin=per_sample_margin(0)
    )
    problem = Problem(
        problem.embeddings, problem.labels.to(label_dtype), problem.prototypes, problem.options
    )
    got = solve(implementation, problem)
    assert got.loss.shape == ((0,) if reduction == "none" else ())
    assert got.grad_embeddings.shape == (0, 12)
    assert got.grad_prototypes.shape == (100, 12)
    assert not any(value.any() for value in got)
    _, metrics = implementation(
        problem.embeddings,
        problem.labels,
        problem.prototypes,
        **problem.having(return_metrics=True).options,
    )
    assert all(value.shape == (0,) for value in metrics)


def test_one_sample(capability):
    for seed in range(5):
        problem = random_problem(1, 100, 24, seed=seed)
        for a, b in zip(solve(op, problem), truth(problem), strict=True):
            assert relative_error(a, b) < 1e-5


# --- zero rows, small and large rows, NaN


@pytest.mark.parametrize("margin_grad", ["straight_through", "exact"])
def test_zero_rows(margin_grad, definition):
    implementation, dtype = definition
    problem = random_problem(
        20, 50, 12, dtype=dtype, margin_grad=margin_grad, reduction="none", features=9
    )
    problem.labels[:4] = torch.tensor([11, 12, 13, 14])
    # Zero on the selected dimensions is what counts.
    features = problem.options["feature_index"]
    for tensor, rows in ((problem.embeddings, [0, 1, 7]), (problem.prototypes, [11, 12, 40])):
        for row in rows:
            tensor[row, features] = 0.0
    got = solve(implementation, problem)
    # Embedding 0: all cosines are 0.
    psi = math.cos(math.pi / 2 + 0.3)
    assert float(got.loss[0]) == pytest.approx(math.log(49 + math.exp(64 * psi)) - 64 * psi, 1e-5)
    assert not got.grad_embeddings[[0, 1, 7]].any()
    assert not got.grad_prototypes[[11, 12, 40]].any()
    for a, b in zip(got, truth(problem), strict=True):
        assert relative_error(a, b) < 1e-5


def test_everything_zero(definition):
    implementation, dtype = definition
    problem = random_problem(5, 8, 4, dtype=dtype, margin=CombinedMargin())
    problem.embeddings.zero_()
    problem.prototypes.zero_()
    got = solve(implementation, problem)
    assert float(got.loss) == pytest.approx(math.log(8), rel=1e-5)
    assert not got.grad_embeddings.any()
    assert not got.grad_prototypes.any()


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_the_length_of_rows_does_not_matter(size, definition):
    # Their squares leave the range of float32.
    implementation, dtype = definition
    problem = random_problem(20, 50, 12, dtype=dtype)
    right = truth(problem)
    problem.embeddings[::2] *= size
    problem.prototypes[::3] *= size
    got = solve(implementation, problem)
    assert relative_error(got.loss, right.loss) < 1e-5
    assert row_errors(got.grad_embeddings[::2] * size, right.grad_embeddings[::2]).max() < 1e-4
    assert row_errors(got.grad_embeddings[1::2], right.grad_embeddings[1::2]).max() < 1e-4
    if size < 1e20:  # else their gradients may round to zero
        for start, factor in ((0, size), (1, 1.0), (2, 1.0)):
            a, b = got.grad_prototypes[start::3] * factor, right.grad_prototypes[start::3]
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-520, 2.0**520, 2.0**1000])
def test_nor_does_it_where_squares_leave_the_range_of_float64(size, any_backend):
    problem = random_problem(20, 50, 12, dtype=torch.float64, features=7)
    right = solve(functional.partial_margin_softmax, problem)
    problem.embeddings[::2] *= size
    problem.prototypes[::3] *= size
    got = solve(functional.partial_margin_softmax, problem)
    torch.testing.assert_close(got.loss, right.loss, rtol=1e-13, atol=0)
    for a, b, step in zip(got[1:], right[1:], (2, 3), strict=True):
        torch.testing.assert_close(a[1::step], b[1::step], rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(a[::step] * size, b[::step], rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_has_the_loss_nan_and_leaves_the_others_alone(
    value, definition
):
    implementation, dtype = definition
    problem = random_problem(20, 50, 12, dtype=dtype, reduction="none")
    right = truth(problem)
    problem.embeddings[7, 3] = value
    got = solve(implementation, problem)
    others = torch.arange(20) != 7
    assert got.loss[7].isnan()
    assert relative_error(got.loss[others], right.loss[others]) < 1e-5
    assert relative_error(got.grad_embeddings[others], right.grad_embeddings[others]) < 1e-5
    mean = problem.having(reduction="mean").options
    assert implementation(problem.embeddings, problem.labels, problem.prototypes, **mean).isnan()


@pytest.mark.parametrize("scale", [64.0, 1000.0])
def test_a_prototype_that_is_not_finite_gives_nan(scale, definition):
    implementation, dtype = definition
    problem = random_problem(20, 50, 12, dtype=dtype, scale=scale, reduction="none")
    problem.labels.remainder_(30)
    for row in (5, 40):  # with samples of its own or not
        problem.prototypes[row, 3] = math.nan
        assert solve(implementation, problem).loss.isnan().all()
        problem.prototypes[row, 3] = 0.5


# --- the interclass filter


def test_filtered_classes_stay_in_the_sum_as_one_and_have_no_gradient(definition):
    implementation, dtype = definition
    w = torch.eye(4, dtype=dtype)
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0]], dtype=dtype)  # cosines 1/3, 2/3, 2/3, 0
    labels = torch.tensor([0])
    options = {"margin": CombinedMargin(), "scale": 6.0, "interclass_filter": 0.5}
    got = solve(implementation, Problem(x, labels, w, options))
    assert float(got.loss) == pytest.approx(math.log(math.exp(2) + 3) - 2, rel=1e-6)
    assert not got.grad_prototypes[1:3].any()
    assert got.grad_prototypes[3].any()
    # The target is never filtered, and the metrics are from before the filter.
    problem = Problem(x, torch.tensor([1]), w, options)
    loss, metrics = implementation(x, problem.labels, w, **options, return_metrics=True)
    assert float(loss) == pytest.approx(math.log(math.exp(4) + math.exp(2) + 2) - 4, rel=1e-6)
    assert float(metrics.largest_negative) == pytest.approx(2 / 3)


def test_every_negative_filtered(capability):
    problem = random_problem(20, 50, 12, interclass_filter=-1.0)
    got, right = solve(op, problem), truth(problem)
    assert relative_error(got.loss, right.loss) < 1e-5
    assert relative_error(got.grad_embeddings, right.grad_embeddings) < 1e-5
