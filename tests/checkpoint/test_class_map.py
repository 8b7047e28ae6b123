"""Classes put in another order, merged and split, against the same in one process by loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sharded_run import CLASSES, Run, whole

from unicom_ext import checkpoint

OPTIMIZERS = ["RowAdamW", "RowAdamW of bf16 moments", "RowSGD", "RowSGD, exact", "AdamW"]


def save(group, path, optimizer):
    run = Run(group, optimizer=optimizer)
    run.train(4)
    checkpoint.save(path, **run.parts())


def load(group, path, optimizer, class_map):
    """The initial prototypes, the loaded ones, and their state; and that training goes on."""
    run = Run(group, optimizer=optimizer, classes=len(class_map))
    fresh = whole(run.loss.state_dict()["weight"])
    checkpoint.load(path, **run.parts(), class_map=class_map)
    state = {}
    for key, value in run.optimizer.state[run.loss.weight].items():
        if isinstance(value, torch.Tensor) and value.dim() and key != "history":
            value = whole(value if run.loss.shard is None else run.loss.shard.as_global(value))
        state[key] = value
    found = fresh, whole(run.loss.state_dict()["weight"]), state
    run.train(2)
    return found


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for optimizer in OPTIMIZERS:
        ranks.run(3, save, folder / optimizer, optimizer)
    return folder


def expected(path, optimizer, class_map, fresh):
    run = Run(None, optimizer=optimizer)
    checkpoint.load(path, **run.parts())
    weight, state = run.loss.weight, run.optimizer.state[run.loss.weight]
    lagging = weight.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in state.items()}
    if hasattr(run.optimizer, "catch_up"):
        run.optimizer.catch_up()
    caught = weight.detach().clone(), {k: torch.as_tensor(v) for k, v in state.items()}
    right = fresh.clone()
    now = {"log_decay": "total_log_decay", "last_step": "step"}
    by_row = [k for k, v in lagging[1].items() if v.dim() and k != "history"]
    states = {
        k: torch.zeros(len(class_map), *lagging[1][k].shape[1:], dtype=lagging[1][k].dtype)
        for k in by_row
    }
    for row, old in enumerate(class_map.tolist()):
        old = [i for i in (old if isinstance(old, list) else [old]) if i >= 0]
        for k in by_row:
            if len(old) == 1:
                continue
            if k in now:
                states[k][row] = caught[1][now[k]].to(states[k])
            elif old and states[k].is_floating_point():
                states[k][row] = caught[1][k][old].double().mean(0).to(states[k])
            elif old:
                states[k][row] = caught[1][k][old].max()
        if len(old) > 1:
            rows = caught[0][old].double()
            mean = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
            right[row] = (mean / mean.norm() * rows.norm(dim=1).mean()).float()
    return right, states, lagging, by_row


@st.composite
def class_maps(draw):
    count, width = draw(st.integers(1, 60)), draw(st.sampled_from([0, 1, 2, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    some = draw(st.sampled_from([4, CLASSES]))  # few: the same old classes for many new ones
    if width == 0:
        return torch.randint(-1, some, (count,), generator=generator)
    rows = [torch.randperm(some, generator=generator)[:width] for _ in range(count)]
    hidden = torch.rand(count, width, generator=generator) < 0.4
    return torch.stack(rows).masked_fill(hidden, -1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_class_map(ranks, saved, optimizer):
    path = saved / optimizer

    @settings(max_examples=5, database=None)
    @given(class_maps(), st.sampled_from([None, 1, 2, 4]))
    def check(class_map, world_size):
        arguments = path, optimizer, class_map
        results = (
            ranks.run(world_size, load, *arguments) if world_size else [load(None, *arguments)]
        )
        for fresh, weight, state in results:
            right, states, lagging, by_row = expected(path, optimizer, class_map, fresh)
            assert torch.allclose(*both(class_map, weight, right, lagging[0]), rtol=1e-5, atol=1e-7)
            for key in by_row:
                got, wanted = both(class_map, state[key], states[key], lagging[1][key])
                rtol = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
                assert torch.allclose(got.double(), wanted.double(), rtol=rtol, atol=1e-7), key

    check()


def both(class_map, got, right, lagging):
    """Rows of one old class are compared with it, bit for bit, also where it is merged elsewhere:
    they lag as it did."""
    old = class_map.view(len(class_map), -1)
    for row in ((old >= 0).sum(1) == 1).nonzero().flatten().tolist():
        source = old[row].max()
        assert torch.equal(got[row], lagging[source])
        right[row] = lagging[source]
    return got, right


C = CLASSES
BAD = [
    ([0] * C, "class_map must be an int64 tensor, got list"),
    (torch.arange(C).int(), "class_map must be an int64 tensor, got torch.int32"),
    (torch.zeros(C, 0, dtype=torch.int64),
     "class_map must have one entry for each of the 301 classes of the loss, or one row of "
     "entries, got the shape [301, 0]"),
    (torch.arange(5),
     "class_map must have one entry for each of the 301 classes of the loss, or one row of "
     "entries, got the shape [5]"),
    (torch.arange(C) + 1,
     "class_map must hold classes of the checkpoint in [0, 301), or -1 for none, got 301 for "
     "class 300"),
    (torch.arange(C) - 2,
     "class_map must hold classes of the checkpoint in [0, 301), or -1 for none, got -2 for "
     "class 0"),
    (torch.tensor([[3, -1, 3]] * C),
     "class_map must name a class of the checkpoint once for a class here, got 3 twice for "
     "class 0"),
]  # fmt: skip


@pytest.mark.parametrize(("class_map", "message"), BAD, ids=range(len(BAD)))
def test_bad_class_maps_are_refused_and_change_nothing(tmp_path, class_map, message):
    run = Run(None)
    checkpoint.save(tmp_path / "c", **run.parts())
    run.train(1)
    before = run.tensors()
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        checkpoint.load(tmp_path / "c", **run.parts(), class_map=class_map)
    assert str(raised.value) == message
    assert all(torch.equal(a, b) for a, b in zip(before, run.tensors(), strict=True))


def test_a_class_map_needs_classes(tmp_path):
    modules = {"m": torch.nn.Linear(2, 2)}
    checkpoint.save(tmp_path / "c", modules=modules)
    with pytest.raises(ValueError, match=r"^class_map needs a PartialMarginSoftmax among the mod"):
        checkpoint.load(tmp_path / "c", modules=modules, class_map=torch.arange(2))


def load_different(group, path):
    run = Run(group)
    class_map = torch.arange(CLASSES).roll(run.rank)
    with pytest.raises(ValueError, match=r"^class_map must be the same on every rank, got "):
        checkpoint.load(path, **run.parts(), class_map=class_map)


def test_ranks_with_different_class_maps_all_raise(ranks, tmp_path):
    checkpoint.save(tmp_path / "c", **Run(None).parts())
    ranks.run(2, load_different, tmp_path / "c")
