"""The encoder of a run as files: they compute what it does, and say what it is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from support.images import exactly
from support.training import PARTS, TINY, run

from unicom_ext import checkpoint
from unicom_ext.cli.main import main
from unicom_ext.encoders import registry, weights
from unicom_ext.train import export as exporting
from unicom_ext.train import report
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError

AVERAGED = dataclasses.replace(TINY, ema=0.5, epochs=1, evaluate_every=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose weights are averaged."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *arguments: None)
        run(output, config=AVERAGED)
    return output


def evaluated(output):
    """The encoder that the driver has evaluated."""
    trainer = Trainer(AVERAGED, PARTS.train)
    trainer.load(checkpoint.latest(output / "checkpoints"))
    return trainer.evaluated.eval()


def test_files_compute_what_the_encoder_does(trained, tmp_path):
    exported = exporting.export(trained, tmp_path / "out")
    assert exported.differences["encoder.pt2"] <= 1e-5
    program = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    facts = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (facts["input"], facts["output"]) == (["batch", 1, 32, 32], ["batch", 8])
    encoder = evaluated(trained)
    for count in (1, 2, 7):
        images = torch.rand(count, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(images), encoder(images))
    tensors = next(p for p in (tmp_path / "out").glob("encoder.*") if p.suffix not in (
        ".pt2", ".onnx"))  # fmt: skip
    settings = dataclasses.replace(TINY, weights=str(tensors))
    again = registry.create(settings, 8).module.eval()
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_the_card(trained, tmp_path):
    exporting.export(checkpoint.latest(trained / "checkpoints"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((trained / "metrics.json").read_text())
    last = metrics["evaluations"][-1]["results"][-1]
    assert text.startswith("# small, 8 dimensions\n")
    for words in (
        "Input: fp32 [batch, 1, 32, 32]. Output: fp32 [batch, 8], not normalised",
        "120 images of 20 characters, from `glyphs`",
        f"`{metrics['data']['sha256']}`",
        "72 images of 12 characters that it was not trained on, each searched among all the others",
        f"| 8 | {last['recall']['1']:.3f} | {last['recall']['10']:.3f} | {last['map_at_r']:.3f} |",
        "Licence: *to be filled in by whoever publishes this*",
        "    ema = 0.5\n",
        "- `encoder.pt2`: ",
    ):
        assert words in text


def test_a_program_of_another_result_is_not_written(trained, tmp_path, monkeypatch):
    class Other:
        def module(self):
            return lambda images: torch.ones(len(images), 8)

    monkeypatch.setattr(torch.export, "load", lambda path: Other())
    with pytest.raises(ConfigError, match=r"^encoder: encoder\.pt2 of small gives other outputs"):
        exporting.export(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(trained, tmp_path):
    with pytest.raises(ConfigError, match=exactly(
        f"output: {trained} is there already, must be a new directory"
    )):  # fmt: skip
        exporting.export(trained, trained)
    with pytest.raises(CheckpointError, match=exactly(
        f"{tmp_path}: there is no checkpoint of a run"
    )):  # fmt: skip
        exporting.export(tmp_path, tmp_path / "out")
    (tmp_path / "pipeline.json").write_text('{"format": "unicom_ext pipeline 1", "steps": {}}')
    result = CliRunner().invoke(main, ["export", str(tmp_path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"{tmp_path}: has finished no training yet" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.json"]


def test_weights_that_are_averaged_count(trained, tmp_path):
    """In a checkpoint and in a file that is made of it."""
    checkpoint.merge(checkpoint.latest(trained / "checkpoints"), tmp_path / "merged.pt")
    expected = evaluated(trained).state_dict()
    for path in (trained / "checkpoints", tmp_path / "merged.pt"):
        found = weights.read(str(path)).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
