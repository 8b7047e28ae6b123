"""A run that `torch.distributed.checkpoint` has saved and resumed is the run that went on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.updates import OPTIMIZERS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from unicom_ext import PartialMarginSoftmax
from unicom_ext.optim import RowAdamW

KINDS = {
    **OPTIMIZERS,
    "adamw-bf16-row": lambda p: RowAdamW(
        p, lr=0.1, moment_dtype=torch.bfloat16, row_second_moment=True
    ),
    "adamw-tensor-lr": lambda p: RowAdamW(p, lr=torch.tensor(0.1)),
}
OPTIONS = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}


class Training:
    """An encoder, a loss and an optimizer of both in two groups, from another start for each seed.

    The encoder has a parameter that is frozen and a matrix.
    """

    def __init__(self, kind, seed):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
        encoder[1].bias.requires_grad_(False)
        loss = PartialMarginSoftmax(8, 40, sample_rate=0.2, scale=16.0, sparse_grad=True, seed=seed)
        self.model = nn.ModuleDict({"encoder": encoder, "loss": loss})
        self.optimizer = KINDS[kind](
            [{"params": encoder.parameters(), "lr": 0.01}, {"params": loss.parameters()}]
        )

    def run(self, steps):
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(12, 6, generator=generator)
            labels = torch.randint(40, (12,), generator=generator)
            self.optimizer.zero_grad()
            loss = self.model["loss"](self.model["encoder"](inputs), labels)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def get(self, options):
        return get_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))

    def set(self, state, options):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state[0],
            optim_state_dict=state[1],
            options=StateDictOptions(**options),
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_as_the_whole_one(kind, options):
    whole = Training(kind, 0)
    whole.run(range(4))
    state = copy.deepcopy(whole.get(options))
    right = whole.run(range(4, 9))
    for steps_before in (0, 2):
        resumed = Training(kind, 1)
        resumed.run(range(100, 100 + steps_before))
        resumed.set(copy.deepcopy(state), options)
        assert resumed.run(range(4, 9)) == right


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["adamw", "adamw-row", "sgd-exact"])
def test_a_state_from_before_the_first_step(kind, options):
    whole, resumed = Training(kind, 0), Training(kind, 1)
    state = copy.deepcopy(whole.get(options))
    resumed.set(state, options)
    assert resumed.run(range(5)) == whole.run(range(5))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_through_files(kind, flat, tmp_path):
    options = {"flatten_optimizer_state_dict": flat}
    whole, resumed = Training(kind, 0), Training(kind, 1)
    whole.run(range(4))
    model, optimizer = whole.get(options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "c", no_dist=True)
    model, optimizer = resumed.get(options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    resumed.set((state["model"], state["optimizer"]), options)
    assert resumed.run(range(4, 9)) == whole.run(range(4, 9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [1, 5])
def test_read_in_place_into_an_optimizer_that_was_used(kind, used, tmp_path):
    """`dcp.load` of the objects themselves: what is no tensor in their state it would not find."""
    whole = Training(kind, seed=0)
    whole.run(range(4))
    parts = {"model": whole.model, "optimizer": whole.optimizer}
    dcp.save(parts, checkpoint_id=tmp_path / "c", no_dist=True)
    resumed = Training(kind, seed=0)
    resumed.run(range(20, 20 + used))
    parts = {"model": resumed.model, "optimizer": resumed.optimizer}
    dcp.load(parts, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(isinstance(param, torch.Tensor) for param in resumed.optimizer.state)
    assert resumed.run(range(4, 9)) == whole.run(range(4, 9))


def test_embeddings_whose_state_was_asked_for():
    def make(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"e": nn.Embedding(9, 4, sparse=True), "h": nn.Linear(4, 3)})
        optimizer = RowAdamW(model.parameters(), lr=0.1)
        optimizer.init_row_state([model["e"].weight])
        return model, optimizer

    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model["h"](model["e"](torch.tensor([step % 9, 2]))).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    whole, resumed = make(0), make(1)
    run(*whole, range(3))
    model, optimizer = copy.deepcopy(get_state_dict(*whole, options=options))
    fresh = get_optimizer_state_dict(*resumed, options=options)
    assert fresh.keys() == optimizer.keys()
    set_state_dict(*resumed, model_state_dict=model, optim_state_dict=optimizer, options=options)
    for p, q in zip(run(*whole, range(3, 7)), run(*resumed, range(3, 7)), strict=True):
        assert torch.equal(p, q)
