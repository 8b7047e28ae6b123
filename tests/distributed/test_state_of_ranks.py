"""State dicts of prototypes that ranks share: nobody takes another rank's for its own."""

from __future__ import annotations

import copy
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.sharded_run import Run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from unicom_ext import PartialMarginSoftmax, checkpoint
from unicom_ext.distributed import shard
from unicom_ext.distributed.failures import RankFailed
from unicom_ext.optim import RowAdamW

OPTIMIZERS = ["RowAdamW", "RowAdamW of bf16 moments", "RowSGD", "RowSGD, exact"]
ANOTHERS = (
    "{} holds the classes [0, {}) of another rank, but this rank owns [{}, {}): each rank must "
    "load what it has saved itself. Save with unicom_ext.checkpoint or "
    "torch.distributed.checkpoint, or let the loss have full_state_dict=True"
)


def trained(group, optimizer, classes, steps=3, **options):
    run = Run(group, wrap="ddp", optimizer=optimizer, classes=classes, **options)
    return run, run.train(steps)


def state_of(run):
    return {
        "encoder": run.encoder.state_dict(),
        "loss": run.loss.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }


def load_into(run, state):
    run.encoder.load_state_dict(state["encoder"])
    run.loss.load_state_dict(state["loss"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step = 3
    return run


# ---- a file of each rank, or of the first one ----------------------------------------------------


def own_files(group, folder, optimizer, classes):
    run, _ = trained(group, optimizer, classes)
    torch.save(state_of(run), folder / f"{run.rank}.pt")
    right = run.train(3)
    fresh = Run(group, optimizer=optimizer, classes=classes)
    load_into(fresh, torch.load(folder / f"{run.rank}.pt", weights_only=True))
    return fresh.train(3), right


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("classes", [60, 61])
def test_each_rank_loads_what_it_has_saved(ranks, tmp_path, optimizer, classes):
    for losses, right in ranks.run(2, own_files, tmp_path, optimizer, classes):
        assert losses == right


def file_of_the_first(group, path, classes):
    run, _ = trained(group, "RowAdamW", classes)
    state = state_of(run)
    if run.rank == 0:
        torch.save(state, path)
    torch.distributed.barrier(group)
    before = copy.deepcopy(run.loss.weight), copy.deepcopy(run.optimizer.state[run.loss.weight])
    state, messages = torch.load(path, weights_only=True), []
    for module in (run.loss, run.optimizer):
        try:
            module.load_state_dict(state["loss" if module is run.loss else "optimizer"])
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    now = run.loss.weight, run.optimizer.state[run.loss.weight]
    same = torch.equal(now[0], before[0]) and str(now[1]) == str(before[1])
    return messages, same, run.loss.shard.start, run.loss.shard.stop


@pytest.mark.parametrize("classes", [60, 61])
def test_no_rank_takes_the_file_of_another(ranks, tmp_path, classes):
    first, second = ranks.run(2, file_of_the_first, tmp_path / "state.pt", classes)
    assert first[0] == []
    (of_loss, of_optimizer), same, start, stop = second
    assert ANOTHERS.format("weight", start, start, stop) in of_loss
    assert of_optimizer == ANOTHERS.format("exp_avg in the state dict", start, start, stop)
    assert same


def file_of_more_ranks(group, path):
    loss = PartialMarginSoftmax(4, 60, process_group=group)
    with pytest.raises(RuntimeError, match=r"holds the classes \[0, 30\) of another rank"):
        loss.load_state_dict(torch.load(path, weights_only=True)["loss"])


def test_files_at_another_number_of_ranks(ranks, tmp_path):
    ranks.run(2, file_of_the_first, tmp_path / "state.pt", 60)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loss = PartialMarginSoftmax(8, 60, sparse_grad=True)
    message = (
        "weight is a DTensor of one rank, and this loss has no process_group: load it with "
        "unicom_ext.checkpoint or torch.distributed.checkpoint, or save it from a loss with "
        "full_state_dict=True"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        loss.load_state_dict(state["loss"])
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = RowAdamW([*encoder.parameters(), *loss.parameters()])
    with pytest.raises(ValueError, match="exp_avg in the state dict is a DTensor of one"):
        optimizer.load_state_dict(state["optimizer"])
    ranks.run(3, other_ranks, tmp_path / "state.pt")


def other_ranks(group, path):
    run = Run(group, optimizer="RowAdamW", classes=60)
    state, messages = torch.load(path, weights_only=True), []
    for module in ("loss", "optimizer"):
        try:
            getattr(run, module).load_state_dict(state[module])
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    start, stop = run.loss.shard.start, run.loss.shard.stop
    assert ANOTHERS.format("weight", 30, start, stop) in messages[0]
    assert messages[1] == ANOTHERS.format("exp_avg in the state dict", 30, start, stop)


def local(state):
    """Of a state dict of an optimizer, plain tensors of the rows of one rank."""
    state = copy.deepcopy(state)
    for of_param in state["state"].values():
        for name, value in of_param.items():
            of_param[name] = value.to_local() if hasattr(value, "placements") else value
    return state


def plain_rows(group, path, theirs):
    run, _ = trained(group, theirs, 60)
    state = local(run.optimizer.state_dict())
    if run.rank == 0:
        torch.save(state, path)
    torch.distributed.barrier(group)
    run, _ = trained(group, "RowAdamW", 60)
    before = str(run.optimizer.state_dict())
    start, stop = run.loss.shard.start, run.loss.shard.stop
    one_process = local(trained(None, "RowAdamW", stop - start)[0].optimizer.state_dict())
    for saved in (torch.load(path, weights_only=True), state, one_process):
        with pytest.raises(ValueError, match="exp_avg in the state dict") as raised:
            run.optimizer.load_state_dict(saved)
        assert str(raised.value) == (
            "exp_avg in the state dict must be of all 60 classes, a DTensor or a plain tensor, of "
            f"which this rank takes its own; got a plain tensor [{stop - start}, 8], and nothing "
            f"says of which classes. If they are [{start}, {stop}), say so by "
            "loss.shard.as_global(tensor)"
        )
        assert str(run.optimizer.state_dict()) == before


@pytest.mark.parametrize("theirs", ["AdamW", "RowAdamW"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_rows_of_some_classes_are_refused(ranks, tmp_path, world_size, theirs):
    ranks.run(world_size, plain_rows, tmp_path / "state.pt", theirs)


def plain_rows_of_all(group):
    run, _ = trained(group, "RowAdamW", 60)
    run.optimizer.load_state_dict(local(run.optimizer.state_dict()))


def test_of_a_single_rank_plain_rows_are_of_all_classes(ranks):
    ranks.run(1, plain_rows_of_all)


def marked_rows(group):
    """A rank that knows its own plain rows, as earlier versions have saved them, says so."""
    run, _ = trained(group, "RowAdamW", 61)
    state, wanted = local(run.optimizer.state_dict()), str(run.optimizer.state_dict())
    for of_param in state["state"].values():
        for name, value in of_param.items():
            if "row_step" in of_param and value.dim():
                of_param[name] = run.loss.shard.as_global(value)
    run.optimizer.load_state_dict(state)
    assert str(run.optimizer.state_dict()) == wanted
    of_param = state["state"][4]
    of_param["exp_avg"] = run.loss.shard.as_global(torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"exp_avg in the state dict holds the classes"):
        run.optimizer.load_state_dict(state)


def test_rows_that_are_said_to_be_this_ranks(ranks):
    ranks.run(2, marked_rows)


# ---- state of all classes ------------------------------------------------------------------------


def full_state(group, optimizer, classes):
    run, _ = trained(group, optimizer, classes, full_state_dict=True)
    state = copy.deepcopy(state_of(run))
    assert not any(
        hasattr(v, "placements") for s in state["optimizer"]["state"].values() for v in s.values()
    )
    return state, run.train(3)


def from_full_state(group, optimizer, classes, state):
    run = load_into(Run(group, optimizer=optimizer, classes=classes), copy.deepcopy(state))
    return run.train(3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("classes", [60, 61])
def test_full_state_at_any_number_of_ranks(ranks, optimizer, classes):
    (state, right), (same, _) = ranks.run(2, full_state, optimizer, classes)
    assert str(state) == str(same)
    assert state["loss"]["weight"].shape == (classes, 8)
    # bf16 moments are rounded by a hash of the row, which is another one in another shard.
    error = 1e-2 if "bf16" in optimizer else 1e-5
    assert ranks.run(2, from_full_state, optimizer, classes, state)[1] == right
    assert ranks.run(3, from_full_state, optimizer, classes, state)[2] == pytest.approx(
        right, rel=error
    )
    state["encoder"] = {k.removeprefix("module."): v for k, v in state["encoder"].items()}
    assert from_full_state(None, optimizer, classes, state) == pytest.approx(right, rel=error)


def test_full_state_of_one_process_loads_into_shards(ranks):
    run, _ = trained(None, "RowAdamW", 61)
    state = copy.deepcopy(state_of(run))
    state["encoder"] = {f"module.{k}": v for k, v in state["encoder"].items()}
    right = run.train(3)
    for losses in ranks.run(3, from_full_state, "RowAdamW", 61, state):
        assert losses == pytest.approx(right, rel=1e-5)


def called_by_one(group):
    run, _ = trained(group, "RowAdamW", 60, full_state_dict=True)
    if run.rank == 1:
        return
    before, shard.PATIENCE = shard.PATIENCE, timedelta(seconds=0.2)
    try:
        for module, what in ((run.loss, "a loss"), (run.optimizer, "an optimizer of a loss")):
            with pytest.raises(RankFailed) as raised:
                module.state_dict()
            assert str(raised.value) == (
                f"state_dict of {what} with full_state_dict=True sends between ranks, so every "
                "rank must call it at the same time: rank 1 did not within 0.2 s"
            )
    finally:
        shard.PATIENCE = before


def called_by_all(group):
    run, _ = trained(group, "RowAdamW", 60, full_state_dict=True)
    return [run.loss.state_dict()["weight"].shape for _ in range(3)]


@pytest.mark.slow
def test_full_state_that_one_rank_alone_wants(ranks):
    ranks.run(2, called_by_one)
    assert ranks.run(2, called_by_all) == [[(60, 8)] * 3] * 2


def differing(group):
    rank = torch.distributed.get_rank(group)
    PartialMarginSoftmax(4, 10, process_group=group, full_state_dict=rank == 0)


def test_ranks_that_differ_in_it(ranks):
    message = "full_state_dict must be the same on every rank, got True on rank 0, False on rank 1"
    for error in ranks.outcomes(2, differing):
        assert isinstance(error, ValueError)
        assert str(error) == message


def checkpoint_of_full(group, path):
    run, _ = trained(group, "RowAdamW", 61, full_state_dict=True)
    checkpoint.save(path, **run.parts(), process_group=group)
    assert run.loss.full_state_dict
    right = run.train(3)
    fresh = Run(group, optimizer="RowAdamW", classes=61, full_state_dict=True)
    checkpoint.load(path, **fresh.parts(), process_group=group)
    fresh.step = 3
    return fresh.train(3), right


def test_a_checkpoint_does_not_gather(ranks, tmp_path):
    for losses, right in ranks.run(2, checkpoint_of_full, tmp_path / "c"):
        assert losses == right
    assert checkpoint.read_about(tmp_path / "c")["classes"]["modules.loss.weight"] == {
        "num_classes": 61,
        "num_centers": 1,
        "embedding_size": 8,
        "seed": 5,
    }


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.encoder, self.loss = run.encoder, run.loss


def by_torch(group, path, optimizer, options, saving):
    if saving:
        run, _ = trained(group, optimizer, 61)
    else:
        run = Run(group, optimizer=optimizer, classes=61)
    options, model = StateDictOptions(**options), Model(run)
    states = get_state_dict(model, run.optimizer, options=options)
    state = dict(zip(("model", "optimizer"), states, strict=True))
    group_of = {"process_group": group} if group is not None else {"no_dist": True}
    if saving:
        dcp.save(state, checkpoint_id=path, **group_of)
    else:
        dcp.load(state, checkpoint_id=path, **group_of)
        set_state_dict(
            model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        run.step = 3
    return run.train(3)


@pytest.mark.parametrize("flat", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torchs_checkpoint_reshards_rows(ranks, tmp_path, optimizer, flat):
    options = {"flatten_optimizer_state_dict": flat}
    right = ranks.run(2, by_torch, tmp_path / "c", optimizer, options, True)
    same = ranks.run(2, by_torch, tmp_path / "c", optimizer, options, False)
    assert same == right
    error = 1e-2 if "bf16" in optimizer else 1e-5
    for world_size in (3, 1):
        for losses in ranks.run(world_size, by_torch, tmp_path / "c", optimizer, options, False):
            assert losses == pytest.approx(right[0], rel=error)


def in_memory(group, optimizer, options):
    run, _ = trained(group, optimizer, 61)
    options = StateDictOptions(**options)
    state = copy.deepcopy(get_state_dict(Model(run), run.optimizer, options=options))
    right = run.train(3)
    fresh = Run(group, optimizer=optimizer, classes=61)
    set_state_dict(
        Model(fresh),
        fresh.optimizer,
        model_state_dict=state[0],
        optim_state_dict=state[1],
        options=options,
    )
    fresh.step = 3
    return fresh.train(3), right


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cpu_offload": True},
        {"full_state_dict": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["RowAdamW", "RowSGD, exact"])
def test_torchs_state_dicts_of_shards(ranks, optimizer, options):
    for losses, right in ranks.run(2, in_memory, optimizer, options):
        assert losses == right
