"""A pipeline leaves what single commands leave, does nothing twice, and minds no kill."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from support.images import exactly
from support.pipelines import photographs, run_pipeline, tables
from support.processes import Process
from support.training import assert_same_bits, saved

from unicom_ext import report
from unicom_ext.cli.main import main
from unicom_ext.data.images.opening import open_images
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.encoders import registry
from unicom_ext.pipeline import run as pipeline
from unicom_ext.pipeline import steps, table
from unicom_ext.pipeline.config import PipelineConfig
from unicom_ext.retrieval import evaluate
from unicom_ext.train import checkpoints
from unicom_ext.utils.settings import ConfigError

STEPS = list(steps.NAMES)
WRITE = report.write


def write_quickly(path, page):
    path.write_text("a page")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing takes longer than all the rest."""

    monkeypatch.setattr(report, "write", write_quickly)
    monkeypatch.setattr("unicom_ext.cluster.pictures.draw", lambda *arguments: [])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    photographs(root / "plain")
    return root / "plain"


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A pipeline that nothing has interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", write_quickly)
        patch.setattr("unicom_ext.cluster.pictures.draw", lambda *arguments: [])
        output = tmp_path_factory.mktemp("whole") / "output"
        run_pipeline(output, tables(pictures))
    return output


@pytest.fixture(scope="module")
def right(whole):
    return results(whole)


@pytest.fixture
def output(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "output")
    return tmp_path / "output"


def done(text: str) -> list[str]:
    """The steps that were run, not skipped."""
    return [name for name in STEPS if f"{name}: took" in text]


def figures(output):
    return json.loads((output / "evaluation" / "figures.json").read_text())


def results(output):
    found = {"figures": figures(output)}
    for step in ("pretrained", "finetuned"):
        found[step] = saved(output / step)
        for name in ("labels", "weights", "workers"):  # which name the output directory
            del found[step]["about"]["extra"]["config"][name]
        del found[step]["about"]["extra"]["contents"]  # of checkpoints, with their timing
    return found


# ---- what it leaves ------------------------------------------------------------------------------


def test_figures_are_those_of_the_encoders(whole, pictures):
    settings = PipelineConfig.from_mapping(tables(pictures))
    parts = open_images(settings.data, 0)
    assert set(figures(whole)) == {"baselines", "pretrained", "finetuned"}
    for step in ("pretrained", "finetuned"):
        config = checkpoints.Config.from_mapping(
            {**settings.train.to_dict(), "weights": str(whole / step / "checkpoints")}
        )
        made = registry.create(config, 8)
        made.module.eval()
        prepare = made.preprocessing
        images = torch.stack(
            [torch.from_numpy(np.array(prepare(parts.query.read(i)))) for i in range(12)]
        ).permute(0, 3, 1, 2)
        with torch.no_grad():
            embeddings = made.module(prepare.normalised(images))
        expected = evaluate(embeddings, torch.from_numpy(parts.query.labels), dims=[4, 8])
        for result, found in zip(expected, figures(whole)[step], strict=True):
            assert found["recall"]["1"] == pytest.approx(result.recall[1], abs=0.09)
            assert found["map_at_r"] == pytest.approx(result.map_at_r, abs=0.02)
        dumped = np.load(whole / "evaluation" / step / "query" / "img_emb" / "img_emb_0000.npy")
        normal = torch.nn.functional.normalize(embeddings)
        torch.testing.assert_close(torch.from_numpy(dumped).float(), normal, atol=2e-3, rtol=2e-3)


def test_fine_tuning_begins_where_pretraining_ends(whole):
    about = saved(whole / "finetuned")["about"]["extra"]["config"]
    assert about["weights"] == str(whole / "pretrained" / "checkpoints")
    assert (about["labels"], about["learning_rate"]) == ("", 1e-3)
    data = json.loads((whole / "finetuned" / "metrics.json").read_text())["data"]
    assert (data["train_classes"], data["test_classes"]) == (4, 2)
    about = saved(whole / "pretrained")["about"]["extra"]
    assert about["config"]["labels"] == str(whole / "clusters")
    assert about["data"]["train_classes"] <= 5


def test_single_commands_take_what_it_leaves(output):
    features = output / "evaluation" / "finetuned" / "query"
    for arguments, words in (
        (["report", output / "pretrained"], "Recall@1 on unseen classes"),
        (["report", output / "clusters"], "24 rows in 5 clusters"),
        (["evaluate", features, "--labels", features / "true_labels.npy", "--dims", "4,8"],
         f"{figures(output)['finetuned'][1]['recall']['1']:.4f}"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        assert words in result.output


def test_baselines_say_which_classes_they_have_learned(output, pictures):
    for step, names in (("pretrained", ["HOG", "LDA"]), ("finetuned", ["LDA"])):
        path = output / step / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["baselines"] = {name: figures(output)[step] for name in names}
        path.write_text(json.dumps(metrics))
    config = PipelineConfig.from_mapping(tables(pictures))
    place = steps.Place(config, open_images(config.data, 0), output)
    evaluate_step = steps.planned(place)[4]
    evaluate_step.run(Console(quiet=True), Ranks(None))
    names = ["HOG", "LDA on pseudo-classes", "LDA on true classes"]
    assert list(figures(output)["baselines"]) == names
    grid = table.table(figures(output))
    names += ["pseudo-classes (zero-shot)", "fine-tuned"]
    assert list(grid.columns[0].cells) == names
    best = figures(output)["finetuned"][-1]
    assert [list(c.cells)[-1] for c in grid.columns[2:]] == [
        f"{best['recall']['1']:.3f}", f"{best['map_at_r']:.3f}"
    ]  # fmt: skip


def test_images_that_cannot_be_read_and_captions(pictures, tmp_path):
    root = tmp_path / "pictures"
    photographs(root, captions=True)
    broken = {f"class {c}/{c % 3}.jpg" for c in range(6)}
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:100])
    _, text = run_pipeline(tmp_path / "output", tables(root), until="train")
    assert "5 clusters by their concat features" in text
    output = tmp_path / "output"
    parts = open_images(PipelineConfig.from_mapping(tables(root)).data, 0)
    labels = np.load(output / "clusters" / "labels_0000.npy")
    bad = [i for i in range(len(parts.train)) if parts.train.name(i) in broken]
    assert len(bad) == 4
    assert np.flatnonzero(labels == -1).tolist() == bad
    assert "4 images could not be read: they are in no cluster" in text
    assert "4 images are in no cluster, and not trained on: 4 without features" in text
    trained = json.loads((output / "pretrained" / "metrics.json").read_text())
    assert trained["data"]["train_images"] == 24 - len(bad)
    assert trained["unreadable"] == {}


def test_without_classes_there_are_clusters_alone(tmp_path):
    photographs(tmp_path / "pictures", labelled=False)
    found, text = run_pipeline(tmp_path / "output", tables(tmp_path / "pictures"))
    assert found is None
    assert done(text) == ["extract", "cluster", "train"]
    assert "finetune: left out, as the images to train on have no classes." in text
    assert "evaluate: left out, as there are no images of classes that are not trained on." in text
    assert not (tmp_path / "output" / "evaluation").exists()


# ---- what is whole is left as it is --------------------------------------------------------------


def test_what_is_whole_is_not_made_again(output, pictures):
    found, text = run_pipeline(output, tables(pictures))
    assert done(text) == []
    assert found == figures(output)
    assert f"train: is there already, {output / 'pretrained' / 'metrics.json'}" in text
    # Settings that change no result.
    _, text = run_pipeline(output, tables(pictures, train={"workers": 1, "checkpoint_every": 9}))
    assert done(text) == []


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"extract": {"dim": 3}}, "extract"),
        ({"cluster": {"clusters": 6}}, "cluster"),
        ({"train": {"m2": 0.2}}, "train"),
        ({"finetune": {"m2": 0.2}}, "finetune"),
        ({"evaluate": {"dims": [2, 8]}}, "evaluate"),
    ],
)
def test_a_changed_setting_makes_its_step_and_later_ones_anew(output, pictures, changed, first):
    settings = tables(pictures, **changed)
    _, text = run_pipeline(output, settings)
    assert done(text) == STEPS[STEPS.index(first) :]
    assert [result["dim"] for result in figures(output)["pretrained"]] == (
        [2, 8] if first == "evaluate" else [4, 8]
    )


@pytest.mark.slow
def test_results_are_those_of_a_pipeline_from_nothing(output, pictures, tmp_path):
    run_pipeline(output, tables(pictures, cluster={"clusters": 6}))
    assert figures(output) != {}
    run_pipeline(output, tables(pictures))  # back again
    run_pipeline(tmp_path / "new", tables(pictures))
    assert_same_bits(results(output), results(tmp_path / "new"))


def test_changed_images_and_results(output, pictures, tmp_path):
    copied = tmp_path / "pictures"
    shutil.copytree(pictures, copied)
    settings = tables(copied)
    assert done(run_pipeline(output, settings)[1]) == []  # wherever they lie
    (output / "finetuned" / "metrics.json").unlink()
    assert done(run_pipeline(output, settings)[1]) == ["finetune"]
    names = {open_images(PipelineConfig.from_mapping(settings).data, 0).query.name(0)}
    (copied / names.pop()).unlink()  # a test image: features of the others stay
    assert done(run_pipeline(output, settings)[1]) == ["train", "finetune", "evaluate", "report"]


def test_changed_captions_and_weights(tmp_path):
    root, output = tmp_path / "pictures", tmp_path / "output"
    photographs(root, captions=True)
    weights = tmp_path / "weights.pt"
    encoder = registry.create(PipelineConfig.from_mapping(tables(root)).train, 8).module
    torch.save(encoder.state_dict(), weights)
    settings = tables(root, train={"weights": str(weights)})
    assert done(run_pipeline(output, settings, until="train")[1]) == STEPS[:3]
    assert done(run_pipeline(output, settings, until="train")[1]) == []
    data = PipelineConfig.from_mapping(settings).data
    caption = root / open_images(data, 0).train.class_names[0] / "0.txt"
    caption.write_text(caption.read_text().replace("picture", "pikture"))  # of the same size
    assert done(run_pipeline(output, settings, until="train")[1]) == STEPS[:3]
    encoder.get_parameter(next(iter(dict(encoder.named_parameters())))).data.add_(1)
    torch.save(encoder.state_dict(), weights)
    assert done(run_pipeline(output, settings, until="train")[1]) == ["train"]
    without = tables(root, train={"weights": str(weights)}, extract={"text_encoder": "none"})
    assert done(run_pipeline(output, without, until="cluster")[1]) == STEPS[:2]
    caption.write_text("another")
    assert done(run_pipeline(output, without, until="cluster")[1]) == []


def test_renamed_classes_are_on_a_new_page(pictures, tmp_path):
    """Where the data say which are for what, nothing else depends on the names."""

    def named(name):
        rows = (
            f"{pictures}/class {c}/{i}.jpg,{name} {c},{'train' if c < 4 else 'test'}\n"
            for c in range(6) for i in range(6)
        )  # fmt: skip
        (tmp_path / "table.csv").write_text("path,label,split\n" + "".join(rows))
        return tables(tmp_path / "table.csv")

    output = tmp_path / "output"
    assert done(run_pipeline(output, named("colour"))[1]) == STEPS
    assert done(run_pipeline(output, named("colour"))[1]) == []
    assert done(run_pipeline(output, named("shade"))[1]) == ["report"]


def test_from_and_until(pictures, tmp_path):
    output, settings = tmp_path / "output", tables(pictures)
    assert done(run_pipeline(output, settings, until="cluster")[1]) == ["extract", "cluster"]
    assert not (output / "pretrained").exists()
    found, text = run_pipeline(output, settings, begin_at="cluster", until="train")
    assert found is None
    assert done(text) == ["cluster", "train"]
    assert done(run_pipeline(output, settings)[1]) == ["finetune", "evaluate", "report"]
    found, text = run_pipeline(output, settings, begin_at="finetune")
    assert done(text) == ["finetune", "evaluate", "report"]
    without = {name: table for name, table in settings.items() if name != "finetune"}
    assert pipeline.final_run(output) == output / "finetuned"
    found, text = run_pipeline(output, without)
    assert set(found) == {"baselines", "pretrained"}
    assert "finetune: left out, as there is no table [finetune]." in text
    assert pipeline.final_run(output) == output / "pretrained"


@pytest.mark.parametrize(
    ("step", "changed"),
    [("train", {"train": {"m2": 0.2}}), ("cluster", {"cluster": {"clusters": 6}})],
)
def test_what_comes_after_a_changed_step_counts_no_more(output, pictures, step, changed):
    """An encoder that was fine-tuned from other weights is not exported, a page of it not shown."""
    assert pipeline.final_run(output) == output / "finetuned"
    settings = tables(pictures, **changed)
    assert done(run_pipeline(output, settings, until=step)[1]) == [step]
    if step == "train":
        assert pipeline.final_run(output) == output / "pretrained"
    else:
        with pytest.raises(ConfigError, match=r": has finished no training yet$"):
            pipeline.final_run(output)
    assert not (output / "report.html").exists()
    assert not (output / "evaluation" / steps.FIGURES).exists()
    later = STEPS[STEPS.index(step) + 1 :]
    assert done(run_pipeline(output, settings)[1]) == later


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"cluster": {"joint": "concat"}}, {},
         "cluster.joint: got 'concat', but there are no features of captions, must be image"),
        ({"cluster": {"clusters": 25}}, {},
         "cluster.clusters: got 25, but there are 24 images to train on"),
        ({"train": {"patience": 1, "evaluate_every": 1}}, {},
         "train.patience: got 1, but there are no validation classes"),
        ({"finetune": {"accumulate": 7}}, {},
         "finetune.batch_size: got 12, must be at least 2 for each of 7 parts"),
        ({"train": {"encoder": "smal"}}, {}, None),
        ({"data": {"test_fraction": 0.01}}, {},
         "test_fraction: got 0.01, which leaves one part of the 6 classes empty"),
        ({}, {"until": "tune"},
         "until: got 'tune', must be extract or cluster or train or finetune or evaluate or "
         "report"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_images(pictures, tmp_path, changed, options, message):
    pattern = exactly(message) if message else r"^train\.encoder: got 'smal', but there is none"
    with pytest.raises(ConfigError, match=pattern):
        run_pipeline(tmp_path / "output", tables(pictures, **changed), **options)
    assert not (tmp_path / "output").exists()


def test_an_output_directory_of_others(pictures, tmp_path, monkeypatch):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "mine.npy").write_text("mine")
    with pytest.raises(ConfigError, match=exactly(
        f"{tmp_path / 'features'}: is there already, and not of a pipeline; name another directory"
    )):  # fmt: skip
        run_pipeline(tmp_path, tables(pictures))
    (tmp_path / "pipeline.json").write_text('{"steps": 3}')
    with pytest.raises(ConfigError, match=exactly(
        f"{tmp_path / 'pipeline.json'}: is not what a pipeline has written"
    )):  # fmt: skip
        run_pipeline(tmp_path, tables(pictures))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "pipeline.json"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of several processes, which work together only"):
        run_pipeline(tmp_path / "new", tables(pictures))


def test_the_page_has_every_encoder_and_the_clusters(output, pictures, monkeypatch):
    monkeypatch.setattr(report, "write", WRITE)
    run_pipeline(output, tables(pictures), begin_at="report")
    page = (output / "report.html").read_text()
    sections = re.findall(r'<section id="(\w+)"', page)
    assert {"results", "training", "queries", "clusters", "map", "about"} <= set(sections)
    figures = json.loads((output / "evaluation" / "figures.json").read_text())
    for key, name in table.ENCODERS.items():
        assert f"<bdi>{name}</bdi>" in page
        for result in figures[key]:
            assert f"{result['recall']['1']:.3f}<small>" in page


# ---- kills ---------------------------------------------------------------------------------------


EVERY = 13


class Killed(BaseException):
    """Not an Exception: nothing on the way may mend it."""


def killed_at(number: int, output: Path, settings) -> bool:
    """Run, and end the program at this call of those that put something in its place; whether there
    was such a call."""
    calls = []

    def killing(real):
        def kill(*arguments, **options):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return real(*arguments, **options)

        return kill

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((os, "replace"), (os, "rename"), (Path, "rename"), (shutil, "rmtree")):
            patch.setattr(place, name, killing(getattr(place, name)))
        try:
            run_pipeline(output, settings)
        except BaseException:  # torch's checkpoints wrap whatever it is
            if len(calls) < number:
                raise
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, {"m2": 0.2}])
def test_a_killed_pipeline_goes_on(right, pictures, tmp_path, before):
    """Whatever it was about to write, rename or remove, also over a pipeline of other settings.

    Some of these places: all of them would take a minute.
    """
    settings, there = tables(pictures), tmp_path / "there"
    number = EVERY if before else 1
    if before is not None:
        run_pipeline(there, tables(pictures, cluster={"clusters": 4}, train=before))
    while True:
        output = tmp_path / "output"
        shutil.rmtree(output, ignore_errors=True)
        if before is not None:
            shutil.copytree(there, output)
        again = copy.deepcopy(settings)
        if not killed_at(number, output, again):
            break
        run_pipeline(output, again)
        assert_same_bits(results(output), right)
        number += EVERY
    assert number > 30


def command_killed_in(name, arguments):
    """The command, which gets SIGKILL as this step puts its second file in its place."""
    (step,) = (step for step in steps.STEPS if step.name == name)
    work, replace, calls = step.run, os.replace, []

    def killing(*paths):
        calls.append(paths)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    def run(self, console, ranks):
        os.replace = killing
        work(self, console, ranks)

    step.run = run
    main(arguments)


@pytest.mark.slow
def test_a_pipeline_that_gets_sigkill_in_each_step_goes_on(right, pictures, tmp_path):
    """And is moved to another place each time."""
    settings = PipelineConfig.from_mapping(tables(pictures)).to_toml()
    (tmp_path / "settings.toml").write_text(settings)
    output = tmp_path / "output"
    config = f"--config={tmp_path / 'settings.toml'}"
    command = [sys.executable, "-u", "-m", "unicom_ext", "pipeline", config, f"--output={output}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("extract: ")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for step in ("extract", "cluster", "train", "finetune", "evaluate"):
        output = output.rename(tmp_path / f"before {step}")
        arguments = ["pipeline", config, f"--output={output}"]
        killed = Process(tmp_path / f"{step}.txt", command_killed_in, step, arguments)
        assert killed.end() == -signal.SIGKILL, killed.text()
        assert f"\n{step}: " in f"\n{killed.text()}"
        recorded = json.loads((output / "pipeline.json").read_text())["steps"]
        assert "result" not in recorded.get(step, {})
    output = output.rename(tmp_path / "at last")
    result = CliRunner().invoke(main, ["pipeline", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "pseudo-classes (zero-shot)" in result.output
    assert_same_bits(results(output), right)


def test_the_command_names_the_table_of_a_setting(tmp_path):
    (tmp_path / "bad.toml").write_text("[trian]\n")
    result = CliRunner().invoke(main, ["pipeline", "--config", str(tmp_path / "bad.toml")])
    assert result.exit_code == 2
    assert "trian: no such table; did you mean train?" in result.output
