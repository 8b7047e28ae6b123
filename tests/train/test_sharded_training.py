"""Training on several ranks: encoders in DDP and FSDP, clipping, checkpoints for other ranks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from support.sharded_run import CLASSES, DIM, INPUTS, Run, assert_close, whole
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from unicom_ext import PartialMarginSoftmax, checkpoint, gradients
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.cli.main import main


def train(group, steps, options, clip=None):
    run = Run(group, **options)
    return run.train(steps, clip), run.tensors()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "optimizer", ["AdamW", "RowAdamW", *(slow(name) for name in ("fused AdamW", "SGD", "RowSGD"))]
)
def test_ten_steps_with_a_ddp_encoder_agree(ranks, optimizer):
    run = Run(None, optimizer=optimizer)
    losses, right = run.train(10), run.tensors()
    for world_size in (1, 2, 4):
        for theirs, tensors in ranks.run(world_size, train, 10, {"optimizer": optimizer}):
            assert theirs == pytest.approx(losses, rel=1e-5)
            assert_close(tensors, right, 1e-5)


def test_ten_steps_with_an_fsdp_encoder_agree(ranks):
    run = Run(None)
    losses, right = run.train(10), run.tensors()
    for theirs, tensors in ranks.run(2, train, 10, {"wrap": "fsdp"}):
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert_close(tensors, right, 1e-5)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("sparse", [False, True])
def test_clipping_by_the_norm_of_all_gradients(ranks, wrap, sparse):
    options = {"optimizer": "SGD", "sparse_grad": sparse}
    run = Run(None, **options)
    losses, right = run.train(5, clip=0.5), run.tensors()
    unclipped = Run(None, **options).train(5)
    assert losses != pytest.approx(unclipped, rel=1e-3)
    for theirs, tensors in ranks.run(3, train, 5, {"wrap": wrap, **options}, 0.5):
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert_close(tensors, right, 1e-5)


def one_rank_overflows(group, optimizer):
    """Whether each rank skips the step when the prototypes of one rank alone have infinity."""
    run = Run(group, optimizer=optimizer)
    scaler = ShardedGradScaler(device="cpu", init_scale=4.0, process_group=group)
    params = [run.loss.weight, next(run.encoder.parameters())]
    before = [p.detach().clone() for p in params]
    outcomes = []
    for overflow in (True, False):
        run.optimizer.zero_grad()
        inputs = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(1))
        loss = run.loss(run.encoder(inputs), torch.tensor([0, 5, 200, 300]))
        scaler.scale(loss).backward()
        if overflow and run.rank == run.world_size - 1:
            stored(run.loss.weight.grad)[0, 0] = torch.inf
        scaler.unscale_(run.optimizer)
        norm = gradients.global_grad_norm(run.encoder.parameters(), run.loss)
        scaler.step(run.optimizer)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
        outcomes.append((bool(norm.isfinite()), moved, scaler.get_scale()))
    stored(run.loss.weight.grad)[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="must be finite"):
        gradients.clip_grad_norm_([], run.loss, 1.0, error_if_nonfinite=True)
    return outcomes


def stored(gradient):
    return gradient._values() if gradient.is_sparse else gradient


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "RowAdamW"])
def test_no_rank_skips_a_step_alone(ranks, world_size, optimizer):
    outcomes = ranks.run(world_size, one_rank_overflows, optimizer)
    assert outcomes == [[(False, [False, False], 2.0), (True, [True, True], 2.0)]] * world_size


# ---- checkpoints ----


def save(group, path, steps, options):
    run = Run(group, **options)
    run.train(steps)
    checkpoint.save(path, **run.parts(), extra={"step": run.step, "note": "é"})
    return run.train(3), run.tensors()


def resume(group, path, options):
    run = Run(group, **options)
    extra = checkpoint.load(path, **run.parts())
    run.step = extra["step"]
    assert extra["note"] == "é"
    return run.train(3), run.tensors()


@pytest.mark.parametrize(
    ("optimizer", "classes"),
    [
        *((name, CLASSES) for name in ("AdamW", "RowAdamW", "RowSGD, exact")),
        *(slow(name, CLASSES) for name in
          ("fused AdamW", "SGD", "Adagrad", "RowAdamW of bf16 moments", "RowSGD")),
        slow("RowAdamW", 1001),
    ],
)  # fmt: skip
def test_a_checkpoint_of_four_ranks_goes_on_at_any_number(ranks, tmp_path, optimizer, classes):
    options = {"optimizer": optimizer, "classes": classes}
    # bf16 moments are rounded by a hash of the row, which is another one in another shard.
    loss_error, error = (1e-4, 1e-3) if "bf16" in optimizer else (1e-6, 1e-5)
    right, tensors = ranks.run(4, save, tmp_path / "c", 4, options)[0]
    for world_size in (1, 2, 3, 4):
        for losses, theirs in ranks.run(world_size, resume, tmp_path / "c", options):
            assert losses == pytest.approx(right, rel=loss_error)
            assert_close(theirs, tensors, error)
    losses, theirs = resume(None, tmp_path / "c", options)  # without a process group
    assert losses == pytest.approx(right, rel=loss_error)
    assert_close(theirs, tensors, error)


def test_a_checkpoint_of_one_process_goes_on_at_four(ranks, tmp_path):
    right, tensors = save(None, tmp_path / "c", 4, {})
    for losses, theirs in ranks.run(4, resume, tmp_path / "c", {}):
        assert losses == pytest.approx(right, rel=1e-6)
        assert_close(theirs, tensors, 1e-5)


def test_a_checkpoint_with_an_fsdp_encoder(ranks, tmp_path):
    right, tensors = ranks.run(4, save, tmp_path / "c", 4, {"wrap": "fsdp"})[0]
    for losses, theirs in ranks.run(3, resume, tmp_path / "c", {"wrap": "fsdp"}):
        assert losses == pytest.approx(right, rel=1e-6)
        assert_close(theirs, tensors, 1e-5)


def test_with_fewer_classes_than_ranks(ranks, tmp_path):
    ranks.run(4, few_classes, tmp_path / "c", True)
    weights = [ranks.run(n, few_classes, tmp_path / "c", False)[0] for n in (1, 2, 3, 4)]
    assert all(torch.equal(w, weights[0]) for w in weights)


def few_classes(group, path, saving):
    loss = PartialMarginSoftmax(4, 5, process_group=group, seed=1 if saving else 2)
    optimizer = torch.optim.AdamW(loss.parameters())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss(x, torch.tensor([0, 4, 2])).backward()
    optimizer.step()
    parts = {"modules": {"loss": loss}, "optimizers": {"o": optimizer}}
    if saving:
        return checkpoint.save(path, **parts)
    checkpoint.load(path, **parts)
    assert loss.seed == 1
    return whole(loss.state_dict()["weight"])


def test_plain_distributed_checkpoints_reshard_too(ranks, tmp_path):
    ranks.run(4, plain, tmp_path / "c", True)
    right = PartialMarginSoftmax(DIM, CLASSES, seed=1).weight
    for weight in ranks.run(3, plain, tmp_path / "c", False):
        assert torch.equal(weight, right)


def plain(group, path, saving):
    loss = PartialMarginSoftmax(DIM, CLASSES, process_group=group, seed=1 if saving else 2)
    state = {"loss": loss.state_dict()}
    if saving:
        dcp.save(state, checkpoint_id=path, process_group=group)
        return None
    dcp.load(state, checkpoint_id=path, process_group=group)
    loss.load_state_dict(state["loss"])
    assert loss.seed == 1
    return whole(loss.state_dict()["weight"])


def whole_state(group, state):
    loss = PartialMarginSoftmax(DIM, CLASSES, process_group=group, seed=2)
    loss.load_state_dict(state)
    found = whole(loss.state_dict()["weight"]), loss.seed, int(loss.step)
    with pytest.raises(RuntimeError, match=r"all classes, \[301, 8\].*got \[10, 8\]"):
        loss.load_state_dict({**state, "weight": state["weight"][:10]})
    return found


def test_the_state_of_one_process_loads_into_shards(ranks):
    one = PartialMarginSoftmax(DIM, CLASSES, seed=9)
    one.step.fill_(7)
    for weight, seed, step in ranks.run(3, whole_state, one.state_dict()):
        assert torch.equal(weight, one.weight)
        assert (seed, step) == (9, 7)


def other_classes(group, path, class_map, optimizer):
    run = Run(group, classes=len(class_map), optimizer=optimizer)
    fresh = whole(run.loss.state_dict()["weight"])
    checkpoint.load(path, **run.parts(), class_map=class_map)
    state = run.optimizer.state[run.loss.weight]
    (name, rows), *_ = [(k, v) for k, v in state.items() if k in ("exp_avg", "momentum_buffer")]
    rows = whole(rows if run.loss.shard is None else run.loss.shard.as_global(rows))
    found = whole(run.loss.state_dict()["weight"]), fresh, name, rows, copy.deepcopy(dict(state))
    run.train(2)
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RowAdamW", "RowSGD, exact"])
@pytest.mark.parametrize("change", [slow("append"), slow("drop"), "both"])
def test_classes_come_and_go(ranks, tmp_path, change, optimizer):
    if change == "append":
        class_map = torch.arange(CLASSES + 40)
        class_map[CLASSES:] = -1
    else:
        class_map = torch.arange(CLASSES)
        class_map = class_map[(class_map % 7 != 0) | (class_map < 20)]
        if change == "both":
            class_map = torch.cat([class_map, torch.full((300,), -1)])
    options = {"optimizer": optimizer}
    ranks.run(4, save, tmp_path / "c", 3, options)
    one = Run(None, **options)
    checkpoint.load(tmp_path / "c", **one.parts())
    known = class_map >= 0
    for group in (1, 3, None):
        results = (
            [other_classes(None, tmp_path / "c", class_map, optimizer)]
            if group is None
            else ranks.run(group, other_classes, tmp_path / "c", class_map, optimizer)
        )
        for weight, fresh, name, rows, state in results:
            assert torch.equal(weight[known], one.loss.weight[class_map[known]])
            assert torch.equal(weight[~known], fresh[~known])
            right = one.optimizer.state[one.loss.weight][name]
            assert torch.equal(rows[known], right[class_map[known]])
            assert not rows[~known].any()
            if optimizer == "RowAdamW" and group != 3:  # as if they had only now been made
                assert (state["log_decay"][~known] == state["total_log_decay"]).all()
            if optimizer == "RowSGD, exact" and group != 3:
                assert (state["last_step"][~known] == state["step"]).all()


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_merged_into_one_file_and_back(ranks, tmp_path):
    right, _ = ranks.run(4, save, tmp_path / "c", 3, {})[0]
    invoke("checkpoint", "merge", tmp_path / "c", tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert merged["modules.loss.weight"].shape == (CLASSES, DIM)
    assert merged["optimizers.main.modules.loss.weight.exp_avg"].shape == (CLASSES, DIM)
    invoke("checkpoint", "split", tmp_path / "merged.pt", tmp_path / "again")
    shown = invoke("checkpoint", "show", tmp_path / "c").output
    assert "modules.loss.weight  float32 [301, 8] in 4 parts" in shown
    refused = CliRunner().invoke(main, ["checkpoint", "show", str(tmp_path / "nowhere")])
    assert refused.exit_code == 1
    assert "there is no checkpoint" in refused.output
    for losses, _ in ranks.run(2, resume, tmp_path / "again", {}):
        assert losses == pytest.approx(right, rel=1e-6)
    with pytest.raises(CheckpointError, match="there already"):
        checkpoint.split(tmp_path / "merged.pt", tmp_path / "again")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not a merged checkpoint"):
        checkpoint.split(tmp_path / "other.pt", tmp_path / "third")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    save(None, path, 1, {})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 400}, r"\[301, 8\] there, but the loss here expects \[400, 8\] \(class_map"),
        ({"optimizer": "missing"}, r"no optimizer 'missing', only \['main'\]"),
        ({"encoder": nn.Linear(3, 2)}, r"has no modules\.encoder\.weight"),
        ({"class_map": torch.arange(5)}, "one entry for each of the 301 classes"),
        ({"class_map": torch.arange(CLASSES) + 1}, r"\[0, 301\)"),
        ({"path": "nowhere"}, "there is no checkpoint"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_and_changes_nothing(saved, change, message):
    run = Run(None, classes=change.get("classes", CLASSES))
    parts = run.parts()
    if "encoder" in change:
        parts["modules"]["encoder"] = change["encoder"]
        parts["optimizers"] = {}
    if "optimizer" in change:
        parts["optimizers"] = {change["optimizer"]: run.optimizer}
    before = [p.detach().clone() for p in (*run.encoder.parameters(), run.loss.weight)]
    with pytest.raises((CheckpointError, ValueError), match=message):
        checkpoint.load(
            saved.parent / change.get("path", "c"), **parts, class_map=change.get("class_map")
        )
    after = (*run.encoder.parameters(), run.loss.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def mismatch(group, path):
    run = Run(group, classes=400)
    try:
        checkpoint.load(path, **run.parts())
    except CheckpointError as error:
        return str(error)


def test_every_rank_says_what_does_not_fit(ranks, saved):
    for message in ranks.run(3, mismatch, saved):
        assert "[301, 8] there, but the loss here expects [400, 8]" in message


def test_a_checkpoint_is_never_overwritten(saved):
    with pytest.raises(CheckpointError, match="is there already"):
        checkpoint.save(saved, **Run(None).parts())


def test_the_newest_checkpoint_is_the_one_with_the_largest_step(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for name in ("step-2", "step-10", "step-11.tmp", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-10"


def test_about_a_checkpoint(saved):
    about = checkpoint.read_about(saved)
    assert about["extra"] == {"step": 1, "note": "é"}
    assert about["classes"]["modules.loss.weight"] == {
        "num_classes": CLASSES, "num_centers": 1, "embedding_size": DIM, "seed": 5,
    }  # fmt: skip
    assert json.dumps(about)
    (saved.parent / "torn").mkdir(exist_ok=True)
    (saved.parent / "torn" / ".metadata").write_bytes(b"not")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_about(saved.parent / "torn")
