"""The gradient of the loss with respect to margins that are tensors."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import Problem, random_problem, row_errors
from support.updates import batch, make
from torch import Tensor

from unicom_ext import PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace
from unicom_ext.optim import RowAdamW


def margins_of(
    problem: Problem,
    implementation=partial_margin_softmax,
    inputs_too=True,
    m1=1.0,
    m2=None,
    m3=None,
) -> list[Tensor]:
    """Gradients of those of m2 and m3 that are given, in one backward pass."""
    given = [m.detach().clone().requires_grad_() for m in (m2, m3) if m is not None]
    each = iter(given)
    margin = CombinedMargin(m1, *(0.1 if m is None else next(each) for m in (m2, m3)))
    x, w = (t.detach().clone() for t in (problem.embeddings, problem.prototypes))
    x.requires_grad_(inputs_too)
    w.requires_grad_(inputs_too)
    options = problem.options | {"margin": margin}
    loss = implementation(x, problem.labels, w, **options)
    upstream = torch.ones_like(loss) if problem.upstream is None else problem.upstream.to(loss)
    loss.backward(upstream)
    return [m.grad for m in given]


def right(problem: Problem, **margins) -> list[Tensor]:
    margins = {n: m.double() if isinstance(m, Tensor) else m for n, m in margins.items()}
    return margins_of(problem.to(torch.float64), reference.partial_margin_softmax, **margins)


def uniform(size: int, low: float, high: float, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (low + (high - low) * torch.rand(size, generator=generator)).to(dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("m1", [1.0, 1.3])
@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
@pytest.mark.parametrize("margin_grad", ["exact", "straight_through"])
@pytest.mark.parametrize("interclass_filter", [None, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(m1, beyond_pi, margin_grad, interclass_filter, reduction, any_backend):
    problem = random_problem(
        7, 11, 6, ignored=1, sampled=9, features=5, dtype=torch.float64, scale=8.0,
        margin_grad=margin_grad, beyond_pi=beyond_pi, interclass_filter=interclass_filter,
        reduction=reduction,
    )  # fmt: skip
    # Up to where most angles are past pi.
    m2 = uniform(7, 0.1, 2.5, torch.float64).requires_grad_()
    m3 = uniform(7, 0.0, 0.5, torch.float64).requires_grad_()
    for implementation in (partial_margin_softmax, reference.partial_margin_softmax):

        def loss(m2, m3, implementation=implementation):
            options = problem.options | {"margin": CombinedMargin(m1, m2, m3)}
            return implementation(problem.embeddings, problem.labels, problem.prototypes, **options)

        assert torch.autograd.gradcheck(loss, (m2, m3), fast_mode=True)


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize("given", ["m2", "m3", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"beyond_pi": "linear", "m1": 1.2}], ids=str)
def test_against_the_reference(reduction, inputs_too, given, dtype, options, any_backend):
    options = dict(options)
    m1 = options.pop("m1", 1.0)
    problem = random_problem(
        33, 131, 37, ignored=4, sampled=80, features=30, dtype=dtype, reduction=reduction,
        scale=16.0, closeness=0.5, **options,
    )  # fmt: skip
    margins = {"m1": m1}
    if given != "m3":
        margins["m2"] = uniform(33, 0.1, 2.0)
    if given != "m2":
        margins["m3"] = uniform(33, 0.0, 0.5)
    got = margins_of(problem, inputs_too=inputs_too, **margins)
    for a, b in zip(got, right(problem, **margins), strict=True):
        assert a.dtype == torch.float32
        assert (a[problem.labels < 0] == 0).all()
        assert row_errors(a, b).max() < 1e-5


def test_each_dtype_of_margins_gets_its_own(any_backend):
    problem = random_problem(9, 17, 8)
    for dtype, allowed in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float64, 1e-5)):
        margins = {"m2": uniform(9, 0.1, 0.5, dtype)}
        (got,) = margins_of(problem, **margins)
        assert got.dtype == dtype
        assert row_errors(got, right(problem, **margins)[0]).max() < allowed


def corner(target_cosine: Tensor, scale: float, **options) -> Problem:
    """Samples of which each has the given cosine with the prototype of its class, and 0 with the
    other one's, or a zero row where it is NaN."""
    x = torch.stack([target_cosine, (1 - target_cosine**2).clamp(min=0).sqrt()], dim=1)
    x = torch.cat([x, torch.zeros(len(x), 1)], dim=1).nan_to_num(0.0)
    w = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.zeros(len(x), dtype=torch.int64)
    return Problem(x, labels, w, {"scale": scale, "reduction": "sum", **options})


@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
def test_corners(beyond_pi, capability):
    # Converged (a loss of 1e-9 and less), at both ends, just beside them, and a zero row.
    cosine = torch.tensor([0.98, 0.9, 1.0, -1.0, 1 - 1e-7, -1 + 1e-7, 0.0, math.nan])
    problem = corner(cosine, 24.0, beyond_pi=beyond_pi)
    margins = {"m2": torch.full((8,), 0.1), "m3": torch.full((8,), 0.05)}
    for a, b in zip(margins_of(problem, **margins), right(problem, **margins), strict=True):
        assert b.isfinite().all()
        assert (b != 0).any()
        # Near 1 and -1 the cosine of float32 inputs is a cosine of float64, but nothing more.
        assert row_errors(a, b).max() < 1e-5


def test_margins_at_which_psi_is_flat():
    """Past pi at any angle, psi does not depend on m2 any more."""
    problem = corner(torch.tensor([0.5, -0.5]), 8.0, beyond_pi="linear")
    margins = {"m2": torch.tensor([3.5, 4.0]), "m3": torch.zeros(2)}
    to_m2, to_m3 = margins_of(problem, **margins)
    assert torch.equal(to_m2, torch.zeros(2))
    assert row_errors(to_m3, right(problem, **margins)[1]).max() < 1e-6


def test_margins_at_which_the_angle_is_negative():
    # At angles of 0.1, 0.3 and 0.5, of which only the last is beyond 0.4.
    problem = corner(torch.tensor([0.1, 0.3, 0.5]).cos(), 2.0, beyond_pi="linear")
    margins = {"m2": torch.full((3,), -0.4), "m3": torch.zeros(3)}
    for a, b in zip(margins_of(problem, **margins), right(problem, **margins), strict=True):
        assert row_errors(a, b).max() < 1e-5
    to_m2, to_m3 = margins_of(problem, **margins)
    assert to_m2[:2].tolist() == [0.0, 0.0]
    assert to_m2[2] > 0
    assert (to_m3 > 0).all()


def test_what_ignored_samples_hold_reaches_nobody(any_backend):
    problem = random_problem(9, 17, 8, reduction="none")
    clean = margins_of(problem, m2=uniform(9, 0.1, 0.5), m3=uniform(9, 0.0, 0.3))
    problem.labels[3] = -100
    problem.embeddings[3] = math.nan
    problem.upstream[3] = math.inf
    m2, m3 = uniform(9, 0.1, 0.5), uniform(9, 0.0, 0.3)
    m2[3] = m3[3] = math.nan
    for got, before in zip(margins_of(problem, m2=m2, m3=m3), clean, strict=True):
        before[3] = 0.0
        assert torch.equal(got, before)


def test_a_label_that_is_no_class_has_no_part_on_cuda(emulated):
    problem = random_problem(9, 17, 8)
    margins = {"m2": uniform(9, 0.1, 0.5), "m3": uniform(9, 0.0, 0.3)}
    problem.labels[3] = -100
    without = margins_of(problem, **margins)
    problem.labels[3] = 17
    for got, right in zip(margins_of(problem, **margins), without, strict=True):
        assert torch.equal(got, right)


def test_without_another_class_and_without_samples():
    alone = random_problem(5, 1, 8)
    assert torch.equal(margins_of(alone, m2=torch.full((5,), 0.3))[0], torch.zeros(5))
    empty = random_problem(0, 9, 8)
    assert margins_of(empty, m2=torch.zeros(0))[0].shape == (0,)
    ignored = random_problem(5, 9, 8, ignored=5)
    assert torch.equal(margins_of(ignored, m3=torch.full((5,), 0.3))[0], torch.zeros(5))


def test_margins_made_of_embeddings(any_backend):
    """As MagFace's: the embeddings get both parts of their gradient."""
    problem = random_problem(9, 17, 8, scale=16.0)

    def gradient(implementation, problem):
        x = problem.embeddings.clone().requires_grad_()
        margin = ArcFace(0.1 * torch.linalg.vector_norm(x, dim=1))
        options = problem.options | {"margin": margin, "margin_grad": "exact"}
        implementation(x, problem.labels, problem.prototypes, **options).backward()
        return x.grad

    wanted = gradient(reference.partial_margin_softmax, problem.to(torch.float64))
    assert row_errors(gradient(partial_margin_softmax, problem), wanted).max() < 1e-5


def test_a_learned_margin_of_each_class_or_of_all():
    problem = random_problem(9, 17, 8)
    each = margins_of(problem, m3=torch.full((9,), 0.2))[0]
    for learned, spread, summed in (
        (torch.full((17,), 0.2), lambda m: m[problem.labels], each.new_zeros(17).index_add(
            0, problem.labels, each)),
        (torch.tensor(0.2), lambda m: m.expand(9), each.sum()),
    ):  # fmt: skip
        learned.requires_grad_()
        options = problem.options | {"margin": CombinedMargin(1.0, 0.1, spread(learned))}
        partial_margin_softmax(
            problem.embeddings, problem.labels, problem.prototypes, **options
        ).backward()
        torch.testing.assert_close(learned.grad, summed)


def test_scaled_and_accumulated():
    problem = random_problem(9, 17, 8)
    m2 = torch.full((9,), 0.3, requires_grad=True)

    def loss():
        return partial_margin_softmax(
            problem.embeddings,
            problem.labels,
            problem.prototypes,
            **problem.options | {"margin": ArcFace(m2)},
        )

    loss().backward()
    once = m2.grad.clone()
    (loss() * 1024).backward()
    assert torch.equal(m2.grad, once + once * 1024)
    kept = loss()
    first = torch.autograd.grad(kept, m2, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kept, m2)[0])
    assert torch.equal(first, once)
    with torch.no_grad():
        assert not loss().requires_grad


def test_nothing_changes_for_the_others(any_backend):
    """Loss, metrics and the other gradients have the bits that they have with constant margins."""
    problem = random_problem(33, 131, 37, sampled=80, reduction="none")
    results = []
    for wanted in (False, True):
        m2 = uniform(33, 0.1, 0.5).requires_grad_(wanted)
        x, w = (t.clone().requires_grad_() for t in (problem.embeddings, problem.prototypes))
        loss, metrics = partial_margin_softmax(
            x, problem.labels, w, **problem.options | {"margin": ArcFace(m2)}, return_metrics=True
        )
        assert not any(m.requires_grad for m in metrics)
        loss.backward(problem.upstream)
        results.append((loss.detach(), *metrics, x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["m2", "m3"])
def test_the_gradient_of_a_gradient_is_refused(name):
    problem = random_problem(9, 17, 8)
    m = torch.full((9,), 0.3, requires_grad=True)
    options = problem.options | {"margin": CombinedMargin(**{name: m})}
    loss = partial_margin_softmax(problem.embeddings, problem.labels, problem.prototypes, **options)
    (grad,) = torch.autograd.grad(loss, m, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        (loss + grad.square().sum()).backward()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    torch._dynamo.reset()
    problem = random_problem(8, 50, 16, sampled=20, reduction=reduction, beyond_pi="linear")
    margins = {"m2": uniform(8, 0.1, 2.0), "m3": uniform(8, 0.0, 0.3)}
    compiled = torch.compile(partial_margin_softmax, fullgraph=True, backend="aot_eager")
    for inputs_too in (True, False):
        eager = margins_of(problem, inputs_too=inputs_too, **margins)
        got = margins_of(problem, compiled, inputs_too=inputs_too, **margins)
        for a, b in zip(got, eager, strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_updated_in_backward():
    gradients = []
    for inside in (False, True):
        module = make()
        optimizer = RowAdamW([module.weight], lr=0.1)
        if inside:
            optimizer.update_in_backward(module)
        x, labels = batch(0)
        m2 = torch.full((len(labels),), 0.3, requires_grad=True)
        module(x, labels, margin=ArcFace(m2)).backward()
        assert (module.weight.grad is None) == inside
        gradients.append(m2.grad)
    assert gradients[0].all()
    assert torch.equal(*gradients)


def test_a_margin_that_the_module_keeps():
    module = PartialMarginSoftmax(8, 17)
    module.weight.requires_grad_(False)
    m3 = torch.full((4,), 0.2, requires_grad=True)
    module.margin = CosFace(m3)
    x, labels = torch.randn(4, 8), torch.arange(4)
    module.eval()(x, labels).backward()
    module_gradient, m3.grad = m3.grad, None
    partial_margin_softmax(x, labels, module.weight, margin=CosFace(m3), scale=64.0).backward()
    assert torch.equal(module_gradient, m3.grad)
    assert m3.grad.all()


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (
            lambda m: CombinedMargin(m1=m),
            TypeError,
            "m1 must be a finite number > 0, got Parameter",
        ),
        (
            lambda m: ArcFace(m),
            ValueError,
            "m2 must be a finite number or a floating point tensor [B] or [B, P], got a tensor of "
            "shape []",
        ),
        (
            lambda m: PartialMarginSoftmax(8, 9, scale=m),
            TypeError,
            "scale must be a number, got a torch.float32 tensor",
        ),
    ],
)
def test_what_has_no_gradient_takes_no_tensor(make_it, error, message):
    with pytest.raises(error) as caught:
        make_it(torch.nn.Parameter(torch.tensor(1.2)))
    assert str(caught.value).startswith(message)
