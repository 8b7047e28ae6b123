"""Files of InsightFace that are no whole checkpoint, and what its files cannot hold."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import published_trainer as published
from support.published_files import files, write
from support.published_trainer import MARGIN, C, D

from unicom_ext import ArcFace, checkpoint, interchange
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.checkpoint.pieces import Pieces
from unicom_ext.cli.main import main
from unicom_ext.compat import PartialFC_V2
from unicom_ext.optim import RowAdamW


def change(folder, rank, **values):
    path = folder / f"checkpoint_gpu_{rank}.pt"
    content = torch.load(path)
    for key, value in values.items():
        content[key] = value(content[key]) if callable(value) else value
    torch.save(content, path)


def sized(rows, dim=D):
    return lambda head: {"weight": torch.ones(rows, dim)}


def in_halves(state):
    last = max(state["state"])
    own = {k: v.half() if v.dim() else v for k, v in state["state"][last].items()}
    return {**state, "state": {**state["state"], last: own}}


def with_tensor(state):
    groups = [{**group, "extra": torch.tensor(1.0)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def moved(backbone):
    return {**backbone, "0.weight": backbone["0.weight"] * 1.1}


FAULTS = {
    "a rank is missing": (
        lambda f: (f / "checkpoint_gpu_2.pt").unlink(),
        r"checkpoint_gpu_3.pt: are of the ranks 0, 1, 3; rank 2 is missing",
    ),
    "a rank is there twice": (
        lambda f: torch.save(torch.load(f / "checkpoint_gpu_1.pt"), f / "copy_gpu_1.pt"),
        r"checkpoint_gpu_1.pt and \S+copy_gpu_1.pt are both of rank 1",
    ),
    "nothing says which rank": (
        lambda f: (f / "checkpoint_gpu_1.pt").rename(f / "a.pt"),
        r"a.pt: its name does not say of which rank it is, as a_gpu_0.pt would",
    ),
    "another step": (
        lambda f: change(f, 1, global_step=39),
        r"0.pt and \S+1.pt are not of one run: global_step is 40 and 39",
    ),
    "another learning rate": (
        lambda f: change(
            f, 1, state_optimizer=lambda s: {**s, "param_groups": s["param_groups"][::-1]}
        ),
        "are not of one run: the number of parameters of the optimizer's group 0 is 9 and 1",
    ),
    "another backbone": (
        lambda f: change(f, 3, state_dict_backbone=moved),
        r"0.pt and \S+3.pt are not of one run: 0.weight of the backbone differs",
    ),
    "another size of embeddings": (
        lambda f: change(f, 2, state_dict_softmax_fc=sized(6, 7)),
        r"0.pt and \S+2.pt are not of one run: the embedding size is 6 and 7",
    ),
    "a split that is none": (
        lambda f: change(f, 0, state_dict_softmax_fc=sized(7)),
        r"have \[7, 6, 6, 5\] classes, .* of 24 classes \[6, 6, 6, 6\]. Are files of several",
    ),
    "state of other classes": (
        lambda f: change(
            f, 0, state_optimizer=lambda s: {**s, "state": {**s["state"], 9: {"step": 1}}}
        ),
        "of the prototypes their optimizers have step and step, exp_avg, exp_avg_sq",
    ),
    "an unknown key": (
        lambda f: change(f, 1, ema=1),
        r"1.pt: ema is not known; it holds epoch, .*, ema, expected are state_dict_backbone, ",
    ),
    "an unknown tensor in the head": (
        lambda f: change(f, 1, state_dict_softmax_fc={"kernel": torch.ones(6, D)}),
        r"1.pt: kernel is not known; it holds kernel, expected are weight, weight_mom",
    ),
    "another schedule": (
        lambda f: change(f, 2, state_lr_scheduler={"last_epoch": 40, "base_lrs": [0.1, 0.2]}),
        r"base_lrs of the scheduler is \[0.1, 0.1\] and \[0.1, 0.2\]",
    ),
    "a backbone of another shape": (
        lambda f: change(f, 2, state_dict_backbone=lambda b: {**b, "3.bias": torch.ones(9)}),
        r"not of one run: 3.bias of the backbone is \[6\] and \[9\]",
    ),
    "moments of another dtype": (
        lambda f: change(f, 2, state_optimizer=in_halves),
        r"exp_avg of the prototypes is torch.float32 and torch.float16",
    ),
    "newer rows of unknown classes": (
        lambda f: change(
            f, 0, state_dict_softmax_fc=lambda h: {**h, "weight_activated": torch.ones(2, D)}
        ),
        r"0.pt: the head has newer rows of weight, but no weight_index that says of which",
    ),
    "no state of an optimizer": (
        lambda f: change(f, 0, state_optimizer={"state": {}}),
        r"0.pt: state_optimizer holds state, must hold state and param_groups",
    ),
    "state of no parameter": (
        lambda f: change(
            f, 0,
            state_optimizer=lambda s: {**s, "state": {str(k): v for k, v in s["state"].items()}},
        ),
        r"0.pt: the optimizer has a dict as the state of '0', must have a dict, for parameters of",
    ),
    "a parameter twice": (
        lambda f: change(
            f, 0, state_optimizer=lambda s: {**s, "param_groups": [{"params": [0, 1, 1]}]}
        ),
        r"the optimizer's groups have the parameters \[0, 1, 1\], must have a number for each",
    ),
    "steps that are no number": (
        lambda f: change(f, 0, state_optimizer=lambda s: {**s, "state": {0: {"step": "x"}}}),
        r"0.pt: step of the optimizer must be a number, got 'x'",
    ),
    "an option that one rank has": (
        lambda f: change(f, 0, state_optimizer=with_tensor),
        r"not of one run: extra of the optimizer's group 0 is 1.0 and None",
    ),
    "a step that no counter holds": (
        lambda f: change(f, 0, global_step=2**63),
        r"0.pt: global_step must be in \[0, 2\^63\), got 9223372036854775808",
    ),
    "a backbone without names": (
        lambda f: change(f, 0, state_dict_backbone={0: torch.ones(2)}),
        r"0.pt: state_dict_backbone holds a Tensor under 0, must hold tensors by name",
    ),
    "a number where there was none": (
        lambda f: change(
            f, 0, state_dict_backbone=lambda b: {**b, "0.bias": b["0.bias"] * torch.nan}
        ),
        r"0.pt and \S+1.pt are not of one run: 0.bias of the backbone differs",
    ),
    "a sparse head": (
        lambda f: change(f, 0, state_dict_softmax_fc={"weight": torch.eye(6).to_sparse()}),
        r"0.pt: weight must be a dense matrix of floats, got float32 \[6, 6\] on cpu, sparse_coo",
    ),
    "one rank's file under another's name": (
        lambda f: shutil.copy(f / "checkpoint_gpu_2.pt", f / "checkpoint_gpu_1.pt"),
        r"1.pt and \S+2.pt have the same prototypes: is one a copy of the other?",
    ),
    "three groups": (
        lambda f: [
            change(
                f, rank,
                state_optimizer=lambda s: {
                    **s, "param_groups": [*s["param_groups"], {"params": [10]}]
                },
            )
            for rank in range(4)
        ],
        "has groups of 9, 1, 1 parameters, and nothing says which",
    ),
    "a damaged file": (
        lambda f: (f / "checkpoint_gpu_1.pt").write_bytes(
            (f / "checkpoint_gpu_1.pt").read_bytes()[:3000]
        ),
        r"1.pt: cannot be read: it is cut off",
    ),
    "something else": (
        lambda f: (f / "checkpoint_gpu_1.pt").write_text("epoch 1"),
        r"1.pt: is no file that torch.save has written",
    ),
    "code": (
        lambda f: change(f, 1, state_lr_scheduler=Path("x")),
        r"1.pt: holds pathlib.PosixPath, and reading that could run code; must hold tensors and pl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(tmp_path, fault):
    folder = tmp_path / "4"
    write(folder, 4)
    spoil, message = FAULTS[fault]
    spoil(folder)
    output = tmp_path / "c"
    arguments = ["import", *sorted(folder.iterdir()), "--output", output, "--num-classes", C]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]


def test_other_ranks_files_beside_those_given(tmp_path):
    write(tmp_path / "4", 4)
    with pytest.raises(CheckpointError, match=r"gpu_3.pt: beside the files that are given, but"):
        interchange.read(files(tmp_path / "4")[:3])


def test_what_is_no_number_is_the_same_on_every_rank(tmp_path):
    write(tmp_path / "2", 2)
    for rank in range(2):
        change(
            tmp_path / "2", rank,
            state_dict_backbone=lambda b: {**b, "0.bias": b["0.bias"] * torch.nan},
            state_lr_scheduler={"last": torch.nan},
        )  # fmt: skip
    found = interchange.read(files(tmp_path / "2"))
    assert found.tensors["modules.encoder.0.bias"].isnan().all()


def test_another_number_of_classes(tmp_path):
    write(tmp_path / "4", 4)
    with pytest.raises(
        ValueError, match=r"is 24, but the files are of 23: 3 ranks with 6, 1 with 5 in the files"
    ):
        interchange.read(files(tmp_path / "4"), num_classes=24)


@pytest.mark.parametrize(
    ("ranks", "spoil", "message"),
    [
        (0, {}, r"ranks must be .* got 0"),
        (24, {}, r"ranks must be at most the 23 classes, got 24"),
        (2, {"modules": ["loss"]}, r"must have the modules 'encoder' and 'loss', .*; has loss"),
        (2, {"optimizers": {}}, r"must have the optimizer 'main', has none"),
        (2, {"order": -1}, r"last parameter must be the prototypes, .* is modules.encoder.4.bias"),
        (2, {"split": 4}, r"optimizer has groups of 4, 5, 1 parameters, the trainer has one of t"),
        (2, {"make": RowAdamW, "sparse_grad": True}, r"state of modules.loss.weight is by rows"),
        (2, {"num_centers": 2}, r"has 2 centers of each class, PartialFC has one"),
    ],
)  # fmt: skip
def test_what_partial_fc_cannot_have(tmp_path, ranks, spoil, message):
    spoil = dict(spoil)
    names, order = spoil.pop("modules", ["encoder", "loss"]), spoil.pop("order", 1)
    optimizers, make = spoil.pop("optimizers", None), spoil.pop("make", torch.optim.AdamW)
    split = spoil.pop("split", None)
    encoder, loss = published.backbone(), PartialFC_V2(ArcFace(MARGIN), D, C, **spoil)
    modules = {"encoder": encoder, "loss": loss}
    params = list(encoder.parameters())
    groups = [params] if split is None else [params[:split], params[split:]]
    optimizer = make([{"params": part} for part in [*groups, loss.parameters()][::order]])
    loss(encoder(published.batch(0)[0]), published.batch(0)[1]).backward()
    optimizer.step()
    if optimizers is None and "encoder" in names:
        optimizers = {"main": optimizer}
    checkpoint.save(
        tmp_path / "c", modules={name: modules[name] for name in names}, optimizers=optimizers
    )
    with pytest.raises((CheckpointError, ValueError), match=message):
        interchange.to_partial_fc(tmp_path / "c", tmp_path / "out", ranks=ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


class Full(io.FileIO):
    """A file on a disk that is full."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "c", "out"],
        ["to-partial-fc", "c", "out", "--ranks", "2"],
        ["prototypes", "c", "out.npy"],
    ],
)
def test_a_full_disk_for_what_goes_to_other_programs(tmp_path, monkeypatch, command):
    write(tmp_path / "2", 2)
    interchange.read(files(tmp_path / "2")).write(tmp_path / "c")
    real = open

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r", *a, **k: (
            Full(path, mode) if "w" in mode else real(path, mode, *a, **k)
        ),
    )
    if command[0] == "prototypes":
        monkeypatch.undo()
        monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["checkpoint", *command])
    assert (result.exit_code, result.output[-42:]) == (
        1, "cannot be written: No space left on device\n"[-42:],
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "c"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            r"c.tmp: cannot be written: No space left on device",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_disk_that_is_full_and_an_interrupt(tmp_path, error, raised, message):
    def rows(start, stop):
        raise error

    weight = {"modules.loss.weight": Pieces((C, D), torch.float32, rows)}
    found = interchange.Found({}, [], weight, {}, {}, {})
    with pytest.raises(raised, match=message):
        found.write(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
