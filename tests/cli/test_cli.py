"""The command line `unicom-ext`."""

from __future__ import annotations

import dataclasses
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
from support.training import PARTS

import unicom_ext
from unicom_ext import retrieval
from unicom_ext.cli import bench, common, doctor
from unicom_ext.cli.main import main
from unicom_ext.ops import library

TINY = [
    "--embedding-size=8", "--width=2", "--epochs=2", "--batch-size=32", "--dims=4,8",
    "--baselines=raw pixels,LDA", "--evaluate-every=0", "--threads=1",
]  # fmt: skip


@pytest.fixture
def tiny_glyphs(monkeypatch):
    """Some of the real pipeline's data, without drawing it."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # which `train` sets, undone after the test
    monkeypatch.setattr("unicom_ext.train.run.opened", lambda *arguments: PARTS)


@pytest.fixture
def no_report(monkeypatch):
    """Drawing takes longer than training here."""
    from unicom_ext.train import report

    monkeypatch.setattr(report, "write", lambda *arguments: None)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run(*arguments, **options):
    """`python -m unicom_ext.cli` in a process of its own."""
    command = [sys.executable, "-m", "unicom_ext.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_help_names_the_commands_and_is_not_heavy():
    result = run("--help")
    assert result.returncode == 0, result.stderr
    for command in (
        "train", "pipeline", "cluster", "extract", "evaluate", "probe", "export", "report",
        "import", "checkpoint", "bench", "doctor",
    ):  # fmt: skip
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)
    heavy = "import sys, unicom_ext.cli.main; print([m for m in %r if m in sys.modules])"
    modules = ["torch", "numpy", "matplotlib", "rich"]
    loaded = subprocess.run([sys.executable, "-c", heavy % modules], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"


# ---- train ---------------------------------------------------------------------------------------


def test_train_prints_a_table_and_writes_its_files(tmp_path, tiny_glyphs):
    output = tmp_path / "deep" / "run"
    result = invoke("train", "--output", output, *TINY)
    assert result.exit_code == 0, result.output
    names = {"config.toml", "checkpoints", "metrics.json", "report.html"}
    assert {path.name for path in output.iterdir()} == names
    metrics = json.loads((output / "metrics.json").read_text())
    rows = {**metrics["baselines"], "our model": metrics["evaluations"][-1]["results"]}
    assert list(rows) == ["raw pixels", "LDA", "our model"]
    for name, results in rows.items():
        figures = " *│ *".join(f"{r['recall']['1']:.3f}" for r in results)
        assert re.search(rf"{re.escape(name)} *│ *{figures}", result.output), result.output
    assert "report.html" in result.output


def test_train_without_a_test(tmp_path, tiny_glyphs, monkeypatch):
    """There is a page, but no table."""
    parts = dataclasses.replace(PARTS, query=None)
    monkeypatch.setattr("unicom_ext.train.run.opened", lambda *arguments: parts)
    result = invoke("train", "--output", tmp_path, *TINY, "--epochs=1")
    assert result.exit_code == 0, result.output
    assert "Recall@1" not in result.output
    assert (tmp_path / "report.html").exists()
    assert str(tmp_path / "report.html") in result.output


def test_settings_come_from_the_file_and_then_the_options(tmp_path, tiny_glyphs, no_report):
    (tmp_path / "my.toml").write_text('scale = 16\nseed = 7\nbaselines = []\nprecision = "fp32"')
    arguments = ["train", "--output", tmp_path / "run", "--config", tmp_path / "my.toml"]
    options = [option for option in TINY if "baselines" not in option]
    result = invoke(*arguments, *options, "--seed=8")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert (config["scale"], config["seed"], config["dims"]) == (16.0, 8, [4, 8])
    assert config["baselines"] == []


def test_ctrl_c_says_how_to_resume(tmp_path, tiny_glyphs, no_report, monkeypatch):
    from unicom_ext.train.trainer import Trainer

    step_once = Trainer.step_once

    def interrupted_step(trainer):
        loss = step_once(trainer)
        if trainer.step == 4:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_once", interrupted_step)
        stopped = invoke("train", "--output", tmp_path, *TINY)
    assert stopped.exit_code == 130
    assert "Stopped after step 4 of 8" in stopped.output
    assert f" train --output {tmp_path} --resume" in stopped.output
    resumed = invoke("train", "--output", tmp_path, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Resuming after step 4 of 8" in resumed.output
    uninterrupted = invoke("train", "--output", tmp_path / "other", *TINY)
    assert uninterrupted.exit_code == 0
    ours, theirs = (
        json.loads((d / "metrics.json").read_text()) for d in (tmp_path, tmp_path / "other")
    )
    assert ours["loss"] == theirs["loss"]
    assert ours["evaluations"] == theirs["evaluations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs=0"], "epochs: got 0, must be a whole number >= 1"),
        (["--dims=16,x"], "dims: got '16,x', must be a comma-separated list"),
        (["--dims=16,256"], "dims: got [16, 256], must not go beyond embedding_size"),
        (["--baselines=SIFT"], "baselines: got ['SIFT'], must be auto, or some of raw pixels"),
        (["--config=nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--resume"], "there is no checkpoint"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, arguments, message):
    result = invoke("train", "--output", tmp_path / "run", *arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_as_the_user_says(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    common.spin_briefly()
    assert os.environ == expected


def test_what_is_loaded_is_not_collected_over_and_over():
    text = """
import gc
from unicom_ext.cli import common
try:
    with common.loading():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
        import no_such_module
except ModuleNotFoundError:
    assert gc.isenabled() and gc.get_freeze_count() > 1000
frozen = gc.get_freeze_count()
import sys
sys.modules["torch"] = sys
with common.loading():
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bench ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "name"), [([], "head_step"), (["parts"], "parts"), (["sweep"], "sweep")]
)
def test_bench_runs_the_script_of_the_checkout(first, name, tmp_path, monkeypatch, capfd):
    script = tmp_path / "benchmarks" / f"{name}.py"
    script.parent.mkdir()
    script.write_text("import sys; print('ran with', sys.argv[1:]); sys.exit(3)")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "unicom_ext" / "cli" / "bench.py"))
    result = invoke("bench", *first, "--classes", "100", "--help")
    assert result.exit_code == 3
    assert "ran with ['--classes', '100', '--help']" in capfd.readouterr().out


def test_bench_without_a_checkout_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "unicom_ext" / "cli" / "bench.py"))
    result = invoke("bench")
    assert result.exit_code == 1
    assert "Clone the source repository" in " ".join(result.output.split())


# ---- report --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_of_a_finished_training(tmp_path, tiny_glyphs):
    trained = invoke("train", "--output", tmp_path, *TINY)
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").read_text() == page
    table = trained.output[trained.output.index("Recall@1 on unseen") :]
    assert table in result.output


def test_report_of_a_training_that_is_not_finished(tmp_path, tiny_glyphs, no_report):
    invoke("train", "--output", tmp_path, *TINY)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "step": 3}))
    result = invoke("report", tmp_path)
    assert result.exit_code == 1
    assert "stands at step 3 of 8" in result.output
    assert f"train --output {tmp_path} --resume" in result.output


def test_report_of_a_directory_with_both(tmp_path, tiny_glyphs, no_report):
    np.save(tmp_path / "features.npy", np.eye(8, dtype=np.float32))
    command = ["cluster", tmp_path / "features.npy", "--clusters=4", "--passes=1", "--output"]
    assert invoke(*command, tmp_path / "run").exit_code == 0
    invoke("train", "--output", tmp_path / "run", *TINY)
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "4 clusters" in result.output
    assert "Recall@1 on unseen" in result.output


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "", "neither metrics.json"),
        ("clusters.json", "{", "cannot be read"),
        ("metrics.json", "{}", "cannot be read"),
        ("clusters.json", "[]", "clusters.json or metrics.json is not what `cluster` or `train`"),
        ("clusters.json", "null", "clusters.json or metrics.json is not what `cluster` or `train`"),
    ],
)
def test_report_of_something_else(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    result = invoke("report", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())


# ---- evaluate ------------------------------------------------------------------------------------


@pytest.fixture
def dump(tmp_path):
    """Features of both kinds in two shards, and labels; row 3 is not labelled."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40)
    labels[3] = -1
    for kind in ("img_emb", "text_emb"):
        (tmp_path / kind).mkdir()
        rows = (np.eye(6, 8)[labels] + 0.4 * rng.normal(size=(40, 8))).astype(np.float16)
        np.save(tmp_path / kind / f"{kind}_0000.npy", rows[:25])
        np.save(tmp_path / kind / f"{kind}_0001.npy", rows[25:])
    np.save(tmp_path / "labels.npy", labels)
    (tmp_path / "clusters").mkdir()
    np.save(tmp_path / "clusters" / "labels_0000.npy", labels[:25])
    np.save(tmp_path / "clusters" / "labels_0001.npy", labels[25:])
    return tmp_path


def rows_of(dump, kind="img_emb"):
    shards = [np.load(dump / kind / f"{kind}_{i:04d}.npy") for i in range(2)]
    return torch.from_numpy(np.concatenate(shards)).float()


@pytest.mark.parametrize("labels", ["labels.npy", "clusters"])
def test_evaluate_prints_and_writes_what_the_function_returns(dump, labels):
    output = dump / "figures.json"
    result = invoke(
        "evaluate", dump, "--labels", dump / labels, "--dims=4,8", "--recall-at=1,3",
        "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    known = torch.from_numpy(np.load(dump / "labels.npy"))
    right = retrieval.evaluate(rows_of(dump), known, dims=[4, 8], ks=[1, 3])
    assert 0.2 < right[0].recall[1] < right[1].recall[1] < 1
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == [
        "dimensions", "Recall@1", "Recall@3", "mAP@R", "R-precision", "mAP@1", "mAP@3"
    ]  # fmt: skip
    for line, r, saved in zip(lines[1:3], right, json.loads(output.read_text()), strict=True):
        figures = [*r.recall.values(), r.map_at_r, r.r_precision, *r.map_at_k.values()]
        assert line == [str(r.dim), *(f"{x:.4f}" for x in figures)]
        assert saved == json.loads(json.dumps(r._asdict()))
        assert (saved["num_queries"], saved["num_excluded"]) == (39, 0)
        assert (saved["num_unlabelled"], saved["num_distractors"]) == (1, 1)
    assert result.output.splitlines()[3:] == [
        "39 queries; 1 without a label left out; 1 in the gallery without a label, always wrong"
    ]


def test_evaluate_means_the_same_by_a_negative_label_as_the_function(dump):
    """Also in a gallery, and with groups."""
    rng = np.random.default_rng(1)
    known = torch.from_numpy(np.load(dump / "labels.npy"))
    among = torch.from_numpy(np.where(rng.random(40) < 0.6, -1, known.numpy()))
    cameras, theirs = (torch.from_numpy(rng.integers(-1, 3, 40)) for _ in range(2))
    arrays = {"among": among, "cameras": cameras, "theirs": theirs}
    for name, array in arrays.items():
        np.save(dump / f"{name}.npy", array)
    command = [
        "evaluate", dump, "--labels", dump / "labels.npy", "--gallery", dump,
        "--gallery-labels", dump / "among.npy", "--groups", dump / "cameras.npy",
        "--gallery-groups", dump / "theirs.npy", "--output", dump / "figures.json",
    ]  # fmt: skip
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    rows = rows_of(dump)
    with pytest.warns(UserWarning, match="find a row in it that is their own") as noticed:
        (right,) = retrieval.evaluate(
            rows, known, rows, among, query_groups=cameras, gallery_groups=theirs
        )
    assert right.num_unlabelled == 1
    assert right.num_distractors > 20
    assert json.loads((dump / "figures.json").read_text()) == [
        json.loads(json.dumps(right._asdict()))
    ]
    assert f"{right.num_distractors} in the gallery without a label, always wrong" in result.stdout
    assert result.stderr == f"Warning: {noticed[0].message}\n"


def test_evaluate_among_the_others_leaves_own_groups_out(dump):
    groups = np.arange(40) // 5
    np.save(dump / "groups.npy", groups)
    command = ["evaluate", dump, "--labels", dump / "labels.npy", "--groups", dump / "groups.npy"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    known = torch.from_numpy(np.load(dump / "labels.npy"))
    (right,) = retrieval.evaluate(rows_of(dump), known, query_groups=torch.from_numpy(groups))
    assert right.map_at_r != retrieval.evaluate(rows_of(dump), known)[0].map_at_r
    assert f"{right.map_at_r:.4f}" in result.stdout.split()


def test_evaluate_reads_other_columns(dump):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"emb": rows_of(dump).tolist()})
    parquet.write_table(table, dump / "all.parquet")
    parts = ["--labels", dump / "labels.npy"]
    right = invoke("evaluate", dump, *parts)
    result = invoke("evaluate", dump / "all.parquet", *parts, "--image-column=emb")
    assert result.exit_code == 0, result.output
    assert result.stdout == right.stdout
    assert "has no column 'image_embedding'" in invoke(
        "evaluate", dump / "all.parquet", *parts
    ).output.replace("\n", " ")


def test_evaluate_of_both_kinds_in_a_gallery(dump):
    parts = ["--labels", dump / "labels.npy", "--gallery", dump, "--gallery-labels"]
    result = invoke("evaluate", dump, *parts, dump / "clusters", "--joint=concat")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[1].split()[:2] == ["16", "1.0000"]  # finds itself


def test_evaluate_shows_intervals_and_codes(dump):
    output = dump / "figures.json"
    result = invoke(
        "evaluate", dump, "--labels", dump / "labels.npy", "--recall-at=1", "--codes=int8",
        "--bootstrap=200", "--bootstrap-over=queries", "--seed=4", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    known = torch.from_numpy(np.load(dump / "labels.npy"))
    (right,) = retrieval.evaluate(
        rows_of(dump), known, ks=[1], codes="int8", bootstrap=200, bootstrap_over="queries", seed=4
    )
    low, high = zip(*right.intervals.values(), strict=True)
    lines = result.output.splitlines()
    rows = [("8", right.figures.values()), ("2.5 %", low), ("97.5 %", high)]
    for line, (title, figures) in zip(lines[1:4], rows, strict=True):
        assert line.split() == [*title.split(), *(f"{x:.4f}" for x in figures)]
    assert lines[4].endswith("always wrong; by int8 codes")
    assert json.loads(output.read_text()) == [json.loads(json.dumps(right._asdict()))]


def test_evaluate_by_an_index(dump):
    pytest.importorskip("faiss")
    arguments = ["evaluate", dump, "--labels", dump / "labels.npy", "--recall-at=3"]
    right, found = invoke(*arguments), invoke(*arguments, "--index=faiss:Flat")
    assert found.exit_code == 0, found.output
    assert found.stdout == right.stdout.rstrip() + "; faiss:Flat finds 1.0000 of the 3 nearest\n"


def test_probe_prints_and_writes_what_the_functions_return(dump):
    output = dump / "probe.json"
    arguments = [
        "probe", dump, dump, "--labels", dump / "labels.npy", "--test-labels", dump / "clusters",
        "--dims=3,8", "--k=1,5", "--temperature=0.2", "--output", output,
    ]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    known = torch.from_numpy(np.load(dump / "labels.npy"))
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["dimensions", "1-NN", "5-NN", "linear", "L2", "penalty"]
    for line, dim, saved in zip(lines[1:3], (3, 8), json.loads(output.read_text()), strict=True):
        parts = [rows_of(dump)[:, :dim], known] * 2
        knn = retrieval.knn_accuracy(*parts, [1, 5], temperature=0.2)
        linear = retrieval.linear_probe(*parts)
        figures = [*knn.values(), linear.accuracy]
        assert line == [str(dim), *(f"{x:.4f}" for x in figures), f"{linear.l2:g}"]
        assert saved == {
            "dim": dim, "knn": {str(k): v for k, v in knn.items()}, "linear": linear.accuracy,
            "l2": linear.l2, "num_train": 39, "num_test": 39,
        }  # fmt: skip
    assert result.stdout.splitlines()[3] == "39 rows, by 39"
    assert invoke(*arguments).exit_code == 0  # its own figures may be written over
    retrieved = invoke("evaluate", dump, "--labels", dump / "labels.npy", "--output", output)
    assert "holds no figures of `evaluate`" in " ".join(retrieved.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels={}/labels.npy", "--test-labels=nowhere.npy"],
         "test_labels: nowhere.npy: cannot be read"),
        (["--labels={}/labels.npy", "--test-labels={}/labels.npy", "--k=0"],
         "k: got '0', must be a comma-separated list of whole numbers, each at least 1"),
        (["--labels={}/labels.npy", "--test-labels={}/labels.npy", "--dims=9"],
         "dims: got [9], must be a non-empty list of ints, each from 1 to 8"),
        (["--labels={}/labels.npy", "--test-labels={}/labels.npy", "--temperature=0"],
         "temperature: got 0.0, must be a finite number above 0"),
        (["--labels={}/labels.npy", "--test-labels={}/labels.npy", "--joint=text",
          "--output={}/labels.npy"], "must be named as a JSON file is, such as figures.json"),
    ],
)  # fmt: skip
def test_bad_input_of_probe(dump, arguments, message):
    result = invoke("probe", dump, dump, *(a.format(dump) for a in arguments))
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels={}/labels.npy", "--bootstrap=7"],
         "bootstrap: got 7, must be 0, for no intervals, or at least 100 resamples"),
        (["--labels=nowhere.npy"], "labels: nowhere.npy: cannot be read"),
        (["--labels={}/img_emb"], "there is no labels_*.npy"),
        (["--labels={}/img_emb/img_emb_0000.npy"], "must be integers [40], one for each row"),
        (["--labels={}/labels.npy", "--gallery={}"], "give both or neither"),
        (["--labels={}/labels.npy", "--gallery-groups={}/labels.npy"],
         "gallery_groups: was given without a gallery"),
        (["--labels={}/labels.npy", "--gallery={}", "--gallery-labels={}/labels.npy",
          "--groups={}/labels.npy"], "groups and gallery_groups: give both or neither"),
        (["--labels={}/labels.npy", "--groups={}/g.npy"], "groups: {}/g.npy: cannot be read"),
        (["--labels={}/labels.npy", "--dims=9"], "dims: got [9], must be"),
        (["--labels={}/labels.npy", "--dims=a"], "dims: got 'a', must be a comma-separated list"),
        (["--labels={}/labels.npy", "--recall-at=0"],
         "recall-at: got '0', must be a comma-separated list of whole numbers, each at least 1"),
        (["--labels={}/labels.npy", "--dims="], "dims: got '', must be a comma-separated list"),
        (["--labels={}/labels.npy", "--output={}/clusters.json"],
         "output: {}/clusters.json: is there already, and holds no figures of `evaluate`"),
        (["--labels={}/labels.npy", "--output={}/no/f.json"],
         "output: {}/no: there is no such directory"),
        (["--labels={}/labels.npy", "--output={}/labels.npy"],
         "output: {}/labels.npy: must be named as a JSON file is, such as figures.json"),
    ],
)  # fmt: skip
def test_bad_input_of_evaluate(dump, arguments, message):
    (dump / "clusters.json").write_text('{"clusters": 3}')
    before = {path: path.read_bytes() for path in dump.rglob("*.*")}
    result = invoke("evaluate", dump, *(a.format(dump) for a in arguments))
    assert {path: path.read_bytes() for path in dump.rglob("*.*")} == before
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message.format(dump) in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["features", "gallery"])
@pytest.mark.parametrize("joint", ["image", "concat"])
def test_a_row_that_is_not_finite_is_named_by_its_file(dump, name, joint):
    """Also where it has no label, as `cluster` gives it none."""
    (dump / "bad").mkdir()
    for kind in ("img_emb", "text_emb"):
        shutil.copytree(dump / kind, dump / "bad" / kind)
    file = dump / "bad/img_emb/img_emb_0001.npy"
    rows = np.load(file)
    rows[4] = np.inf
    np.save(file, rows)
    labels = np.load(dump / "labels.npy")
    labels[25 + 4] = -1
    np.save(dump / "labels.npy", labels)
    paths = {"features": dump, "gallery": dump, name: dump / "bad"}
    gallery = ["--gallery", paths["gallery"], "--gallery-labels", dump / "labels.npy"]
    result = invoke(
        "evaluate", paths["features"], "--labels", dump / "labels.npy", f"--joint={joint}", *gallery
    )
    assert result.exit_code == 1
    text = str(file) if joint == "image" else f"{file} and {dump}/bad/text_emb/text_emb_0001.npy"
    message = f"{name}: {text} must be finite, but row 4 is not"
    assert message in " ".join(result.output.split())


def test_help_lists_the_choices():
    text = invoke("cluster", "--help").output
    for choices in ("[image|text|average|concat]", "[unicom|faiss]", "[auto|cpu|cuda]"):
        assert choices in text
    assert "[dense|rows]" in invoke("train", "--help").output


# ---- doctor --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_when_all_is_well():
    import torch

    from unicom_ext import _engine

    result = run("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line[:16].strip(): line[16:] for line in result.stdout.splitlines()}
    assert lines["torch"] == torch.__version__
    assert lines["compiler"] == _engine.build_info()["compiler"]
    chosen, available = lines["cpu"].split("  of ")
    assert available.split(", ") == _engine.cpu_capabilities()
    assert chosen in _engine.cpu_capabilities()
    assert re.match(r"\d+ of \d+ CPUs", lines["threads"])
    assert "torch CUDA" in lines
    assert "nvcc" in lines
    assert lines["operators"] == "for the CPU" + " and CUDA" * library.HAS_CUDA


@pytest.fixture
def copy_of_the_package(tmp_path):
    """The Python files alone, as they are before the C++ parts are built."""
    source = Path(unicom_ext.__file__).parent
    shutil.copytree(source, tmp_path / "unicom_ext", ignore=shutil.ignore_patterns("*.so", "__py*"))
    return tmp_path


# An editable install finds missing modules of the copy in the checkout.
RUN_COPY = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
runpy.run_module("unicom_ext.cli", run_name="__main__", alter_sys=True)
"""


def run_copy(directory, *arguments):
    return subprocess.run(
        [sys.executable, "-c", RUN_COPY, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_doctor_without_the_compiled_modules(copy_of_the_package):
    result = run_copy(copy_of_the_package, "doctor")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "PROBLEM  libunicom.so has not been built" in result.stdout
    assert "PROBLEM  _C.so has not been built" in result.stdout
    assert "pip install --no-build-isolation" in result.stdout
    assert "threads" in result.stdout


@pytest.mark.slow
def test_doctor_with_modules_that_do_not_load(copy_of_the_package):
    for built in Path(unicom_ext.__file__).parent.glob("*.so"):
        (copy_of_the_package / "unicom_ext" / built.name).write_bytes(b"not a library")
    result = run_copy(copy_of_the_package, "doctor")
    assert result.returncode == 1, result.stderr
    assert "PROBLEM  libunicom.so does not load: OSError" in result.stdout
    assert "PROBLEM  _C.so does not load: OSError" in result.stdout
    assert "To mend it: pip install --no-build-isolation" in result.stdout


@pytest.mark.slow
def test_train_without_the_compiled_modules_points_to_the_doctor(copy_of_the_package):
    result = run_copy(copy_of_the_package, "train", "--output", "run")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "unicom-ext doctor" in result.stderr


def test_doctor_tells_of_a_cuda_compiler_that_does_not_run(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor._nvcc() == f"{nvcc}  Cuda compilation tools, release 13.0, V13.0.1"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert "does not run" in doctor._nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._nvcc() is None
