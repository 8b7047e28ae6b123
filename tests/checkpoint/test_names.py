"""A model has the same names in a checkpoint whatever is wrapped around its parts."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from support.training import assert_same_bits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from unicom_ext import PartialMarginSoftmax, checkpoint
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.optim import RowAdamW


def compiled(module):
    return torch.compile(module, backend="eager")


def both(module):
    return checkpoint_wrapper(compiled(module))


WRAPPERS = {
    "plain": lambda module: module,
    "compiled": compiled,
    "activations": checkpoint_wrapper,
    "both": both,
    "parallel": nn.DataParallel,  # whose inner module is called `module`, as DDP's
    "compiled parallel": lambda module: compiled(nn.DataParallel(compiled(module))),
}


class Model(nn.Module):
    """With a part in the middle of names, one at their end, and the loss, each in a wrapper."""

    def __init__(self, wrap):
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 8), wrap(nn.BatchNorm1d(8)))
        self.encoder = wrap(nn.Sequential(wrap(block), nn.Linear(8, 8)))
        self.loss = wrap(PartialMarginSoftmax(8, 20, seed=0))


def made(wrap, whole="plain", seed=0):
    """Parts for `save` and `load`: trained for a step if there is a seed, else of zeros."""
    torch.manual_seed(seed or 0)
    inner = Model(WRAPPERS[wrap])
    model = WRAPPERS[whole](inner)
    groups = [{"params": inner.encoder.parameters()}, {"params": inner.loss.parameters()}]
    optimizer = RowAdamW(groups, lr=0.1)
    if seed is not None:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    else:
        for param in model.parameters():
            param.data.zero_()
    return {"modules": {"model": model}, "optimizers": {"main": optimizer}}


def values(parts):
    """All of it, in the order of the model."""
    (model,), (optimizer,) = parts["modules"].values(), parts["optimizers"].values()
    state = [optimizer.state[p][k] for p in model.parameters() for k in sorted(optimizer.state[p])]
    return dict(enumerate([*model.parameters(), *model.buffers(), *state]))


def check_loads(path, parts, here):
    checkpoint.load(path, **here)
    assert_same_bits(values(here), values(parts))


@pytest.mark.parametrize("saved", WRAPPERS)
def test_what_is_wrapped_loads_into_any_other(tmp_path, saved):
    parts = made(saved, seed=1)
    checkpoint.save(tmp_path / "c", **parts)
    for wrap in WRAPPERS:
        check_loads(tmp_path / "c", parts, made(wrap, seed=None))


def test_the_whole_model_may_be_wrapped_too(tmp_path):
    wholes = ("plain", "compiled", "activations")
    for whole in wholes:
        checkpoint.save(tmp_path / whole, **made("compiled", whole, seed=1))
    for there, here in product(wholes, wholes):
        check_loads(tmp_path / there, made("plain", seed=1), made("both", here, seed=None))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_plain_model(tmp_path, wrap):
    checkpoint.save(tmp_path / "plain", **made("plain"))
    checkpoint.save(tmp_path / "c", **made(wrap))
    about = [checkpoint.read_about(tmp_path / name) for name in ("plain", "c")]
    assert about[0] == about[1]
    merged = []
    for name in ("plain", "c"):
        checkpoint.merge(tmp_path / name, tmp_path / f"{name}.pt")
        merged.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    assert_same_bits(*merged)
    weight = "modules.model.encoder.0.0.weight"
    assert {weight, f"optimizers.main.{weight}.exp_avg", "modules.model.loss.weight"} <= {
        *merged[1]
    }


class Named(nn.Module):
    """`module` is a name like any other where it is not a wrapper's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.module = nn.Linear(2, 2)


def test_a_part_that_is_called_module_is_left_alone(tmp_path):
    torch.manual_seed(0)
    one, other = Named(), nn.DataParallel(Named())
    checkpoint.save(tmp_path / "c", modules={"m": one})
    checkpoint.merge(tmp_path / "c", tmp_path / "c.pt")
    assert {*torch.load(tmp_path / "c.pt")} - {"about"} == {
        "modules.m.weight", "modules.m.module.weight", "modules.m.module.bias"
    }  # fmt: skip
    checkpoint.load(tmp_path / "c", modules={"m": other})
    assert_same_bits(other.module.state_dict(), one.state_dict())


# ---- as older versions wrote it ----


def renamed(source, target, rename):
    """A checkpoint with other names of tensors, in its plain values too."""
    file = target.with_suffix(".pt")
    checkpoint.merge(source, file)
    state = {rename(key): value for key, value in torch.load(file, weights_only=True).items()}
    about = json.loads(bytes(state["about"].tolist()))
    about["classes"] = {rename(key): value for key, value in about["classes"].items()}
    for optimizer in about["optimizers"].values():
        optimizer["values"] = {rename(key): v for key, v in optimizer["values"].items()}
        for group in optimizer["groups"]:
            group["params"] = [rename(name) for name in group["params"]]
    state["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    torch.save(state, file)
    checkpoint.split(file, target)


OLD = {
    "encoder.0": ["encoder._orig_mod.0", "encoder.module.0", "encoder._orig_mod.module.0",
                  "encoder._fsdp_wrapped_module._checkpoint_wrapped_module.0"],
    "loss": ["loss._orig_mod"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "old"), [(name, old) for name in OLD for old in OLD[name]])
def test_what_older_versions_saved_with_wrappers_names_still_loads(tmp_path, name, old):
    parts = made("plain", seed=1)
    checkpoint.save(tmp_path / "new", **parts)
    renamed(tmp_path / "new", tmp_path / "old", lambda key: key.replace(f".{name}", f".{old}"))
    for wrap in ("plain", "both", "parallel"):
        check_loads(tmp_path / "old", parts, made(wrap, seed=None))
    # Merged and split it has lost what can only be a wrapper's, and still loads.
    checkpoint.merge(tmp_path / "old", tmp_path / "merged.pt")
    assert not [
        key for key in torch.load(tmp_path / "merged.pt") if "_orig_mod" in key or "_wrapped" in key
    ]
    checkpoint.split(tmp_path / "merged.pt", tmp_path / "again")
    check_loads(tmp_path / "again", parts, made("compiled", seed=None))


def test_classes_of_an_older_version_go_through_a_class_map(tmp_path):
    parts = made("plain", seed=1)
    checkpoint.save(tmp_path / "new", **parts)
    renamed(tmp_path / "new", tmp_path / "old", lambda key: key.replace(".loss", ".loss._orig_mod"))
    checkpoint.merge(tmp_path / "old", tmp_path / "merged.pt")
    checkpoint.split(tmp_path / "merged.pt", tmp_path / "again")
    for path in ("new", "old", "again"):
        here = made("plain", seed=None)
        class_map = torch.arange(20)
        class_map[4] = -1
        checkpoint.load(tmp_path / path, **here, class_map=class_map)
        right = parts["modules"]["model"].loss.weight.detach().clone()
        right[4] = 0
        assert torch.equal(here["modules"]["model"].loss.weight, right)


# ---- what cannot be told apart ----


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self._orig_mod = nn.Linear(2, 2)


def test_two_tensors_of_one_name_are_not_saved(tmp_path):
    message = (
        r"^modules\.m\.weight: is what modules\.m\._orig_mod\.weight and modules\.m\.weight are "
        r"called without the names of wrappers; which of them is meant\?$"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "c", modules={"m": Twice()})
    assert not list(tmp_path.iterdir())
    parts = {"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a.b": nn.Linear(2, 2)}
    with pytest.raises(CheckpointError, match=r"^modules\.a\.b\.weight: is what"):
        checkpoint.save(tmp_path / "c", modules=parts)


def test_two_tensors_there_of_one_name_here(tmp_path):
    parts = {"m": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})}
    checkpoint.save(tmp_path / "new", modules=parts)
    renamed(tmp_path / "new", tmp_path / "old", lambda key: key.replace(".b.", ".a._orig_mod."))
    here = {"m": nn.ModuleDict({"a": nn.Linear(2, 2)})}
    before = here["m"].a.weight.detach().clone()
    message = (
        r"^modules\.m\.a\.\w+: is what modules\.m\.a\._orig_mod\.\w+ and modules\.m\.a\.\w+ are"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "old", modules=here)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.merge(tmp_path / "old", tmp_path / "merged.pt")
    assert torch.equal(here["m"].a.weight, before)


def test_one_tensor_there_is_not_read_for_two_here(tmp_path):
    checkpoint.save(tmp_path / "c", modules={"m": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    here = Named()
    here.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(CheckpointError, match=r"has no modules\.m\.module\.weight$"):
        checkpoint.load(tmp_path / "c", modules={"m": here})
    assert torch.equal(here.weight, torch.ones(2, 2))


# ---- DistributedDataParallel itself ----


def saved_in_ddp(group, path):
    torch.manual_seed(1)
    model = nn.ModuleDict({"encoder": compiled(nn.Linear(3, 4)), "head": nn.Linear(4, 2)})
    model["encoder"] = compiled(DistributedDataParallel(model["encoder"], process_group=group))
    checkpoint.save(path, modules={"m": model}, process_group=group)


def test_a_part_in_ddp(ranks, tmp_path):
    ranks.run(2, saved_in_ddp, tmp_path / "c")
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    checkpoint.load(tmp_path / "c", modules={"m": model})
    torch.manual_seed(1)
    assert torch.equal(model["encoder"].weight, nn.Linear(3, 4).weight)


def statistics_in_ddp(group, path):
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(4)))
    wrapped = DistributedDataParallel(model, process_group=group)
    wrapped(torch.randn(8, 3) + group.rank())
    checkpoint.save(path, modules={"m": wrapped}, process_group=group)
    return [layer.running_mean for layer in model]


def test_running_statistics_are_those_of_the_first_rank(ranks, tmp_path):
    first, second = ranks.run(2, statistics_in_ddp, tmp_path / "c")
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(4)))
    checkpoint.load(tmp_path / "c", modules={"m": model})
    for layer, mean, other in zip(model, first, second, strict=True):
        assert torch.equal(layer.running_mean, mean)
        assert not torch.equal(mean, other)
