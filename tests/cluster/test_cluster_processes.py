"""Clustering on several processes, and by processes that are killed."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from rich.console import Console
from support.clusters import ROWS, SIZES, make_dump
from support.processes import Process, fork, status
from support.ranks import free_port

from unicom_ext.cli.main import main
from unicom_ext.cluster import ClusterConfig, cluster, pictures, pruning
from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.data.source import Source


def config(**settings):
    defaults = {"clusters": 25, "passes": 5, "tolerance": 0.0, "joint": "concat"}
    return ClusterConfig(**{**defaults, **settings})


def run(folder, output, settings, console=None, **options):
    pictures.draw = lambda *arguments: []  # which takes longer than all the rest
    console = console or Console(quiet=True)
    return cluster(settings, folder / "dump", folder / output, console=console, **options)


def printed_by(work, folder, *arguments) -> str:
    """What `work(folder, *arguments)` prints, in a process that may fork."""
    process = Process(folder / "printed", work, folder, *arguments)
    assert process.end() == 0, process.text()
    assert "FutureWarning" not in process.text()
    return process.text()


def load(output: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    labels = np.concatenate([np.load(output / f"labels_{name}.npy") for name in SIZES])
    result = json.loads((output / "clusters.json").read_text())
    return labels, np.load(output / "centroids.npy"), result


CASES = {
    "lloyd": {"early_passes": 1, "merge_above": 0.9},
    "two-level": {"method": "two-level", "coarse": 4, "refine_passes": 1},
    "pruned": {"clusters": 520, "init": "random"},
    "two-level-pruned": {"clusters": 520, "method": "two-level", "coarse": 4, "refine_passes": 3},
}


def on_ranks(size, folder, output, settings):
    """The status of each."""

    def work(rank):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{output}.store", rank=rank, world_size=size
        )
        run(folder, output, settings)
        dist.barrier()

    pids = [fork(work, rank) for rank in range(size)]
    return [status(pid) for pid in pids]


def agreeing(folder):
    for name, settings in CASES.items():
        assert status(fork(run, folder, f"{name}-1", config(**settings))) == 0
        for size in (2, 4):
            assert on_ranks(size, folder, f"{name}-{size}", config(**settings)) == [0] * size
    assert on_ranks(3, folder, "minibatch-3", config(method="minibatch", batch_rows=90)) == [0] * 3
    # One process cannot read its rows: all of them end.
    read = Source.read

    def broken(self, shard, start, stop):
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error")
        return read(self, shard, start, stop)

    Source.read = broken
    assert on_ranks(2, folder, "broken", config()) == [1, 1]


@pytest.mark.slow
def test_one_two_and_four_processes_agree(tmp_path):
    make_dump(tmp_path / "dump")
    text = printed_by(agreeing, tmp_path)
    for name in CASES:
        labels, centroids, result = load(tmp_path / f"{name}-1")
        for size in (2, 4):
            other_labels, other_centroids, other = load(tmp_path / f"{name}-{size}")
            assert (other["passes"][-1]["products"] < 1) == ("pruned" in name)
            assert np.array_equal(labels, other_labels)
            assert np.array_equal(centroids, other_centroids)
            assert other["processes"] == size
            for fact in ("objective", "merged", "sha256"):
                assert other[fact] == result[fact]
            for a, b in zip(result["passes"], other["passes"], strict=True):
                for fact in ("rows", "changed", "objective"):
                    assert a[fact] == b[fact]
    assert load(tmp_path / "lloyd-1")[2]["merged"] > 0
    assert load(tmp_path / "minibatch-3")[2]["rows"]["clustered"] == ROWS
    # Each says what happened; the one that failed in its own words.
    assert "OSError: [Errno 5] Input/output error" in text
    assert "RankFailed: process 1 of 2 failed: OSError: [Errno 5]" in text


def command(rank, port, *arguments):
    os.environ.update(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    main([str(a) for a in arguments])


@pytest.mark.slow
def test_a_failure_of_the_first_is_one_line_on_each(tmp_path):
    """Only the first process writes; the other must not end in a traceback."""
    make_dump(tmp_path / "dump")
    (tmp_path / "file").write_text("")
    output, port = tmp_path / "file" / "out", free_port()
    arguments = ["cluster", tmp_path / "dump", "--clusters=5", "--output", output]
    processes = [
        Process(tmp_path / f"printed-{rank}", command, rank, port, *arguments) for rank in "01"
    ]
    for process in processes:
        assert process.end() == 1, process.text()
        assert "Error: " in process.text()
        assert "Not a directory" in process.text()
        assert "Traceback" not in process.text()


def kill_after(events):
    """Let this process get SIGKILL at the so many-th reading, writing, syncing or renaming."""

    def counting(function):
        def counted(*arguments, **options):
            nonlocal events
            events -= 1
            if events == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    for owner, name in ((Source, "read"), (LabelFiles, "write"), (pruning, "_write"),
                        (torch, "save"), (os, "fsync"), (os, "replace")):  # fmt: skip
        setattr(owner, name, counting(getattr(owner, name)))


def killed_and_resumed(folder, seed, settings):
    draw = random.Random(seed)
    settings = config(passes=8, **settings)
    # In one go, and with all products.
    assert status(fork(run, folder, "whole", replace(settings, prune=False))) == 0

    def work(resume, events):
        if events is not None:
            kill_after(events)
        run(folder, "killed", settings, resume=resume, overwrite=not resume)

    for events in (*(draw.randrange(1, 30) for _ in range(5)), None):
        resume = (folder / "killed" / "state" / "state.pt").exists()
        assert status(fork(work, resume, events)) == (-signal.SIGKILL if events else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {}),
        (1, {"method": "two-level", "coarse": 4}),
        (4, {"method": "two-level", "coarse": 4, "refine_passes": 4}),
        (2, {"method": "minibatch", "batch_rows": 64}),
        (3, {"early_passes": 4, "early_fraction": 0.5}),
        (5, {"clusters": 520, "init": "random"}),
        (6, {"clusters": 520, "method": "two-level", "coarse": 4, "refine_passes": 6}),
    ],
)
def test_killed_five_times(tmp_path, seed, settings):
    make_dump(tmp_path / "dump")
    printed_by(killed_and_resumed, tmp_path, seed, settings)
    whole, killed = load(tmp_path / "whole"), load(tmp_path / "killed")
    assert np.array_equal(whole[0], killed[0])
    assert np.array_equal(whole[1], killed[1])
    steady = ("pass", "kind", "rows", "objective", "changed", "empty")
    for a, b in zip(whole[2]["passes"], killed[2]["passes"], strict=True):
        assert {name: a[name] for name in steady} == {name: b[name] for name in steady}


def without_room(folder):
    run(folder, "out", config(passes=3))
    run(folder, "whole", config(passes=5))
    output = folder / "out"

    def files():
        return {p: p.read_bytes() for p in [*output.glob("*.*"), output / "state" / "state.pt"]}

    def work(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run(folder, "out", config(passes=5), resume=True)

    before = files()
    # No file may grow beyond a size, which fails as a full disk does: in the middle of a write.
    for limit in (200, 1000, len(before[output / "state" / "state.pt"]) - 100):
        assert status(fork(work, limit)) == 1
        assert files() == before
        assert not list(output.rglob("*.tmp"))
    run(folder, "out", config(passes=5), resume=True)


@pytest.mark.slow
def test_files_that_cannot_grow(tmp_path):
    make_dump(tmp_path / "dump")
    errors = [line for line in printed_by(without_room, tmp_path).splitlines() if "Error" in line]
    assert len(errors) == 3
    for error, file in zip(errors, ("labels_0000.npy", "labels_0000.npy", "state.pt"), strict=True):
        assert error.startswith("OSError: [Errno 27]")
        assert f"{file} cannot be written: File too large" in error
    whole, resumed = load(tmp_path / "whole"), load(tmp_path / "out")
    assert np.array_equal(whole[0], resumed[0])
    assert np.array_equal(whole[1], resumed[1])


def remembering_without_room(folder):
    settings = config(clusters=512, init="random", joint="image")
    run(folder, "whole", replace(settings, prune=False))
    # Labels and the state are smaller than what passes remember of all rows.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))
    run(folder, "out", settings, Console(width=200))


@pytest.mark.slow
def test_no_room_for_what_passes_remember(tmp_path):
    (tmp_path / "dump").mkdir()
    rng = np.random.default_rng(0)
    np.save(tmp_path / "dump" / "rows.npy", rng.standard_normal((20000, 12), np.float32))
    text = printed_by(remembering_without_room, tmp_path)
    assert text.count("No room to remember what passes have found ([Errno 27] File too large)") == 1
    whole, out = (json.loads((tmp_path / name / "clusters.json").read_text())
                  for name in ("whole", "out"))  # fmt: skip
    assert out["sha256"] == whole["sha256"]
    assert [facts["products"] for facts in out["passes"]] == [1.0] * 5


# ---- command line --------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_line(tmp_path, monkeypatch):
    from unicom_ext.cluster import pictures

    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # which the command sets, undone after the test
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])
    make_dump(tmp_path / "dump")
    arguments = ["cluster", tmp_path / "dump", "--output", tmp_path / "out", "--clusters=20"]
    result = invoke(*arguments, "--true-labels", tmp_path / "dump" / "true.npy", "--passes=3")
    assert result.exit_code == 0, result.output
    labels, _, facts = load(tmp_path / "out")
    assert len(labels) == ROWS
    assert "lloyd pass 3/3: objective" in result.output
    assert f"NMI {facts['quality']['nmi']:.4f}" in result.output
    again = invoke(*arguments, "--passes=3")
    assert again.exit_code == 1
    assert "--resume goes on" in again.output
    more = invoke(*arguments, "--passes=4", "--resume")
    assert more.exit_code == 0, more.output
    assert "Resuming after pass 3." in more.output
    for option, word in (("--joint=both", "joint"), ("--clusters=0", "clusters")):
        wrong = invoke(*arguments, option)
        assert wrong.exit_code == 2
        assert word in wrong.output
    missing = invoke("cluster", tmp_path / "nothing", "--output", tmp_path / "x", "--clusters=2")
    assert missing.exit_code == 1
    assert "nothing: is not there" in missing.output


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    from unicom_ext.cluster import driver

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(driver, "lloyd_pass", interrupted)
    make_dump(tmp_path / "dump")
    stopped = invoke("cluster", tmp_path / "dump", "--output", tmp_path / "out", "--clusters=5")
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output
    assert (tmp_path / "out" / "state" / "state.pt").exists()
