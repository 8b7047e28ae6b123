"""A warning where prototypes have gradients and never move: they are in no optimizer."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from unicom_ext import PartialMarginSoftmax
from unicom_ext.optim import RowAdamW, RowSGD

C, D, B = 40, 8, 4
WARNED = (
    "the prototypes (the weight of the loss) had a gradient at 50 steps of an optimizer and have "
    "not changed: they seem to be in no optimizer. Add them to one, as in "
    "torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1). Prototypes that shall "
    "stay as they are need no gradient: loss.requires_grad_(False)"
)


def train(loss, calls=60, optimizer=None, every=1, between=lambda: None):
    generator = torch.Generator().manual_seed(0)
    encoder = nn.Linear(3, D)
    own = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for call in range(1, calls + 1):
        images = torch.randn(B, 3, generator=generator)
        labels = torch.randint(C, (B,), generator=generator)
        loss(encoder(images), labels).backward()
        own.step()
        own.zero_grad()
        if optimizer is not None and call % every == 0:
            optimizer.step()
            optimizer.zero_grad()
        between()


@pytest.mark.parametrize(
    "options", [{}, {"sample_rate": 0.3, "sparse_grad": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_prototypes_in_no_optimizer(options):
    loss = PartialMarginSoftmax(D, C, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss, 50)
    with pytest.warns(UserWarning, match="in no optimizer") as caught:
        train(loss, 60)
    assert [str(w.message) for w in caught] == [WARNED]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss, 60)  # it was said


def through_pickle(loss):
    return pickle.loads(pickle.dumps(loss))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_in_no_optimizer_of_a_loss_in_one(copied):
    loss = PartialMarginSoftmax(D, C)
    train(loss, 60, torch.optim.SGD(loss.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(copied(loss), 60)


def test_a_second_optimizer_that_has_left_them_out():
    loss = PartialMarginSoftmax(D, C)
    train(loss, 70, torch.optim.SGD(loss.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(loss, 60)


@pytest.mark.parametrize("make", [RowAdamW, RowSGD, torch.optim.AdamW])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.filterwarnings("error")
def test_a_learning_rate_of_zero(make, sparse_grad):
    loss = PartialMarginSoftmax(D, C, sparse_grad=sparse_grad and make != torch.optim.AdamW)
    train(loss, 60, make(loss.parameters(), lr=0.0))


@pytest.mark.filterwarnings("error")
def test_a_learning_rate_of_zero_where_torch_counts_no_change():
    loss = PartialMarginSoftmax(D, C)
    train(loss, 60, torch.optim.AdamW(loss.parameters(), lr=0.0, fused=True))


def test_the_warning_is_there_after_a_state_dict_was_loaded():
    loss = PartialMarginSoftmax(D, C)
    train(loss, 30)
    loss.load_state_dict(PartialMarginSoftmax(D, C, seed=1).state_dict())
    with pytest.warns(UserWarning, match="at 50 steps of an optimizer and have not"):
        train(loss, 52)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: torch.optim.SGD(loss.parameters(), lr=0.1),
        lambda loss: torch.optim.AdamW(loss.parameters(), foreach=True),
        lambda loss: RowAdamW(loss.parameters()),
        lambda loss: RowSGD(loss.parameters(), lr=0.1),
    ],
)
def test_prototypes_in_an_optimizer(make):
    loss = PartialMarginSoftmax(D, C, sample_rate=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss, optimizer=make(loss))
        train(loss, optimizer=make(loss), every=20)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_prototypes_in_no_optimizer_whose_gradients_are_cleared(set_to_none):
    """As by `model.zero_grad()` of the model that the loss is a part of."""
    loss = PartialMarginSoftmax(D, C)
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(loss, between=lambda: loss.zero_grad(set_to_none))


def test_parameters_of_which_the_prototypes_are_a_function():
    loss = torch.nn.utils.parametrizations.weight_norm(PartialMarginSoftmax(D, C))
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(loss)


@pytest.mark.slow
def test_prototypes_in_no_optimizer_of_a_compiled_model():
    loss = PartialMarginSoftmax(D, C, sample_rate=0.3)
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(torch.compile(loss, backend="aot_eager"))


def test_gradients_that_are_accumulated_for_long():
    loss, encoder = PartialMarginSoftmax(D, C), nn.Linear(3, D)
    optimizer = torch.optim.SGD([*encoder.parameters(), *loss.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in range(1, 401):
            loss(encoder(torch.ones(B, 3)), torch.arange(B)).backward()
            if call % 100 == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_a_gradient_of_before_is_no_new_one():
    """Where training goes on without the loss, and its last gradient is still there."""
    loss, other = PartialMarginSoftmax(D, C), nn.Linear(3, 3)
    train(loss, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            other(torch.ones(3)).sum().backward()
            optimizer.step()


def test_an_optimizer_that_torch_cannot_see():
    class ByData:
        def step(self):
            loss.weight.data.sub_(0.1 * loss.weight.grad)

        def zero_grad(self):
            loss.weight.grad.zero_()

    loss = PartialMarginSoftmax(D, C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss, 120, optimizer=ByData())


def test_prototypes_that_are_not_trained_or_only_looked_at():
    loss = PartialMarginSoftmax(D, C).requires_grad_(False)
    evaluated = PartialMarginSoftmax(D, C).eval()
    queried = PartialMarginSoftmax(D, C)
    x = torch.randn(B, D, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss)
        train(evaluated)
        for _ in range(60):
            torch.autograd.grad(queried(x, torch.arange(B)), x)
