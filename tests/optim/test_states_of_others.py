"""States that row optimizers cannot go on from, and optimizers that earlier versions pickled."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
from support.updates import OPTIMIZERS, batch, make
from torch import nn

from unicom_ext import checkpoint
from unicom_ext.optim import RowAdamW, RowSGD
from unicom_ext.utils.files import CheckpointError


def trained(optimizer, steps=2, sparse=False):
    """On one parameter [5, 3], and a second that has no gradient."""
    for step in range(steps):
        param = optimizer.param_groups[0]["params"][0]
        dense = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        param.grad = dense.to_sparse(1) if sparse else dense
        optimizer.step()
    return optimizer


def parameters():
    return [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(2))]


# ---- of another kind of optimizer ----------------------------------------------------------------

OTHERS = {
    "SGD": (lambda p: torch.optim.SGD(p, momentum=0.9), RowAdamW, "momentum_buffer"),
    "Adagrad": (torch.optim.Adagrad, RowAdamW, "step, sum"),
    "Adamax": (torch.optim.Adamax, RowAdamW, "exp_avg, exp_inf, step"),
    "NAdam": (torch.optim.NAdam, RowAdamW, "exp_avg, exp_avg_sq, mu_product, step"),
    "RowSGD": (lambda p: RowSGD(p, momentum=0.9), RowAdamW, "momentum_buffer"),
    "AdamW": (torch.optim.AdamW, RowSGD, "exp_avg, exp_avg_sq, step"),
    "RowAdamW": (RowAdamW, RowSGD, "exp_avg, exp_avg_sq, step"),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, momentum=0.9),
        RowSGD,
        "momentum_buffer, square_avg, step",
    ),
    "RowSGD by rows": (
        lambda p: RowSGD(p, exact=True),
        RowAdamW,
        "by_rows, history, last_step, remembered, step",
    ),
    "RowAdamW by rows": (
        RowAdamW,
        RowSGD,
        "exp_avg, exp_avg_sq, log_decay, row_step, total_log_decay",
    ),
}
TAKES = {
    RowAdamW: "step, exp_avg, exp_avg_sq, or what it has saved itself of rows, with row_step",
    RowSGD: "momentum_buffer, or what it has saved itself of rows, with by_rows",
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_another_kind_of_optimizer_is_refused(kind, sparse):
    theirs, ours, has = OTHERS[kind]
    saved = trained(theirs(parameters()), sparse="by rows" in kind).state_dict()
    optimizer = trained(ours(parameters(), lr=0.25), sparse=sparse)
    before = copy.deepcopy(optimizer.state_dict())
    message = (
        f"{ours.__name__} cannot go on from the state of another kind of optimizer: of a parameter "
        f"[5, 3] the state dict has {has}; {ours.__name__} takes {TAKES[ours]}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


NAMESAKES = {
    "RAdam": (torch.optim.RAdam, RowAdamW, "amsgrad or moment_dtype or row_second_moment"),
    "Muon": (lambda p: torch.optim.Muon(p[:1]), RowSGD, "dampening or exact"),
}


@pytest.mark.parametrize("kind", NAMESAKES)
def test_state_of_the_same_names_is_known_by_its_options(kind):
    theirs, ours, origins = NAMESAKES[kind]
    saved = trained(theirs(parameters())).state_dict()
    optimizer = ours(parameters()[: len(saved["param_groups"][0]["params"])], lr=0.25)
    before = copy.deepcopy(optimizer.state_dict())
    message = rf"^{ours.__name__} cannot go on from .* options .* betas.*|.*momentum.*, without "
    with pytest.raises(ValueError, match=message + origins):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


CHECKPOINTS = {
    "other names": (torch.optim.Adagrad, RowAdamW, "RowAdamW cannot go on from .*sum; "),
    "other options": (torch.optim.RAdam, RowAdamW, "RowAdamW cannot go on from .* options"),
    "decay": (
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        RowAdamW,
        "RowAdamW cannot honour weight_decay=0.1 of a state dict with decoupled",
    ),
    "dampening": (
        lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1),
        RowSGD,
        "RowSGD cannot honour dampening=0.1",
    ),
    "range": (lambda p: torch.optim.SGD(p, momentum=1.5), RowSGD, "momentum must be .*, got 1.5"),
}


@pytest.mark.parametrize(
    ("kind", "steps"),
    # Before the first step there is no state of another kind, but there are options.
    [*((kind, 1) for kind in CHECKPOINTS), ("decay", 0), ("dampening", 0), ("range", 0)],
)
def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path, kind, steps):
    theirs, ours, message = CHECKPOINTS[kind]

    def parts(make, steps):
        module = nn.Linear(3, 5)
        optimizer = make(module.parameters())
        for _ in range(steps):
            module(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        return {"modules": {"m": module}, "optimizers": {"o": optimizer}}

    checkpoint.save(tmp_path / "c", **parts(theirs, steps))
    here = parts(ours, 1)
    module, optimizer = here["modules"]["m"], here["optimizers"]["o"]
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=rf"c: optimizer 'o': {message}"):
        checkpoint.load(tmp_path / "c", **here)
    assert str((module.state_dict(), optimizer.state_dict())) == str(before)


def test_decay_that_is_added_to_the_gradient_is_refused():
    saved = torch.optim.Adam(parameters(), weight_decay=0.1).state_dict()
    message = (
        "RowAdamW cannot honour weight_decay=0.1 of a state dict with decoupled_weight_decay=False"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}, such as torch.optim.Adam's"):
        RowAdamW(parameters()).load_state_dict(saved)
    RowAdamW(parameters()).load_state_dict(trained(torch.optim.Adam(parameters())).state_dict())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch.optim.AdamW, RowAdamW),
        (lambda p: torch.optim.SGD(p, momentum=0.9), RowSGD),
        (torch.optim.SGD, RowSGD),
        (RowAdamW, RowAdamW),
        (RowSGD, RowSGD),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_parameter_may_have_no_state_yet(theirs, ours, steps):
    dense = trained(theirs(parameters()), steps)
    optimizer = ours(parameters())
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.param_groups[0]["params"][1] not in optimizer.state
    trained(optimizer)


def test_a_moment_without_dimensions_is_refused():
    saved = trained(torch.optim.AdamW(parameters())).state_dict()
    saved["state"][0]["exp_avg"] = torch.tensor(0.0)
    message = "exp_avg in the state dict must be [5, 3] for a parameter [5, 3], got []"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RowAdamW(parameters()).load_state_dict(saved)


def test_parameters_without_dimensions():
    def train(optimizer):
        for _ in range(2):
            optimizer.param_groups[0]["params"][0].grad = torch.tensor(2.0)
            optimizer.step()

    ours, theirs = (
        kind([nn.Parameter(torch.tensor(1.0))]) for kind in (RowAdamW, torch.optim.AdamW)
    )
    train(theirs)
    train(ours)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(ours)
    train(theirs)
    assert ours.param_groups[0]["params"] == theirs.param_groups[0]["params"]


# ---- pickled whole, before an option existed -----------------------------------------------------

LATER = [
    (kind, option.name)
    for kind in (RowAdamW, RowSGD)
    for option in inspect.signature(kind).parameters.values()
    if option.kind == option.KEYWORD_ONLY or option.name == "nesterov"
]


@pytest.mark.parametrize(("kind", "option"), LATER)
def test_an_option_that_was_not_there_is_off(kind, option):
    optimizer = kind(parameters())
    state = copy.deepcopy(optimizer.__getstate__())
    del state["defaults"][option], state["param_groups"][0][option]
    older = kind.__new__(kind)
    older.__setstate__(state)
    assert older.param_groups[0][option] is optimizer.param_groups[0][option]
    assert older.defaults[option] is optimizer.defaults[option]
    assert not older.param_groups[0][option]
    older.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    trained(older)
    trained(older, sparse=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_older_optimizer_goes_on(name):
    module = make()
    optimizer = OPTIMIZERS[name]([module.weight])
    results = []
    for step in range(3):
        module(*batch(step), step=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight, whole = copy.deepcopy((module.weight, optimizer))
    for module_weight, each in ((module.weight, optimizer), (weight, pickle.loads(older(whole)))):
        module.weight = each.param_groups[0]["params"][0]
        assert module.weight.data.equal(module_weight.data)
        for step in range(3, 6):
            module(*batch(step), step=step).backward()
            each.step()
            each.zero_grad()
        results.append(module.weight.detach())
    assert torch.equal(*results)


def older(optimizer):
    """Pickled before there were options that are off here, and when a history grew."""
    for options in (optimizer.defaults, *optimizer.param_groups):
        for name in ("maximize", "fused", "nesterov", "moment_dtype", "row_second_moment", "exact"):
            if not options.get(name, True):
                del options[name]
    for state in optimizer.state.values():
        if "history" in state:
            state["history"] = state["history"][: state.pop("remembered")].clone()
    return pickle.dumps(optimizer)
