"""The fused operator against float64, over shapes, options and dtypes, on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import EVERY_SET
from support.problems import (
    check_fp32,
    fp32_budget,
    per_sample_margin,
    random_problem,
    relative_error,
    solve,
    truth,
)

from unicom_ext import _engine, cpu_capability, reference
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace, SphereFace

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32, torch.float64]

# Around the tile of 6 rows x 64 classes, around vector widths along d, and beyond any block.
SHAPES = [
    (2, 2, 2),
    (5, 63, 7),
    (6, 64, 16),
    (7, 65, 17),
    (12, 128, 31),
    (64, 129, 129),
    (65, 151, 33),
    (129, 1134, 48),
    (33, 5003, 24),
    (1300, 300, 20),
    (16, 700, 512),
    (9, 100, 1030),
]

MARGINS = [
    CombinedMargin(),
    ArcFace(0.5),
    CosFace(0.35),
    SphereFace(1.35),
    CombinedMargin(1.1, 0.3, 0.2),
    CombinedMargin(1.0, -0.8, 0.1),
    per_sample_margin(40),
]

IN_FP32 = [name for name in EVERY_SET if "amx" not in name]  # which has the others' kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, capability):
    problem = random_problem(*shape, seed=sum(shape), closeness=1.0)
    check_fp32(solve(partial_margin_softmax, problem), problem)


# One block of rows and two; a constant shift and a running one.
@pytest.mark.slow
@pytest.mark.parametrize(("batch", "scale"), [(5, 30.0), (200, 100.0)])
@pytest.mark.parametrize("name", IN_FP32)
def test_so_many_classes_that_sums_are_taken_up_again(batch, scale, name):
    problem, budget = of_many_classes(batch, scale)
    with cpu_capability(name):
        budget.check(solve(partial_margin_softmax, problem))


@functools.cache
def of_many_classes(batch, scale):
    # Runs of classes are longer than what is added up in float32 at a time; some rows point where
    # no class lies, so that their largest cosine comes late and the running shift moves.
    problem = random_problem(batch, 70_001, 4, scale=scale, closeness=0.3)
    problem.prototypes[:60_000, 0] = -problem.prototypes[:60_000, 0].abs()
    problem.embeddings[::2, 0] = problem.embeddings[::2, 0].abs() + 3
    return problem, fp32_budget(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FP32)
def test_rounding_does_not_grow_with_the_number_of_classes(name):
    problem = random_problem(4, 300_000, 6, scale=16.0, closeness=0.3)
    with cpu_capability(name):
        outcome = solve(partial_margin_softmax, problem)
    for a, b in zip(outcome, truth(problem), strict=True):
        assert relative_error(a, b) <= 5e-7  # one sum in float32: 4e-5


# Squares of 16 x 16 units, two by two, of a run of 96 rows and 256 classes, ends of all of them.
@pytest.mark.parametrize("name", [name for name in EVERY_SET if "amx" in name])
@given(
    st.integers(1, 210), st.integers(1, 290), st.integers(1, 130), st.integers(1, 3),
    st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=25)
def test_squares_of_a_matrix_unit(name, batch, num_classes, dim, centers, running, seed):
    problem = random_problem(
        batch,
        num_classes,
        dim,
        seed=seed,
        precision="bf16",
        num_centers=centers,
        scale=300.0 if running else 30.0,
        interclass_filter=0.4,
        ignored=batch // 4,
    )
    outcomes = []
    for kernels in ("portable", name):
        with cpu_capability(kernels):
            outcomes.append(solve(partial_margin_softmax, problem))
    for expected, found in zip(*outcomes, strict=True):
        # Sums in another order, which some roundings to bf16 come out otherwise after.
        assert relative_error(found, expected) <= (2e-3 if running else 2e-4)


@pytest.mark.parametrize("shape", [(7, 65, 17), (65, 151, 33), (129, 1134, 48)], ids=str)
def test_shapes_of_selections(shape, capability):
    batch, num_classes, dim = shape
    problem = random_problem(
        *shape, sampled=num_classes * 3 // 5, features=dim * 2 // 3, ignored=batch // 4
    )
    check_fp32(solve(partial_margin_softmax, problem), problem)


@pytest.mark.pairs
@pytest.mark.parametrize(
    "shape", [(1, 64, 5), (65, 151, 33), (9, 1000, 40), (700, 300, 20)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"dtype": torch.float64}, {"scale": 1000.0}],
    ids=str,
)
def test_what_is_kept_for_backward_changes_nothing(shape, options, capability):
    problem = random_problem(*shape, closeness=0.5, interclass_filter=0.3, ignored=1, **options)
    kept = solve(partial_margin_softmax, problem)
    for workspace_bytes in (0, 1, 10_000, 100_000, 300_000):
        again = solve(partial_margin_softmax, problem.having(workspace_bytes=workspace_bytes))
        for a, b in zip(again, kept, strict=True):
            assert torch.equal(a, b), workspace_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", _engine.cpu_capabilities())
def test_more_is_kept_than_caches_hold(name, precision):
    problem = random_problem(513, 4200, 13, closeness=0.5, precision=precision)  # 8.6 MB
    with cpu_capability(name):
        kept = solve(partial_margin_softmax, problem)
        again = solve(partial_margin_softmax, problem.having(workspace_bytes=0))
    for a, b in zip(again, kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.pairs
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("margin_grad", ["straight_through", "exact"])
@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
@pytest.mark.parametrize("interclass_filter", [None, 0.1])
def test_options(margin, margin_grad, beyond_pi, interclass_filter, capability):
    problem = random_problem(
        40,
        131,
        37,
        closeness=0.5,
        margin=margin,
        margin_grad=margin_grad,
        beyond_pi=beyond_pi,
        interclass_filter=interclass_filter,
    )
    # Angles on both sides of pi, or the option would not matter.
    problem.embeddings[::5] -= 2 * problem.prototypes[problem.labels[::5]]
    check_fp32(solve(partial_margin_softmax, problem), problem)


def test_the_interclass_filter_works_below_zero_too(capability):
    problem = random_problem(40, 131, 37, interclass_filter=-0.1)
    check_fp32(solve(partial_margin_softmax, problem), problem)


@pytest.mark.pairs
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
def test_dtypes(x_dtype, w_dtype, capability):
    problem = random_problem(33, 131, 37, closeness=1.0, sampled=80, features=30)
    problem = problem.to(x_dtype, w_dtype)
    got, right = solve(partial_margin_softmax, problem), truth(problem)
    arithmetic = torch.float64 if torch.float64 in (x_dtype, w_dtype) else torch.float32
    for a, b, dtype in zip(got, right, (arithmetic, x_dtype, w_dtype), strict=True):
        assert a.dtype == dtype
        # The arithmetic is that of the wider type, and each gradient is rounded once at the end.
        rounding = max(100 * torch.finfo(arithmetic).eps, torch.finfo(dtype).eps)
        assert relative_error(a, b) < rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_precision_are_rounded_once(dtype, capability):
    # Of a size at which both gradients are sums over several chunks.
    problem = random_problem(260, 3000, 16, closeness=0.5, dtype=dtype, reduction="sum")
    got = solve(partial_margin_softmax, problem.having(workspace_bytes=0))
    right = solve(partial_margin_softmax, problem.to(torch.float32).having(workspace_bytes=0))
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("batch", [1, 5, 6, 200])
def test_float64_runs_in_float64(batch, any_backend):
    problem = random_problem(batch, 700, 65, dtype=torch.float64, closeness=0.5, features=60)
    for a, b in zip(solve(partial_margin_softmax, problem), truth(problem), strict=True):
        assert a.dtype == torch.float64
        assert relative_error(a, b) < 1e-13


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [(64, 2000, 512), (7, 65, 511), (300, 300, 640)], ids=str)
@pytest.mark.parametrize("closeness", [0.0, 1.0])
@pytest.mark.parametrize("features", [None, 500])
def test_bf16_operands(shape, closeness, features, capability):
    # Stated budgets of unit rows rounded to bf16 at s = 64, d = 512: logits off by 3.7e-2 at most
    # and the loss of a sample by 2.4e-2. A relative error of the gradients is one of logits.
    problem = random_problem(
        *shape, closeness=closeness, features=features, precision="bf16", reduction="none"
    )
    got, right = solve(partial_margin_softmax, problem), truth(problem)
    assert float((got.loss - right.loss).abs().max()) < 2.4e-2
    assert relative_error(got.grad_embeddings, right.grad_embeddings) < 3.7e-2
    assert relative_error(got.grad_prototypes, right.grad_prototypes) < 3.7e-2
    # They are used: this is not the fp32 result.
    assert relative_error(got.loss, right.loss) > 1e-6


def test_labels_may_be_int32(any_backend):
    problem = random_problem(33, 131, 37, ignored=3)
    for a, b in zip(
        solve(partial_margin_softmax, problem),
        solve(partial_margin_softmax, replace_labels(problem, problem.labels.int())),
        strict=True,
    ):
        assert torch.equal(a, b)


def replace_labels(problem, labels):
    return type(problem)(
        problem.embeddings, labels, problem.prototypes, problem.options, problem.upstream
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inputs_need_not_be_contiguous(dtype, capability):
    problem = random_problem(33, 131, 37, dtype=dtype, sampled=80, features=30)
    x, w, y = problem.embeddings, problem.prototypes, problem.labels
    spread = {
        name: torch.stack([t, -t], dim=1).flatten()[::2]
        for name, t in problem.options.items()
        if isinstance(t, torch.Tensor)
    }
    assert not any(t.is_contiguous() for t in spread.values())

    def run(x, w, y, **options):
        x, w = x.requires_grad_(), w.requires_grad_()
        loss = partial_margin_softmax(x, y, w, **{**problem.options, **options})
        return loss, *torch.autograd.grad(loss, (x, w))

    columns = run(x.T.clone().T, w.T.clone().T, torch.stack([y, y], dim=1)[:, 0], **spread)
    slices = run(torch.cat([x, x], dim=1)[:, :37], torch.cat([w, w])[: len(w)], y)
    expanded = run(x, w, y[:1].expand(33))
    for a, b, c in zip(run(x, w, y), columns, slices, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(run(x, w, y[:1].repeat(33)), expanded, strict=True):
        assert torch.equal(a, b)


def test_reductions_are_sums_and_means_of_the_samples(capability):
    problem = random_problem(33, 131, 37, ignored=5)
    none, total, mean = (
        solve(partial_margin_softmax, problem.having(reduction=reduction))
        for reduction in ("none", "sum", "mean")
    )
    assert none.loss.shape == (33,)
    assert torch.equal(none.loss == 0, problem.labels == -100)
    for a, b, c in zip((none.loss.sum(), *none[1:]), total, mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(b, c * 28, rtol=1e-5, atol=1e-6)


def test_each_sample_has_its_own_upstream_gradient(capability):
    problem = random_problem(33, 131, 37, ignored=5, reduction="none")
    assert problem.upstream.unique().numel() == 33
    check_fp32(solve(partial_margin_softmax, problem), problem)


def test_the_upstream_gradient_scales_the_gradients(capability):
    problem = random_problem(33, 131, 37)
    x, w = problem.embeddings.requires_grad_(), problem.prototypes.requires_grad_()
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(-1024 * loss, (x, w)), strict=True):
        torch.testing.assert_close(-1024 * a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignore_index", [-100, -1, 7, 1000])
def test_ignored_samples_are_as_if_they_were_not_there(ignore_index, capability):
    problem = random_problem(33, 131, 37, ignored=9)
    kept = problem.labels != -100
    labels = problem.labels.clone()
    labels[kept & (labels == ignore_index)] += 1  # that id is free to mean "ignored"
    problem = replace_labels(problem, labels)
    marked = replace_labels(problem, labels.masked_fill(~kept, ignore_index))
    got = solve(partial_margin_softmax, marked.having(ignore_index=ignore_index))
    alone = type(problem)(
        problem.embeddings[kept], labels[kept], problem.prototypes, problem.options
    )
    right = truth(alone)
    assert relative_error(got.loss, right.loss) < 1e-5
    assert relative_error(got.grad_embeddings[kept], right.grad_embeddings) < 1e-5
    assert relative_error(got.grad_prototypes, right.grad_prototypes) < 1e-5
    assert not got.grad_embeddings[~kept].any()


def test_what_ignored_rows_hold_does_not_matter(capability):
    problem = random_problem(33, 131, 37, ignored=9)
    clean = solve(partial_margin_softmax, problem)
    ignored = problem.labels == -100
    for value in (float("nan"), float("inf"), 0.0, 1e30):
        problem.embeddings[ignored] = value
        for a, b in zip(solve(partial_margin_softmax, problem), clean, strict=True):
            assert torch.equal(a, b), value


def test_a_selection_is_the_same_as_gathered_inputs(capability):
    problem = random_problem(33, 131, 37, sampled=80, features=30)
    classes, features = problem.options["class_index"], problem.options["feature_index"]
    gathered = type(problem)(
        problem.embeddings[:, features].contiguous(),
        torch.searchsorted(classes, problem.labels),
        problem.prototypes[classes][:, features].contiguous(),
        problem.having(class_index=None, feature_index=None).options,
    )
    got = solve(partial_margin_softmax, problem)
    right = solve(partial_margin_softmax, gathered)
    assert relative_error(got.loss, right.loss) < 1e-6
    assert relative_error(got.grad_embeddings[:, features], right.grad_embeddings) < 1e-6
    assert relative_error(got.grad_prototypes[classes][:, features], right.grad_prototypes) < 1e-6
    outside = got.grad_prototypes.clone()
    outside[classes[:, None], features] = 0
    assert not outside.any()
    outside = got.grad_embeddings.clone()
    outside[:, features] = 0
    assert not outside.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_margin_per_sample_is_the_same_as_one_for_all(dtype, capability):
    problem = random_problem(33, 131, 37, dtype=dtype, margin=CombinedMargin(1.0, 0.25, 0.125))
    m2, m3 = torch.full((33,), 0.25), torch.full((33,), 0.125)
    tensors = problem.having(margin=CombinedMargin(1.0, m2.to(dtype), m3.to(dtype)))
    for a, b in zip(
        solve(partial_margin_softmax, problem), solve(partial_margin_softmax, tensors), strict=True
    ):
        assert torch.equal(a, b)


def test_all_three_margins_count(capability):
    losses = {
        float(solve(partial_margin_softmax, random_problem(33, 131, 37, margin=margin)).loss)
        for m1 in (1.0, 1.2)
        for m2 in (0.0, 0.3)
        for m3 in (0.0, 0.2)
        for margin in [CombinedMargin(m1, m2, m3)]
    }
    assert len(losses) == 8


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("interclass_filter", [None, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics(dtype, interclass_filter, reduction, capability):
    problem = random_problem(
        65,
        151,
        37,
        closeness=0.5,
        ignored=9,
        sampled=120,
        dtype=dtype,
        interclass_filter=interclass_filter,
        reduction=reduction,
        return_metrics=True,
    )
    kept = problem.labels != -100
    x, w = problem.embeddings.requires_grad_(), problem.prototypes.requires_grad_()
    loss, got = partial_margin_softmax(x, problem.labels, w, **problem.options)
    _, right = reference.partial_margin_softmax(
        x.double(), problem.labels, w.double(), **problem.options
    )
    assert loss.requires_grad
    assert not any(value.requires_grad for value in got)
    torch.testing.assert_close(
        got.loss[kept].mean() if reduction == "mean" else got.loss, loss.detach()
    )
    assert not got.loss[~kept].any()
    assert not got.top1[~kept].any()
    assert got.top1.dtype == torch.bool
    assert 0 < got.top1.sum() < kept.sum()
    for name in ("loss", "target_cosine", "largest_negative", "top1"):
        a, b = getattr(got, name)[kept], getattr(right, name)[kept]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_metrics_do_not_change_the_result(any_backend):
    problem = random_problem(33, 131, 37)
    plain = solve(partial_margin_softmax, problem)
    with_metrics = solve(
        lambda *args, **options: partial_margin_softmax(*args, return_metrics=True, **options)[0],
        problem,
    )
    for a, b in zip(plain, with_metrics, strict=True):
        assert torch.equal(a, b)


@pytest.mark.pairs
@pytest.mark.parametrize("features", [None, 30])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sparse_gradient_equals_the_dense_one(features, dtype, capability):
    problem = random_problem(33, 131, 37, sampled=80, features=features, dtype=dtype)
    w = problem.prototypes.clone().requires_grad_()
    options = problem.options | {"sparse_grad": True}
    partial_margin_softmax(problem.embeddings, problem.labels, w, **options).backward()
    assert w.grad.is_sparse
    assert w.grad.shape == w.shape
    assert w.grad.dtype == dtype
    assert torch.equal(w.grad._indices()[0], options["class_index"])
    dense = solve(partial_margin_softmax, problem).grad_prototypes
    assert torch.equal(w.grad.to_dense(), dense)
