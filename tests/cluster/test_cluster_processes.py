"""Clustering on several processes, and by processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.clusters import ROWS, SIZES, make_dump
from support.ranks import free_port

from unicom_ext.cli.main import main

# Each case in children of a process in which everything is loaded; one thread, because no thread
# may have started before a fork.
COMMON = """
import os, random, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from rich.console import Console
from unicom_ext.cluster import ClusterConfig, cluster, pictures, pruning
from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.data.source import Source

torch.set_num_threads(1)
pictures.draw = lambda *arguments: []
folder = Path(sys.argv[1])

def config(**settings):
    defaults = {"clusters": 25, "passes": 5, "tolerance": 0.0, "joint": "concat"}
    return ClusterConfig(**{**defaults, **settings})

def run(output, settings, **options):
    console = Console(quiet=True)
    return cluster(settings, folder / "dump", folder / output, console=console, **options)

def child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return pid
"""

RANKS = (
    COMMON
    + """
def on(size, output, settings):
    def work(rank):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{output}.store", rank=rank, world_size=size
        )
        run(output, settings)
        dist.barrier()
    pids = [child(lambda rank=rank: work(rank)) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

cases = {
    "lloyd": {"early_passes": 1, "merge_above": 0.9},
    "two-level": {"method": "two-level", "coarse": 4, "refine_passes": 1},
    "pruned": {"clusters": 520, "init": "random"},
    "two-level-pruned": {"clusters": 520, "method": "two-level", "coarse": 4, "refine_passes": 3},
}
for name, more in cases.items():
    os.waitpid(child(lambda: run(f"{name}-1", config(**more))), 0)
    for size in (2, 4):
        assert on(size, f"{name}-{size}", config(**more)) == [0] * size
assert on(3, "minibatch-3", config(method="minibatch", batch_rows=90)) == [0, 0, 0]
# One process cannot read its rows: all of them end.
read = Source.read
def broken(self, shard, start, stop):
    if dist.get_rank() == 1:
        raise OSError(5, "Input/output error")
    return read(self, shard, start, stop)
Source.read = broken
assert on(2, "broken", config()) == [1, 1]
print("done")
"""
)

KILLED = (
    COMMON
    + """
random.seed(int(sys.argv[2]))
settings = config(passes=8, **eval(sys.argv[3]))
# In one go, and with all products.
os.waitpid(child(lambda: run("whole", replace(settings, prune=False))), 0)

def killed_after(events):
    # ... itself, at the so many-th reading, writing, syncing or renaming
    def counting(function):
        def counted(*arguments, **options):
            nonlocal events
            events -= 1
            if events == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return counted
    for owner, name in ((Source, "read"), (LabelFiles, "write"), (pruning, "_write"),
                        (torch, "save"), (os, "fsync"), (os, "replace")):
        setattr(owner, name, counting(getattr(owner, name)))

killed = 0
for attempt in range(6):
    resume = (folder / "killed" / "state" / "state.pt").exists()
    options = {"resume": resume, "overwrite": not resume}
    def work():
        if attempt < 5:
            killed_after(random.randrange(1, 30))
        run("killed", settings, **options)
    random.random()
    status = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
    killed += status == -signal.SIGKILL
assert status == 0
assert killed == 5
print("done")
"""
)

FULL = (
    COMMON
    + """
import resource

run("out", config(passes=3))
run("whole", config(passes=5))
output = folder / "out"
def files():
    return {p: p.read_bytes() for p in [*output.glob("*.*"), output / "state" / "state.pt"]}
before = files()
state_bytes = len(before[output / "state" / "state.pt"])

# No file may grow beyond a size, which fails as a full disk does: in the middle of a write.
for limit in (200, 1000, state_bytes - 100):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run("out", config(passes=5), resume=True)
    assert os.waitpid(child(work), 0)[1] != 0
    assert files() == before
    assert not list(output.rglob("*.tmp"))
run("out", config(passes=5), resume=True)
print("done")
"""
)


NO_ROOM = (
    COMMON
    + """
import numpy as np
import resource

(folder / "dump").mkdir()
rng = np.random.default_rng(0)
np.save(folder / "dump" / "rows.npy", rng.standard_normal((20000, 12), np.float32))
settings = config(clusters=512, init="random", joint="image")
run("whole", replace(settings, prune=False))
# Labels and the state are smaller than what passes remember of all rows.
def work():
    limit = 300 << 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cluster(settings, folder / "dump", folder / "out", console=Console(width=200))
assert os.waitpid(child(work), 0)[1] == 0
print("done")
"""
)


def python(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr
    return done.stdout


def load(output: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    labels = np.concatenate([np.load(output / f"labels_{name}.npy") for name in SIZES])
    result = json.loads((output / "clusters.json").read_text())
    return labels, np.load(output / "centroids.npy"), result


@pytest.mark.slow
def test_one_two_and_four_processes_agree(tmp_path):
    make_dump(tmp_path / "dump")
    text = python(RANKS, tmp_path)
    for name in ("lloyd", "two-level", "pruned", "two-level-pruned"):
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


@pytest.mark.slow
def test_a_failure_of_the_first_is_one_line_on_each(tmp_path):
    """Only the first process writes; the other must not end in a traceback."""
    make_dump(tmp_path / "dump")
    (tmp_path / "file").write_text("")
    command = [
        sys.executable, "-m", "unicom_ext.cli", "cluster", tmp_path / "dump", "--clusters=5",
        "--output", tmp_path / "file" / "out",
    ]  # fmt: skip
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    for process in processes:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 1, text
        assert "Error: " in text
        assert "Not a directory" in text
        assert "Traceback" not in text


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
    python(KILLED, tmp_path, seed, repr(settings))
    whole, killed = load(tmp_path / "whole"), load(tmp_path / "killed")
    assert np.array_equal(whole[0], killed[0])
    assert np.array_equal(whole[1], killed[1])
    steady = ("pass", "kind", "rows", "objective", "changed", "empty")
    for a, b in zip(whole[2]["passes"], killed[2]["passes"], strict=True):
        assert {name: a[name] for name in steady} == {name: b[name] for name in steady}


@pytest.mark.slow
def test_files_that_cannot_grow(tmp_path):
    make_dump(tmp_path / "dump")
    errors = [line for line in python(FULL, tmp_path).splitlines() if "Error" in line]
    assert len(errors) == 3
    for error, file in zip(errors, ("labels_0000.npy", "labels_0000.npy", "state.pt"), strict=True):
        assert error.startswith("OSError: [Errno 27]")
        assert f"{file} cannot be written: File too large" in error
    whole, resumed = load(tmp_path / "whole"), load(tmp_path / "out")
    assert np.array_equal(whole[0], resumed[0])
    assert np.array_equal(whole[1], resumed[1])


@pytest.mark.slow
def test_no_room_for_what_passes_remember(tmp_path):
    text = python(NO_ROOM, tmp_path)
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
