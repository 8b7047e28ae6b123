"""Optimizers of torch in checkpoints: what is resumed goes on as if nothing had been."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unicom_ext import PartialMarginSoftmax, checkpoint
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.optim import RowAdamW, RowSGD

OPTIMIZERS = {
    "Adadelta": {"lr": 0.5},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {"lr": 0.1},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}


def parts(make, seed=0, num_classes=20):
    torch.manual_seed(seed)
    modules = {
        "encoder": nn.Linear(6, 6),
        "loss": PartialMarginSoftmax(6, num_classes, sample_rate=0.5, seed=3),
    }
    params = [p for module in modules.values() for p in module.parameters()]
    return {"modules": modules, "optimizers": {"main": make(params)}}


def steps(parts, number=3):
    encoder, loss = parts["modules"]["encoder"], parts["modules"]["loss"]
    optimizer = parts["optimizers"]["main"]
    images = torch.linspace(-1, 1, 24).reshape(4, 6).sin()
    for _ in range(number):
        optimizer.zero_grad()
        loss(encoder(images), torch.arange(4)).backward()
        optimizer.step()


def values(parts):
    return [p.detach() for module in parts["modules"].values() for p in module.parameters()]


def check_goes_on(path, make):
    whole = parts(make)
    steps(whole)
    checkpoint.save(path, **whole)
    steps(whole)
    resumed = parts(make, seed=1)
    checkpoint.load(path, **resumed)
    steps(resumed)
    for a, b in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(tmp_path, name):
    def make(params):
        return getattr(torch.optim, name)(params, **OPTIMIZERS[name])

    check_goes_on(tmp_path / "c", make)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_fused_passes_over_transposed_prototypes(tmp_path, name):
    """As of a kernel [d, C]. They take no notice of strides, so state must be laid out alike."""

    def make(params):
        weight = params[-1]
        weight.data = weight.data.T.contiguous().T
        return getattr(torch.optim, name)(params, **OPTIMIZERS[name], fused=True)

    check_goes_on(tmp_path / "c", make)


def test_what_has_no_row_for_each_class_stays_whole_when_classes_change(tmp_path):
    """Adafactor's sums over all rows, beside those over columns, which follow their classes."""
    before = parts(torch.optim.Adafactor)
    steps(before)
    checkpoint.save(tmp_path / "c", **before)
    after = parts(torch.optim.Adafactor, seed=1, num_classes=3)
    class_map = torch.tensor([7, -1, 2])
    checkpoint.load(tmp_path / "c", **after, class_map=class_map)
    old, new = (p["optimizers"]["main"].state[p["modules"]["loss"].weight] for p in (before, after))
    assert torch.equal(new["col_var"], old["col_var"])
    assert torch.equal(
        new["row_var"], torch.stack([old["row_var"][7], torch.zeros(1), old["row_var"][2]])
    )


def test_an_optimizer_with_lists_in_its_state_is_refused(tmp_path):
    here = parts(torch.optim.LBFGS)
    modules, optimizer = here["modules"], here["optimizers"]["main"]

    def closure():
        optimizer.zero_grad()
        loss = modules["loss"](modules["encoder"](torch.eye(6)[:4]), torch.arange(4), step=0)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(CheckpointError, match=r"^\w+ in the state of optimizers\['main'\] must be"):
        checkpoint.save(tmp_path / "c", **here)
    assert not (tmp_path / "c").exists()


def test_an_option_that_json_cannot_hold_is_refused(tmp_path):
    here = parts(torch.optim.SGD)
    here["optimizers"]["main"].param_groups[0]["schedule"] = abs
    with pytest.raises(CheckpointError, match=r"^the option schedule of optimizers\['main'\] must"):
        checkpoint.save(tmp_path / "c", **here)
    assert not (tmp_path / "c").exists()


def test_extra_values_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"^extra must be what JSON can hold: .* Tensor "):
        checkpoint.save(tmp_path / "c", **parts(torch.optim.SGD), extra={"loss": torch.ones(())})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (RowAdamW, torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
@pytest.mark.parametrize("back", [False, True])
def test_dense_gradients_go_on_between_ours_and_torchs(tmp_path, ours, theirs, options, back):
    kinds = [lambda params, kind=kind: kind(params, **options) for kind in (ours, theirs)]
    first, second = kinds[::-1] if back else kinds
    whole = parts(first)
    steps(whole)
    checkpoint.save(tmp_path / "c", **whole)
    other = parts(second, seed=1)
    defaults = copy.deepcopy(other["optimizers"]["main"].param_groups[0])
    checkpoint.load(tmp_path / "c", **other)
    assert defaults.keys() <= other["optimizers"]["main"].param_groups[0].keys()
    steps(whole)
    steps(other)
    for a, b in zip(values(other), values(whole), strict=True):
        torch.testing.assert_close(a, b)
