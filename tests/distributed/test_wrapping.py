"""DDP and FSDP around the loss are refused on every rank; a loss they were told to leave is not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

from unicom_ext import PartialMarginSoftmax
from unicom_ext.optim import RowAdamW, RowSGD

DIM, EVEN, UNEVEN = 8, 300, 301  # two ranks own 151 and 150 of 301


class Model(nn.Module):
    def __init__(self, group, classes=EVEN, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIM, DIM)
        self.loss = PartialMarginSoftmax(DIM, classes, process_group=group, **options)

    def forward(self, x, y):
        return self.loss(self.encoder(x), y)


def leave_out(model, names):
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [f"loss.{name}" for name in names]
    )


def ddp(module, group, **options):
    return DistributedDataParallel(module, process_group=group, **options)


def fsdp1(module, group, **options):
    return FullyShardedDataParallel(module, group, device_id=torch.device("cpu"), **options)


def fsdp2(module, group, **options):
    return fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"), **options)


WRAPPERS = {
    "DDP": ddp,
    "DDP without buffers": lambda m, g: ddp(m, g, forward_sync_buffers=False, init_sync=False),
    "FSDP1": fsdp1,
    "FSDP1 of original parameters": lambda m, g: fsdp1(m, g, use_orig_params=True),
    "FSDP1 of each part": lambda m, g: fsdp1(
        m, g, auto_wrap_policy=lambda module, recurse, **_: recurse or not list(module.children())
    ),
    "FSDP2": fsdp2,
    "FSDP2 of a list": lambda m, g: fully_shard(
        list(m.children()) or [m], mesh=DeviceMesh.from_group(g, "cpu")
    ),
}


def wrapped(group, wrapper):
    messages = []
    for module in (
        PartialMarginSoftmax(DIM, UNEVEN, process_group=group),
        Model(group, UNEVEN),
        Model(group, EVEN),
        Model(None),
        nn.Sequential(nn.Sequential(Model(group, UNEVEN))),
    ):
        with pytest.raises(TypeError) as caught:
            WRAPPERS[wrapper](module, group)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_loss_in_a_wrapper_is_refused(ranks, wrapper):
    for messages in ranks.run(2, wrapped, wrapper):
        for message in messages:
            assert "must not be wrapped in DistributedDataParallel" in message
            assert "process_group" in message


def losses(model, group, steps=3, optimizer=torch.optim.SGD):
    """Losses of a training in which each rank has its part of a batch."""
    rows = slice(dist.get_rank(group), None, dist.get_world_size(group))
    optimizer = optimizer(model.parameters(), lr=0.1)
    x = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(steps):
        loss = model(x[rows], torch.arange(8)[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def left_out(group):
    """Losses with the encoder alone wrapped, then with models that leave their loss out."""
    results = {}
    alone = Model(group, UNEVEN)
    alone.encoder = ddp(alone.encoder, group)
    results["encoder alone"] = losses(alone, group)
    for kind in ("parameters", "state", "everything"):
        model = Model(group, UNEVEN)
        names = {
            "parameters": ["weight"],
            "state": model.loss.state_dict(),
            "everything": [*dict(model.loss.named_parameters()), *dict(model.loss.named_buffers())],
        }[kind]
        leave_out(model, names)
        results[f"DDP, {kind}"] = losses(ddp(model, group), group)
    model = Model(group, UNEVEN)
    fsdp2(model, group, ignored_params=set(model.loss.parameters()))
    results["FSDP2"] = losses(model, group)
    for kind in ("ignored_modules", "ignored_states"):
        for original in (False, True):
            model = Model(group, UNEVEN)
            ignored = [model.loss] if kind == "ignored_modules" else list(model.loss.parameters())
            model = fsdp1(model, group, use_orig_params=original, **{kind: ignored})
            results[f"FSDP1, {kind}, {original}"] = losses(model, group)
    return results


def test_a_loss_that_is_left_out_trains(ranks):
    for results in ranks.run(2, left_out):
        right = results["encoder alone"]
        assert right[2] < right[1] < right[0]
        for name, found in results.items():
            assert found == pytest.approx(right, rel=1e-6), name


def one_optimizer_for_both(group):
    """Losses with FSDP2's DTensors and dense gradients of prototypes in one group of parameters."""
    results = []
    for theirs, ours in ((torch.optim.SGD, RowSGD), (torch.optim.AdamW, RowAdamW)):
        for optimizer in (theirs, ours):
            model = Model(group, UNEVEN)
            fsdp2(model, group, ignored_params=set(model.loss.parameters()))
            results.append(losses(model, group, optimizer=optimizer))
    return results


def test_row_optimizers_take_a_sharded_encoder_with_dense_prototypes(ranks):
    for sgd, ours, adamw, our_adamw in ranks.run(2, one_optimizer_for_both):
        assert ours == pytest.approx(sgd, rel=1e-5)
        assert our_adamw == pytest.approx(adamw, rel=1e-5)
        assert adamw != pytest.approx(sgd, rel=1e-2)


def steps_inside_forward(group):
    """As Lightning does: DDP's forward calls a method that trains, on a module that owns it all."""

    class Lit(Model):
        def training_step(self, x, y):
            return super().forward(x, y)

        def forward(self, *arguments):
            return self.training_step(*arguments)

    model = Lit(group, UNEVEN)
    model._ddp_params_and_buffers_to_ignore = ["loss.weight", "loss.step"]
    wrapped = ddp(model, group, find_unused_parameters=True)
    alone = Model(group, UNEVEN)
    alone.encoder = ddp(alone.encoder, group)
    return losses(wrapped, group), losses(alone, group)


def test_a_module_that_holds_all_with_the_loss_ignored(ranks):
    for found, right in ranks.run(2, steps_inside_forward):
        assert found == pytest.approx(right, rel=1e-6)


def test_other_wrappers_of_torch_do_not_mind():
    model = nn.DataParallel(Model(None))
    assert model.module.loss is not None
    torch.compile(Model(None))
    torch.optim.swa_utils.AveragedModel(Model(None))


# ---- functions in the place of the weight --------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def weight_norm(loss):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(loss)


REPLACED = {
    "weight_norm": weight_norm,
    "parametrized weight_norm": lambda loss: nn.utils.parametrizations.weight_norm(loss),
    "parametrize": lambda loss: parametrize.register_parametrization(loss, "weight", Halved()),
    "prune": lambda loss: prune.l1_unstructured(loss, "weight", amount=0.25),
}


def replaced(group, how, **options):
    """Losses of some steps, and what saving says."""
    model = Model(group, UNEVEN, sample_rate=0.2, **options)
    REPLACED[how](model.loss)
    x, y = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    if group is not None:
        rows = slice(dist.get_rank(group), None, 2)
        x, y = x[rows], y[rows]
    optimizer = torch.optim.SGD(model.loss.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    message = ""
    try:
        model.state_dict()
    except RuntimeError as error:
        message = str(error)
    return found, message


@pytest.mark.parametrize("how", REPLACED)
def test_a_function_in_the_place_of_the_weight(ranks, how):
    right, message = replaced(None, how)
    assert right != pytest.approx([right[0]] * 3, rel=1e-3)
    assert message == ""
    assert replaced(None, how, sparse_grad=True)[0] == right
    for found, message in ranks.run(2, replaced, how):
        if how != "prune":  # which chooses among a rank's own
            assert found == pytest.approx(right, rel=1e-5)
        assert message.startswith("loss.weight of a loss with process_group must be a parameter")
        assert "weight_norm, parametrize or prune" in message


@pytest.mark.parametrize("how", REPLACED)
def test_pruned_or_normed_in_one_process_it_is_saved_and_loaded(how):
    first, second = Model(None, EVEN, seed=1), Model(None, EVEN, seed=2)
    for model in (first, second):
        REPLACED[how](model.loss)
    second.load_state_dict(first.state_dict())
    x, y = torch.randn(8, DIM), torch.arange(8)
    assert torch.equal(first(x, y), second(x, y))


def test_row_optimizers_say_that_there_is_no_weight():
    loss = PartialMarginSoftmax(DIM, EVEN, sparse_grad=True)
    weight_norm(loss)
    optimizer = RowSGD(loss.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="weight of the loss must be among the optimizer's"):
        optimizer.update_in_backward(loss)


# ---- copies --------------------------------------------------------------------------------------


def copied(group):
    loss = PartialMarginSoftmax(DIM, UNEVEN, process_group=group)
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(loss)
    assert copy.deepcopy(loss).shard is loss.shard


def test_a_shard_is_copied_but_not_pickled(ranks):
    ranks.run(2, copied)
