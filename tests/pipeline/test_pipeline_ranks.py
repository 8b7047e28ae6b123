"""Several processes do what one does, end together, and another number of them can go on."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch.distributed as dist
from support.pipelines import photographs, run_pipeline, tables
from support.processes import Process
from support.ranks import free_port

from unicom_ext import report
from unicom_ext.cli.main import main
from unicom_ext.distributed.failures import RankFailed
from unicom_ext.encoders import extract
from unicom_ext.pipeline import steps
from unicom_ext.pipeline.config import PipelineConfig

MADE = ("features", "clusters")


@pytest.fixture
def pictures(tmp_path):
    photographs(tmp_path / "pictures")
    return tmp_path / "pictures"


def quick(patch):
    """Shards of a few images, and no drawing, which takes longer than all the rest."""
    patch.setattr(extract, "SHARD_ROWS", 5)
    patch.setattr(report, "write", lambda path, page: path.write_text("a page"))
    patch.setattr("unicom_ext.cluster.pictures.draw", lambda *arguments: [])


def on_a_rank(group, output, settings, fails=False):
    """fails: rank 2 cannot begin to train."""
    assert group is dist.group.WORLD

    def fail(*arguments):
        raise MemoryError("no room for a thing")

    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        if fails and dist.get_rank() == 2:
            patch.setattr("unicom_ext.train.run.labelled", fail)
        return run_pipeline(output, settings)


def arrays(output):
    found = {}
    for directory in MADE:
        for path in (output / directory).rglob("*.npy"):
            if "state" not in path.parts:
                found[str(path.relative_to(output))] = np.load(path)
    return found


def test_four_processes(ranks, pictures, tmp_path, monkeypatch):
    quick(monkeypatch)
    settings, output = tables(pictures), tmp_path / "four"
    run_pipeline(tmp_path / "one", settings, until="cluster")
    (figures, said), *others = ranks.run(4, on_a_rank, output, settings)
    expected, found = arrays(tmp_path / "one"), arrays(output)
    assert len([name for name in found if "img_emb" in name]) == 5
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert json.loads((output / "evaluation" / "figures.json").read_text()) == figures
    assert others == [(figures, "")] * 3
    assert [name for name in steps.NAMES if f"{name}: took" in said] == [*steps.NAMES]
    # One process finds all of it done.
    again, said = run_pipeline(output, settings)
    assert again == figures
    assert said.count(": is there already") == len(steps.NAMES)


def test_a_process_that_fails_ends_all(ranks, pictures, tmp_path):
    settings, output = tables(pictures), tmp_path / "output"
    outcomes = ranks.outcomes(4, on_a_rank, output, settings, True)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, MemoryError if rank == 2 else RankFailed), outcome
        assert "no room for a thing" in str(outcome)
    recorded = json.loads((output / "pipeline.json").read_text())["steps"]
    assert [name for name in recorded if "result" in recorded[name]] == ["extract", "cluster"]
    (figures, said), *_ = ranks.run(4, on_a_rank, output, settings)
    assert "cluster: is there already" in said
    assert figures["finetuned"]


def of_other_settings(group, output, settings):
    if dist.get_rank() == 1:
        settings = {**settings, "train": {**settings["train"], "m2": 0.2}}
    with pytest.raises(ValueError, match="settings, images and output must be the same on every"):
        run_pipeline(output, settings)


def test_processes_of_other_settings(ranks, pictures, tmp_path):
    ranks.run(4, of_other_settings, tmp_path / "output", tables(pictures))
    assert not (tmp_path / "output").exists()


def command(variables, arguments):
    os.environ.update(variables)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        main(arguments)


@pytest.mark.slow
def test_the_commands_under_torchrun(pictures, tmp_path):
    """What its variables say."""
    config = tmp_path / "settings.toml"
    config.write_text(PipelineConfig.from_mapping(tables(pictures)).to_toml())
    pipeline, features = tmp_path / "pipeline", tmp_path / "features"
    for arguments, words in (
        (["pipeline", f"--config={config}", f"--output={pipeline}"], "pseudo-classes (zero-shot)"),
        (["extract", f"--data={pictures}", f"--output={features}", "--encoder=pixels", "--dim=4"],
         "Features of 36 images of 6 classes in"),
    ):  # fmt: skip
        port, world = str(free_port()), {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        first, second = (
            Process(
                tmp_path / f"{arguments[0]}-{rank}.txt",
                command,
                {**world, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                arguments,
            )
            for rank in range(2)
        )
        assert (first.end(), second.end()) == (0, 0), first.text() + second.text()
        assert words in first.text()
        assert not re.search("extract:|Features|zero-shot", second.text())
    assert (features / "img_emb" / "img_emb_0007.npy").exists()
