"""Checkpoints that are spoilt, or of another kind of optimizer: said before anything is read."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from unicom_ext import PartialMarginSoftmax, checkpoint
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.cli.main import main
from unicom_ext.optim import RowAdamW, RowSGD


def parts(seed=0):
    loss = PartialMarginSoftmax(6, 20, sample_rate=0.5, sparse_grad=True, seed=seed)
    return {"modules": {"loss": loss}, "optimizers": {"main": RowAdamW(loss.parameters())}}


SPOIL = {
    "is not there": lambda path: path.unlink(),
    "is truncated: 0 bytes of": lambda path: path.write_bytes(b""),
    "is truncated: 100 bytes of": lambda path: path.write_bytes(path.read_bytes()[:100]),
}


@pytest.fixture(params=SPOIL)
def spoilt(request, tmp_path):
    trained = parts()
    loss, optimizer = trained["modules"]["loss"], trained["optimizers"]["main"]
    loss(torch.ones(4, 6), torch.arange(4)).backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", **trained)
    (path,) = (tmp_path / "c").glob("*.distcp")
    SPOIL[request.param](path)
    return tmp_path / "c", f"{path}: {request.param}"


def test_nothing_changes(spoilt):
    directory, message = spoilt
    here = parts(seed=1)
    loss, optimizer = here["modules"]["loss"], here["optimizers"]["main"]
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(directory, **here)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])
    assert not optimizer.state


@pytest.mark.parametrize("command", ["show", "merge"])
def test_commands_say_it_in_a_line(spoilt, tmp_path, command):
    directory, message = spoilt
    arguments = [directory, *([tmp_path / "merged.pt"] if command == "merge" else [])]
    result = CliRunner().invoke(main, ["checkpoint", command, *map(str, arguments)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "merged.pt").exists()


class Touch:
    """Whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_reading_runs_no_code(tmp_path):
    here = parts()
    checkpoint.save(tmp_path / "c", **here)
    (tmp_path / "c/.metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    for read in (checkpoint.read_about, lambda path: checkpoint.load(path, **here)):
        with pytest.raises(CheckpointError, match=r"c: cannot be read: .* it names .*, which no"):
            read(tmp_path / "c")
    assert not (tmp_path / "touched").exists()


def test_the_latest_is_a_directory(tmp_path):
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-10").touch()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-2"


def test_none_that_is_the_latest(tmp_path):
    with pytest.raises(CheckpointError, match=r"^there is no checkpoint to load: `latest` has fou"):
        checkpoint.load(checkpoint.latest(tmp_path), **parts())


@pytest.mark.parametrize(
    ("ours", "theirs"), [(RowAdamW, torch.optim.AdamW), (RowSGD, torch.optim.SGD)]
)
def test_rows_are_nothing_for_torchs_optimizers(tmp_path, ours, theirs):
    options = {"lr": 0.1, **({"momentum": 0.9} if ours is RowSGD else {})}
    trained = parts()["modules"]["loss"]
    optimizer = ours(trained.parameters(), **options)
    trained(torch.ones(4, 6), torch.arange(4)).backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", modules={"loss": trained}, optimizers={"main": optimizer})
    loss = parts(seed=1)["modules"]["loss"]
    before = copy.deepcopy(loss.state_dict())
    other = theirs(loss.parameters(), **options)
    with pytest.raises(CheckpointError, match=f"a row optimizer of .* {theirs.__name__} cannot go"):
        checkpoint.load(tmp_path / "c", modules={"loss": loss}, optimizers={"main": other})
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])
    assert not other.state
