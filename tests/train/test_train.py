"""The training driver: settings, checkpoints, exact resumption, and the report."""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import time
import tomllib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.processes import Process, fork, status
from support.training import (
    DATA,
    PARTS,
    STEPS,
    TINY,
    apart_from_timing,
    assert_same_bits,
    run,
    saved,
    synthetic,
)

from unicom_ext import checkpoint
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.data import baselines
from unicom_ext.data.images import augment
from unicom_ext.data.images.augment import distort
from unicom_ext.data.images.batches import TrainingBatches, share
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.opening import Parts
from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.optim import RowAdamW
from unicom_ext.retrieval import evaluate
from unicom_ext.train import evaluation, report
from unicom_ext.train.config import BASELINES, Config
from unicom_ext.train.interrupt import Interrupted
from unicom_ext.train.trainer import Trainer, schedule
from unicom_ext.utils.files import write_atomically
from unicom_ext.utils.settings import ConfigError, read_toml


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output directory, metrics) of an uninterrupted run."""
    output = tmp_path_factory.mktemp("finished")
    return output, run(output)


@pytest.fixture
def no_report(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(report, "write", lambda *arguments: None)


# ---- training ------------------------------------------------------------------------------------


def test_learns(tmp_path, no_report):
    """On classes that it trains on; the demo is about classes that it does not."""
    config = dataclasses.replace(
        TINY, width=4, epochs=12, evaluate_every=0, feature_rate=1.0, augment=0.0
    )
    untrained = Trainer(config, DATA[0]).embed(DATA[0])
    before = evaluation.evaluate(untrained, None, [8])[0]["recall"]["1"]
    metrics = run(tmp_path, config=config, data=Parts(DATA[0], None, DATA[0], None))
    after = metrics["evaluations"][-1]["results"][-1]["recall"]["1"]
    assert np.mean(metrics["loss"][-7:]) < 0.6 * np.mean(metrics["loss"][:7])
    assert after > before + 0.5


@pytest.mark.slow
def test_learns_by_rows_that_were_sampled_and_resumes(tmp_path, no_report):
    config = dataclasses.replace(TINY, width=4, epochs=8, augment=0.0, prototype_update="rows")
    whole = run(tmp_path / "whole", config=config)
    assert np.mean(whole["loss"][-7:]) < 0.8 * np.mean(whole["loss"][:7])

    def stop(done):
        if done == 11:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", config=config, on_step=stop)
    parts = run(tmp_path / "parts", config=config, resume=True)
    assert apart_from_timing(parts) == apart_from_timing(whole)
    assert_same_bits(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert isinstance(Trainer(config, DATA[0]).optimizer, RowAdamW)


def test_metrics_file_is_complete(finished):
    output, metrics = finished
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["config"] == TINY.to_dict()
    assert metrics["step"] == metrics["steps"] == len(metrics["loss"]) == STEPS
    assert [e["epoch"] for e in metrics["evaluations"]] == [1, 2, 3]
    assert [[r["dim"] for r in e["results"]] for e in metrics["evaluations"]] == [[8], [8], [4, 8]]
    for result in metrics["evaluations"][-1]["results"]:
        assert 0 < result["recall"]["1"] <= result["recall"]["5"] <= result["recall"]["10"] <= 1
        assert 0 < result["map_at_r"] <= result["r_precision"] <= 1
        assert list(result["map_at_k"]) == list(result["recall"])
        assert result["map_at_k"]["1"] == result["recall"]["1"]
        counted = [result[f"num_{name}"] for name in ("queries", "excluded", "unlabelled")]
        assert counted == [72, 0, 0]
        assert result["num_distractors"] == 0
    assert metrics["data"]["train_classes"] == 20
    assert metrics["data"]["test_images"] == 72
    assert set(metrics["versions"]) == {"python", "unicom_ext", "torch", "numpy"}
    assert metrics["seconds"]["training"] > 0


def test_config_file_reproduces_the_run(finished, tmp_path, no_report):
    output, metrics = finished
    config = Config.from_mapping(read_toml(output / "config.toml"))
    assert config == TINY
    again = run(tmp_path, config=config)
    assert apart_from_timing(again) == apart_from_timing(metrics)


def test_seed_decides_the_run(finished, tmp_path, no_report):
    other = run(tmp_path, config=dataclasses.replace(TINY, seed=1))
    assert other["loss"] != finished[1]["loss"]


def test_does_not_touch_the_global_random_state(tmp_path, no_report):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    run(tmp_path, config=dataclasses.replace(TINY, epochs=1))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(16, [16] * 7 + [8]), (17, [17] * 6 + [18]), (20, [20] * 6), (59, [59, 59, 2]), (500, [120])],
)
def test_one_epoch_visits_each_image_once(batch_size, sizes):
    batches_of = TrainingBatches(DATA[0], Preprocessing(32, "L", (0.0,), (1.0,)), batch_size, 0)
    count = batches_of.steps_per_epoch
    epochs = []
    for epoch in range(2):
        batches = [batch for i in range(count) for batch in batches_of[epoch * count + i]]
        assert [len(batch.indices) for batch in batches] == sizes
        assert all(len(batch.images) == len(batch.indices) for batch in batches)
        epochs.append(torch.cat([batch.indices for batch in batches]).tolist())
    assert all(sorted(rows) == list(range(120)) for rows in epochs)
    assert epochs[0] != epochs[1]
    assert [batches_of.images_before(i) for i in range(count + 1)] == [
        *(i * batches_of.batch_size for i in range(count)), 120,
    ]  # fmt: skip


@given(size=st.integers(2, 300), world_size=st.integers(1, 40))
def test_shares_of_a_batch(size, world_size):
    parts = [share(size, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([torch.arange(size)[p] for p in parts]), torch.arange(size))
    sizes = [p.stop - p.start for p in parts]
    used = [n for n in sizes if n]
    assert sizes == used + [0] * (world_size - len(used))
    assert min(used) >= 2
    assert max(used) - min(used) <= 1


def test_schedule_rises_then_falls_to_zero():
    factors = [schedule(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[0] > 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[99] < 1e-3
    assert schedule(0, 100, 0.0) == 1


def test_distortion_depends_on_the_generator_alone_and_stays_in_range():
    images = torch.from_numpy(DATA[0].pictures.images[:9, None]).float() / 255
    first, again, other = (distort(images, 1.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    assert torch.equal(distort(images, 0.0, np.random.default_rng(3)), images)


@pytest.mark.parametrize("shape", [(7, 1, 32, 32), (5, 3, 9, 16), (2, 1, 1, 1)])
def test_strokes_grow_and_shrink_by_the_pixels_around(shape, monkeypatch):
    def pooled(images):
        return F.max_pool2d(images, 3, stride=1, padding=1)

    images = torch.rand(shape)
    for laid_out in (images, images.contiguous(memory_format=torch.channels_last)):
        found = distort(laid_out, 1.0, np.random.default_rng(3))
        with monkeypatch.context() as patch:
            patch.setattr(augment, "_brightest", pooled)
            assert torch.equal(found, distort(laid_out, 1.0, np.random.default_rng(3)))


def test_more_batch_than_images(tmp_path, no_report):
    metrics = run(tmp_path, config=dataclasses.replace(TINY, batch_size=1000, epochs=2))
    assert metrics["steps"] == 2


@pytest.mark.slow
def test_baselines_are_evaluated_beside_the_model(tmp_path, no_report):
    assert list(BASELINES) == list(baselines.BASELINES)
    names = ("raw pixels", "LDA")
    metrics = run(tmp_path, config=dataclasses.replace(TINY, baselines=names, epochs=1))
    assert tuple(metrics["baselines"]) == names
    train_set, test_set = DATA
    for name in names:
        embeddings = baselines.BASELINES[name](
            train_set.pictures.images, train_set.labels, test_set.pictures.images, 8
        )
        expected = evaluate(embeddings, torch.from_numpy(test_set.labels), dims=[4, 8])
        found = metrics["baselines"][name]
        assert [r["dim"] for r in found] == [4, 8]
        assert [r["recall"]["5"] for r in found] == [r.recall[5] for r in expected]


def test_impossible_baselines_are_refused(tmp_path):
    config = dataclasses.replace(
        TINY, embedding_size=64, dims=(64,), baselines=("LDA",), feature_rate=1.0
    )
    with pytest.raises(ConfigError, match=r"baselines: LDA is not possible here: .* classes"):
        run(tmp_path, config=config)
    assert not (tmp_path / "checkpoints").exists()


# ---- interruption and resumption -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGINT),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((7, signal.SIGTERM), (10, signal.SIGINT), (STEPS - 1, signal.SIGTERM))
        ),
    ],
)
def test_resumed_after_a_signal_is_bit_identical(finished, tmp_path, step, number, no_report):
    def stop(done):
        if done == step:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, on_step=stop)
    assert caught.value.step == step
    assert signal.getsignal(number) is handler
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == step
    metrics = run(tmp_path, resume=True)
    assert apart_from_timing(metrics) == apart_from_timing(finished[1])
    assert_same_bits(saved(tmp_path), saved(finished[0]))


def test_resumed_after_a_crash_is_bit_identical(finished, tmp_path, no_report):
    """Steps after the last checkpoint are lost, and come again the same."""

    def crash(done):
        if done in crashes:
            crashes.remove(done)
            raise MemoryError

    crashes = {6, 15}
    with pytest.raises(MemoryError):
        run(tmp_path, on_step=crash)
    assert saved(tmp_path)["about"]["extra"]["step"] == 4
    with pytest.raises(MemoryError):
        run(tmp_path, resume=True, on_step=crash)
    metrics = run(tmp_path, resume=True)
    assert apart_from_timing(metrics) == apart_from_timing(finished[1])
    assert_same_bits(saved(tmp_path), saved(finished[0]))


def test_second_signal_is_not_caught(tmp_path):
    def stop(done):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # What a terminal gives; a process started in the background may have inherited "ignore".
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, on_step=stop)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_resuming_a_finished_run_trains_no_more(finished, tmp_path):
    shutil.copy(finished[0] / "config.toml", tmp_path)
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    steps = []
    metrics = run(tmp_path, resume=True, on_step=steps.append)
    assert steps == []
    assert apart_from_timing(metrics) == apart_from_timing(finished[1])
    assert (tmp_path / "report.html").exists()


def test_resume_refuses_another_config(finished):
    with pytest.raises(CheckpointError, match=r"scale: 8\.0 here, 32\.0 there; epochs: 4"):
        run(finished[0], config=dataclasses.replace(TINY, epochs=4, scale=8.0), resume=True)


def test_resumed_with_settings_that_do_not_change_the_model(finished, tmp_path, no_report):
    def stop(done):
        if done == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, on_step=stop)
    changed = dataclasses.replace(TINY, workers=0, checkpoint_every=5)
    assert run(tmp_path, config=changed, resume=True)["loss"] == finished[1]["loss"]


def test_resume_refuses_other_data(finished):
    with pytest.raises(CheckpointError, match="other data"):
        run(finished[0], data=Parts(DATA[0], None, synthetic(12, seed=3), None), resume=True)


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_does_not_overwrite_unasked(finished, tmp_path, no_report):
    with pytest.raises(CheckpointError, match="there already"):
        run(finished[0])
    one_epoch = dataclasses.replace(TINY, epochs=1)
    run(tmp_path, config=one_epoch)
    assert run(tmp_path, config=TINY, overwrite=True)["steps"] == STEPS


@pytest.mark.parametrize(
    "name", ["metrics.json", "report.html", "config.toml", "best.pt", "unreadable.txt"]
)
def test_files_of_the_user_are_not_overwritten_unasked(tmp_path, name, no_report):
    (tmp_path / name).write_text("mine = 1")
    with pytest.raises(CheckpointError, match=rf"{name}: is there already; overwrite it"):
        run(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine = 1")]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, no_report):
    (tmp_path / "config.toml").write_text(TINY.to_toml())
    (tmp_path / "best.pt").write_text("of the best step before it was killed")
    assert run(tmp_path)["steps"] == STEPS
    assert not (tmp_path / "best.pt").exists()


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path, no_report):
    one_epoch = dataclasses.replace(TINY, epochs=1)
    run(tmp_path, config=one_epoch)
    earlier = checkpoint.latest(tmp_path / "checkpoints")
    mine = ["notes.txt", "checkpoints/step-best/weights.pt", "checkpoints/step-1.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoints" / "step-4.tmp").mkdir()  # as a killed writer leaves one
    run(tmp_path, overwrite=True)
    assert not earlier.exists()
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {f"step-{STEPS}", "step-best", "step-1.txt"}
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(7, np.int64), "holds int64 [7], must be integers [120], one for each row"),
        (np.full(120, -1), "holds negative labels only"),
        (np.full(120, 2**63, np.uint64), "row 0 has the label 9223372036854775808, must be below"),
    ],
)
def test_overwriting_with_bad_labels_changes_nothing(finished, tmp_path, labels, message):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    np.save(tmp_path / "labels.npy", labels)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    config = dataclasses.replace(TINY, labels=str(tmp_path / "labels.npy"))
    with pytest.raises(ConfigError) as caught:
        run(output, config=config, overwrite=True)
    assert f"labels: {tmp_path / 'labels.npy'}: " in str(caught.value)
    assert message in str(caught.value)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_overwriting_with_baselines_that_are_not_possible_changes_nothing(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    config = dataclasses.replace(TINY, embedding_size=4096, dims=(4096,), baselines=("raw pixels",))
    with pytest.raises(ConfigError, match="baselines: raw pixels is not possible here: dim: got"):
        run(output, config=config, overwrite=True)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_output_is_readable_where_there_is_no_terminal(tmp_path, no_report):
    text = io.StringIO()
    run(tmp_path, text=text)
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    assert "\r" not in text.getvalue()
    assert len(lines) < 40
    assert re.fullmatch(
        rf"step {STEPS}/{STEPS}  loss \d+\.\d+  [\d,]+ images/s \(\d+% of the time waiting\)  "
        r"0:00:00 left",
        lines[-2].strip(),
    )
    assert sum("Recall@1" in line for line in lines) == 3


# ---- checkpoints ---------------------------------------------------------------------------------


def writers_are_killed(root):
    """One after the other, each at some moment of its saving without end."""
    draw = random.Random(0)

    def write_on(n):
        module = torch.nn.Linear(300, 1000)
        while True:
            n += 1
            module.weight.data.fill_(n)
            checkpoint.save(root / f"step-{n}", modules={"m": module}, extra={"n": n})

    def read(n):
        module = torch.nn.Linear(300, 1000)
        extra = checkpoint.load(root / f"step-{n}", modules={"m": module})
        assert extra["n"] == n
        assert (module.weight == n).all()

    def newest():
        path = checkpoint.latest(root)
        return 0 if path is None else int(path.name[5:])

    for _ in range(6):
        n = newest()
        child = fork(write_on, n)
        while newest() == n:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL
        assert status(fork(read, newest())) == 0


@pytest.mark.slow
def test_killed_writers_leave_a_whole_checkpoint(tmp_path):
    process = Process(tmp_path / "printed", writers_are_killed, tmp_path / "checkpoints")
    assert process.end() == 0, process.text()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failure_at_any_moment_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"one"))

    def fail(*arguments):
        raise OSError("no space left on device")

    def write(file):
        file.write(b"half a")
        if moment == "write":
            fail()

    with monkeypatch.context() as patch:
        if moment != "write":
            patch.setattr(os, moment, fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(path, write)
    assert path.read_bytes() == b"one"
    write_atomically(path, lambda file: file.write(b"three"))
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_said(tmp_path, no_report):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    name = re.escape(f"{tmp_path}/checkpoints/step-4.tmp")

    def fill(done):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=rf"^{name}: cannot be written: File too large$"):
            run(tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *p: (calls.append("replace"), replace(*p)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"1"))
    assert calls == ["fsync", "replace", "fsync"]


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    other = torch.nn.Linear(2, 2)
    checkpoint.save(tmp_path / "checkpoints" / "step-1", modules={"m": other})
    with pytest.raises(CheckpointError, match="is not a checkpoint of this driver"):
        run(tmp_path, resume=True)


# ---- report --------------------------------------------------------------------------------------


def test_report_is_complete(finished):
    output, metrics = finished
    page = (output / "report.html").read_text()
    for result in metrics["evaluations"][-1]["results"]:
        assert f">{result['recall']['1']:.3f}<small>" in page
        for figure in (result["map_at_r"], result["r_precision"], result["map_at_k"]["10"]):
            assert f"<td>{figure:.4f}<small>" in page
    assert '<th scope="col">R-precision</th><th scope="col">mAP@1</th>' in page
    assert "<bdi>our model</bdi>" in page
    assert re.findall(r'<section id="(\w+)"', page) == [
        "results", "training", "queries", "confusions", "map", "examples", "about"
    ]  # fmt: skip
    assert "120 images of 20 characters" in page
    assert "of 72 images of 12 characters that it was not trained on" in page
    assert "feature_rate" in page
    assert f"threads {torch.get_num_threads()}, device cpu" in page
    assert "{{" not in page


def test_report_of_a_run_of_before(finished, tmp_path):
    """Whose results have no other figures than Recall@K and mAP@R, and which knew no validation,
    no layouts of pictures, and nothing of its machine."""
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    for evaluation_ in metrics["evaluations"]:
        del evaluation_["part"]
        evaluation_["results"] = [
            {name: result[name] for name in ("dim", "recall", "map_at_r")}
            for result in evaluation_["results"]
        ]
    for name in ("best", "stopped_early", "unreadable", "machine"):
        del metrics[name]
    del metrics["seconds"]["waiting"], metrics["config"]["data"]
    embeddings = torch.randn(len(DATA[1]), 8, generator=torch.Generator().manual_seed(0))
    report.write(tmp_path, metrics, DATA[0], Embedded(embeddings, DATA[1]), None)
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="col">mAP@R</th></tr>' in page
    assert "images a second." in page
    assert "waiting" not in page
    assert report.table(metrics).title == "Recall@1 on unseen characters"


def test_report_of_a_run_without_a_test(tmp_path):
    config = dataclasses.replace(TINY, epochs=1)
    metrics = run(tmp_path, config=config, data=dataclasses.replace(PARTS, query=None))
    assert metrics["evaluations"] == []
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["training", "examples", "about"]
    assert "<h1>A training on 20 characters</h1>" in page
    assert "PATTERN 7" in page


def test_report_of_a_run_with_validation_alone(tmp_path):
    parts = dataclasses.replace(PARTS, query=None, validation=DATA[1])
    metrics = run(tmp_path, config=dataclasses.replace(TINY, epochs=2), data=parts)
    recall = metrics["evaluations"][-1]["results"][-1]["recall"]["1"]
    page = (tmp_path / "report.html").read_text()
    assert f"<strong>{100 * recall:.1f}&nbsp;%</strong>" in page
    assert "of 72 images of 12 characters that it was not trained on" in page
    assert "<bdi>validation characters</bdi>" in page
    assert report.table(metrics).caption.startswith("72 images of 12 characters")


def test_page_has_intervals_where_there_are_some(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    metrics["evaluations"][-1]["results"][-1]["intervals"] = {"Recall@1": [0.25, 0.75]}
    headline = report.page(metrics, DATA[0], None, None).headline
    assert headline.interval == (0.25, 0.75)
    assert headline.share == metrics["evaluations"][-1]["results"][-1]["recall"]["1"]


def test_report_without_a_wrong_answer(finished, tmp_path):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    embeddings = torch.nn.functional.one_hot(torch.from_numpy(DATA[1].labels)).float()
    report.write(tmp_path, metrics, DATA[0], Embedded(embeddings, DATA[1]), None)
    page = (tmp_path / "report.html").read_text()
    assert '<section id="queries"' in page
    assert '<section id="confusions"' not in page


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "whole number >= 1"),
        ("epochs", 2.5, "whole number >= 1"),
        ("epochs", "3", "whole number >= 1"),
        ("epochs", True, "whole number >= 1"),
        ("batch_size", 1, ">= 2"),
        ("scale", 0.0, "> 0"),
        ("scale", float("nan"), "finite number > 0"),
        ("learning_rate", float("inf"), "finite"),
        ("sample_rate", 1.5, r"\[0, 1\]"),
        ("feature_rate", 0.0, r"\(0, 1\]"),
        ("feature_rate", 0.001, "at least 0.0039"),
        ("test_fraction", 1.0, r"\(0, 1\)"),
        ("m2", -0.1, ">= 0"),
        ("warmup", 1.0, r"\[0, 1\)"),
        ("precision", "fp8", "auto or fp32"),
        ("dims", [], "increasing"),
        ("dims", [32, 16], "increasing"),
        ("dims", [16, 256], "embedding_size, which is 128"),
        ("baselines", ["pca"], r"raw pixels, HOG, LDA, HOG \+ LDA"),
        ("seed", -1, "2\\^32"),
    ],
)
def test_bad_settings_name_the_field_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError, match=allowed) as caught:
        Config.from_mapping({name: value})
    assert str(caught.value).startswith(f"{name}: got ")
    assert repr(value) in str(caught.value)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="batchsize: no such setting; did you mean batch_size"):
        Config.from_mapping({"batchsize": 3})


def test_config_survives_toml():
    assert Config.from_mapping(tomllib.loads(TINY.to_toml())) == TINY
    assert Config.from_mapping(tomllib.loads(Config().to_toml())) == Config()
    assert Config.from_mapping({"scale": 64, "dims": [8]}) == Config(scale=64.0, dims=(8,))


def test_demo_file_is_the_default():
    demo = importlib.resources.files("unicom_ext.train") / "demo.toml"
    assert Config.from_mapping(tomllib.loads(demo.read_text())) == Config()


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        read_toml(tmp_path / "bad.toml")


def test_classes_may_have_several_centers():
    trainer = Trainer(dataclasses.replace(TINY, num_centers=3), DATA[0])
    assert trainer.loss.num_centers == 3
    assert trainer.loss.weight.shape == (3 * DATA[0].num_classes, 8)
    assert np.isfinite(trainer.step_once())
    with pytest.raises(ConfigError, match=r"^num_centers: got 17, must be a whole number from"):
        dataclasses.replace(TINY, num_centers=17)
