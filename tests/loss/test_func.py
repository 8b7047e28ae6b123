"""The loss under the transforms of `torch.func`, and in forward mode."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.problems import random_problem
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.optim import RowSGD

X, LABELS = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), torch.arange(5)


def make(**options):
    return PartialMarginSoftmax(8, 20, sample_rate=0.5, feature_rate=0.75, scale=16.0, **options)


def plain(module, step):
    """Loss and gradients of embeddings and prototypes, dense."""
    x = X.clone().requires_grad_()
    loss = module(x, LABELS, step=step)
    to_x, to_weight = torch.autograd.grad(loss, (x, module.weight))
    return loss.detach(), to_x, to_weight.to_dense()


def weights_of(module):
    return {"weight": module.weight.detach()}


each_mode = pytest.mark.parametrize("training", [True, False])
each_layout = pytest.mark.parametrize("sparse_grad", [True, False])


@each_mode
@each_layout
def test_the_gradients_are_those_of_backward(training, sparse_grad, any_backend):
    module = make(sparse_grad=sparse_grad).train(training)
    loss, to_x, to_weight = plain(module, 3)

    def call(weights, x):
        return functional_call(module, weights, (x, LABELS, 3))

    weights = weights_of(module)
    by_weight, by_x = grad(call, argnums=(0, 1))(weights, X)
    assert torch.equal(by_weight["weight"], to_weight)
    assert torch.equal(by_x, to_x)
    by_weight, value = grad_and_value(call)(weights, X)
    assert torch.equal(by_weight["weight"], to_weight)
    assert torch.equal(value, loss)
    value, pull = vjp(call, weights, X)
    assert torch.equal(value, loss)
    by_weight, by_x = pull(torch.tensor(2.0))
    assert torch.equal(by_weight["weight"], 2 * to_weight)
    assert torch.equal(by_x, 2 * to_x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_layout
@pytest.mark.parametrize("positives", [None, 3])
def test_jacrev_and_vmap(sparse_grad, positives, any_backend):
    problem = random_problem(
        5, 20, 8, positives=positives, reduction="none", sparse_grad=sparse_grad
    )

    def call(x, w):
        return partial_margin_softmax(x, problem.labels, w, **problem.options)

    x, w = problem.embeddings, problem.prototypes
    by_x, by_w = jacrev(call, argnums=(0, 1))(x, w)
    for i in range(5):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        to_x, to_w = torch.autograd.grad(call(*leaves)[i], leaves)
        assert torch.equal(by_x[i], to_x)
        assert torch.equal(by_w[i], to_w.to_dense())
    many = torch.stack([x, 2 * x.flip(0)])
    losses = vmap(call, in_dims=(0, None))(many, w)
    gradients = vmap(grad(lambda x: call(x, w).sum()))(many)
    for one, loss, gradient in zip(many, losses, gradients, strict=True):
        assert torch.equal(loss, call(one, w))
        assert torch.equal(gradient, grad(lambda x: call(x, w).sum())(one))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_margins_under_transforms():
    problem = random_problem(5, 20, 8, reduction="none")

    def call(m2):
        options = problem.options | {"margin": ArcFace(m2)}
        return partial_margin_softmax(
            problem.embeddings, problem.labels, problem.prototypes, **options
        )

    m2 = torch.full((5,), 0.3, requires_grad=True)
    (right,) = torch.autograd.grad(call(m2).sum(), m2)
    assert right.all()
    assert torch.equal(grad(lambda m: call(m).sum())(m2.detach()), right)
    assert torch.equal(jacrev(call)(m2.detach()), right.diag())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_step_advances_once_for_each_call():
    module = make()
    weights = weights_of(module)

    def call(weights, x):
        return functional_call(module, weights, (x, LABELS))

    for step in range(3):
        right = plain(module, step)[1]
        assert torch.equal(grad(call, argnums=1)(weights, X), right)
        assert int(module.step) == step + 1
    functional_call(module, weights, (X, LABELS))
    assert int(module.step) == 4
    vmap(grad(lambda x: call(weights, x)))(torch.stack([X, X]))
    assert int(module.step) == 5
    grad(call)(weights, X)
    module.eval()
    grad(call)(weights, X)
    assert int(module.step) == 6


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_that_is_given_advances_in_place_of_the_modules(captured):
    module = make()
    buffers = {"step": torch.tensor(7)}
    right = plain(module, 7)[1]
    if captured:
        got = grad(lambda x: functional_call(module, (weights_of(module), buffers), (x, LABELS)))(X)
    else:
        got = grad(
            lambda x, b: functional_call(module, (weights_of(module), b), (x, LABELS))
        )(X, buffers)  # fmt: skip
    assert torch.equal(got, right)
    assert int(buffers["step"]) == 8
    assert int(module.step) == 0


def test_what_the_module_keeps_is_plain():
    module = make()
    module(X, LABELS, step=0)
    metrics, selection = module.last_metrics, module.last_selection
    grad(lambda w: functional_call(module, w, (X, LABELS, 0)))(weights_of(module))
    for kept, right in (*zip(module.last_metrics, metrics, strict=True),
                        *zip(module.last_selection, selection, strict=True)):  # fmt: skip
        assert torch.equal(kept, right)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    pickle.loads(pickle.dumps(module))


def test_metrics_beside_the_loss():
    problem = random_problem(5, 20, 8)

    def call(x):
        return partial_margin_softmax(
            x, problem.labels, problem.prototypes, **problem.options, return_metrics=True
        )

    right = call(problem.embeddings)[1]
    _, metrics = grad(call, has_aux=True)(problem.embeddings)
    for got, one in zip(metrics, right, strict=True):
        assert torch.equal(got, one)


def test_transforms_update_no_prototypes():
    module = make(sparse_grad=True)
    optimizer = RowSGD([module.weight], lr=0.1)
    optimizer.update_in_backward(module)
    before = module.weight.detach().clone()
    weights = dict(module.named_parameters())
    by_weight = grad(lambda w: functional_call(module, w, (X, LABELS, 0)))(weights)["weight"]
    assert torch.equal(by_weight, plain(make(sparse_grad=True), 0)[2])
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None


def test_second_derivatives_are_refused():
    module = make()

    def penalty(x):
        return grad(lambda x: module(x, LABELS, 0))(x).square().sum()

    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        grad(penalty)(X)


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_is_refused(trained):
    module = make()
    module.weight.requires_grad_(trained)

    def call(x):
        return module(x, LABELS, 0)

    message = (
        "the partial margin softmax has no derivative in forward mode (torch.func.jvp, jacfwd, "
        "hessian, torch.autograd.forward_ad): use reverse mode, such as torch.func.grad"
    )
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError) as caught:
            call(forward_ad.make_dual(X, X))
        assert str(caught.value) == message
        assert torch.equal(call(X), module(X, LABELS, 0))  # without a tangent nothing is lost
    for transformed in (lambda: jvp(call, (X,), (X,)), lambda: hessian(call)(X)):
        with pytest.raises(RuntimeError) as caught:
            transformed()
        assert str(caught.value) == message
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        jacfwd(call)(X)


def test_bad_input_is_refused_as_ever():
    module = make()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 20\) or ignore_index"):
        grad(lambda x: module(x, LABELS + 16))(X)
    assert int(module.step) == 0
