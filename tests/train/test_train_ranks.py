"""The driver on several ranks: the same training, and what happens when one rank fails."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import time
import traceback

import pytest
import torch.distributed as dist
from rich.console import Console
from support.processes import CONTEXT, begin
from support.ranks import free_port
from support.training import (
    DATA,
    FLAT,
    PARTS,
    TINY,
    apart_from_timing,
    assert_same_bits,
    run,
    saved,
    synthetic,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from unicom_ext import checkpoint
from unicom_ext.distributed import launch
from unicom_ext.train import report
from unicom_ext.train.interrupt import Interrupted
from unicom_ext.train.run import train
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.settings import ConfigError

# Batches of 23 do not divide by the ranks, and the last of an epoch, of 5 images, leaves some of
# three ranks without any. Each rank's batch normalisation sees its own part alone, so the models of
# different numbers of ranks are not the same.
CONFIG = dataclasses.replace(TINY, batch_size=23, epochs=2)
STEPS = 2 * 6


def train_together(group, output, options, stop_at=None):
    report.write = lambda *arguments: None  # drawing takes longer than training
    rank = dist.get_rank(group)
    text = io.StringIO()

    def on_step(step):
        if step == stop_at and rank == 1:  # a signal reaches one rank first
            signal.raise_signal(signal.SIGTERM)

    try:
        metrics = train(
            CONFIG, output, data=PARTS, console=Console(file=text, width=120), group=group,
            on_step=on_step, **options,
        )  # fmt: skip
    except Interrupted as stop:
        return f"interrupted after {stop.step}", text.getvalue()
    return metrics, text.getvalue()


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """(output directory, metrics) of an uninterrupted run on three ranks."""
    output = tmp_path_factory.mktemp("finished")
    (metrics, text), *others = ranks.run(3, train_together, output, {})
    assert f"step {STEPS}/{STEPS}" in text
    assert [text for _, text in others] == ["", ""]  # rank 0 speaks
    for theirs, _ in others:
        assert theirs["loss"] == metrics["loss"]
        assert theirs["evaluations"] == metrics["evaluations"]
    return output, metrics


def test_it_trains_as_one_process_does(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *arguments: None)
    one = run(tmp_path, config=CONFIG)
    output, metrics = finished
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["steps"] == one["steps"] == STEPS
    # The first loss is the same but for the statistics of smaller batches; then they drift apart.
    assert metrics["loss"][0] == pytest.approx(one["loss"][0], rel=0.05)
    assert [e["step"] for e in metrics["evaluations"]] == [e["step"] for e in one["evaluations"]]


def train_without_statistics(group):
    """Losses, and the number of samples that this rank has in each step of an epoch."""
    trainer = Trainer(dataclasses.replace(CONFIG, encoder=FLAT), DATA[0], group)
    sizes = [
        sum(len(part.indices) for part in trainer.batches[step])
        for step in range(trainer.steps_per_epoch)
    ]
    return [trainer.step_once() for _ in range(STEPS)], sizes


@pytest.mark.parametrize(
    ("world_size", "last"),
    [(2, [2, 3]), (3, [2, 3, 0]), pytest.param(4, [2, 3, 0, 0], marks=pytest.mark.slow)],
    ids=str,
)
def test_uneven_last_batches_train_as_one_process_does(ranks, world_size, last):
    right, _ = train_without_statistics(None)
    found = ranks.run(world_size, train_without_statistics)
    for losses, _ in found:
        assert losses == pytest.approx(right, rel=1e-5)
    assert [sizes[-1] for _, sizes in found] == last
    assert [sum(sizes) for sizes in zip(*(sizes for _, sizes in found), strict=True)] == [
        *[23] * 5, 5,
    ]  # fmt: skip


@pytest.mark.slow
def test_stopped_on_one_rank_all_stop_and_resume_bit_identically(ranks, finished, tmp_path):
    for message, _ in ranks.run(3, train_together, tmp_path, {}, 7):
        assert message == "interrupted after 7"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-7"]
    for metrics, _ in ranks.run(3, train_together, tmp_path, {"resume": True}):
        assert metrics["loss"] == finished[1]["loss"]
    assert_same_bits(saved(tmp_path), saved(finished[0]))
    theirs = json.loads((finished[0] / "metrics.json").read_text())
    ours = json.loads((tmp_path / "metrics.json").read_text())
    assert apart_from_timing(ours) == apart_from_timing(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_on_another_number_of_ranks(ranks, finished, tmp_path, world_size):
    ranks.run(3, train_together, tmp_path, {}, 7)
    for metrics, _ in ranks.run(world_size, train_together, tmp_path, {"resume": True}):
        assert metrics["loss"][:7] == finished[1]["loss"][:7]
        # The same batch and prototypes; but the encoder normalises over parts of other sizes.
        assert metrics["loss"][7] == pytest.approx(finished[1]["loss"][7], rel=0.2)
        assert len(metrics["loss"]) == STEPS
    assert checkpoint.latest(tmp_path / "checkpoints").name == f"step-{STEPS}"


def refused(group, output):
    messages = []
    for config, options in (
        (dataclasses.replace(CONFIG, batch_size=5), {}),
        (dataclasses.replace(CONFIG, scale=8.0), {"resume": True}),
        (CONFIG, {}),
    ):
        with pytest.raises((ConfigError, checkpoint.CheckpointError)) as caught:
            train(config, output if "resume" in options or config is CONFIG
                         else output / "new", data=PARTS, group=group, **options)  # fmt: skip
        messages.append(str(caught.value))
    return messages


def test_every_rank_refuses(ranks, finished):
    for small, other, there in ranks.run(3, refused, finished[0]):
        assert small == "batch_size: got 5, must be at least 2 for each of the 3 ranks"
        assert "is of another config: scale: 8.0 here, 32.0 there" in other
        assert "is there already" in there


def of_other_images(group, output):
    data = PARTS
    if dist.get_rank(group) == 1:  # as many of as many classes
        data = dataclasses.replace(PARTS, train=synthetic(20, seed=3))
    with pytest.raises(ValueError, match="the data must be the same on every rank") as raised:
        train(CONFIG, output, data=data, group=group)
    return str(raised.value)


def test_ranks_that_find_other_images(ranks, tmp_path):
    one, other = ranks.run(2, of_other_images, tmp_path / "new")
    assert one == other
    assert one.count("'train_images': 120") == 2
    assert not (tmp_path / "new").exists()


# ---- a rank that fails ----

FAILURES = (
    "killed in a step",
    "killed in a step, which one is slow to see",
    "killed in a checkpoint",
    "killed as the first",
    "raises",
)
VICTIM = {"killed as the first": 0}  # else 1


def rank_of_a_run(pipe, rank, world_size, port, output, failure):
    """A process of a run without an agent, with a failure built in."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    fail_in_a_run(pipe.send, rank, output, failure)


def rank_of_an_agent(output, failure):
    """The same as torchrun's agent starts it."""
    rank = int(os.environ["RANK"])
    launch._INTERVAL = 0.05  # each waits for several of them
    fail_in_a_run(lambda said: (output / f"rank-{rank}").write_text(said[0]), rank, output, failure)


def fail_in_a_run(say, rank, output, failure):
    begin()
    report.write = lambda *arguments: None
    victim = rank == VICTIM.get(failure, 1)

    if rank == 2 and "slow" in failure:  # the others have ended by the time it looks
        explain = launch._Roll.explain
        launch._Roll.explain = lambda *arguments: time.sleep(1) or explain(*arguments)

    def on_step(step):
        if victim and step == 6 and failure != "raises" and "checkpoint" not in failure:
            os.kill(os.getpid(), signal.SIGKILL)
        if victim and step == 6 and failure == "raises":
            raise MemoryError("no room for a thing")
        if victim and step == 6 and failure == "killed in a checkpoint":
            from torch.distributed.checkpoint import FileSystemWriter

            FileSystemWriter.write_data = lambda *a: os.kill(os.getpid(), signal.SIGKILL)

    try:
        with launch.joined(stops=(Interrupted,)) as group:
            train(
                CONFIG, output, data=PARTS, console=Console(file=io.StringIO()), group=group,
                on_step=on_step,
            )  # fmt: skip
    except Exception as error:
        say((f"{type(error).__name__}: {error}", traceback.format_exc()))
        sys.exit(1)
    say(("finished", ""))


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_when_a_rank_fails_all_end_and_say_which(ranks, finished, tmp_path, failure):
    port = free_port()
    began = time.monotonic()
    processes = []
    for rank in range(3):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=rank_of_a_run, args=(theirs, rank, 3, port, tmp_path, failure)
        )
        process.start()
        theirs.close()
        processes.append((process, ours))
    messages = []
    for process, pipe in processes:
        process.join(max(1.0, began + 60 - time.monotonic()))
        alive = process.is_alive()
        if alive:
            process.kill()
        assert not alive, "still running after 60 s"
        try:
            messages.append(pipe.recv())
        except EOFError:
            messages.append(("", ""))
    victim = VICTIM.get(failure, 1)
    for rank, ((process, _), (message, trace)) in enumerate(zip(processes, messages, strict=True)):
        assert process.exitcode != 0
        if rank != victim:
            if failure == "raises":
                assert "rank 1 raised MemoryError: no room for a thing" in message, trace
            else:
                assert f"rank {victim} (process {processes[victim][0].pid} on" in message, trace
                assert "has died without a word" in message
    # The last checkpoint is whole, and the run goes on from it.
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-4"
    for metrics, _ in ranks.run(3, train_together, tmp_path, {"resume": True}):
        assert metrics["loss"] == finished[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["killed in a step", "killed in a checkpoint"])
def test_killed_under_the_agent_of_torchrun(ranks, finished, tmp_path, failure):
    """The agent ends the others, which have said by then who was killed."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=3, start_method="forkserver", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=0.1,
    )  # fmt: skip
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    began = time.monotonic()
    try:
        with pytest.raises(ChildFailedError):  # of whomever the agent finds dead first
            elastic_launch(config, rank_of_an_agent)(tmp_path, failure)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert time.monotonic() - began < 60
    for rank in (0, 2):
        message = (tmp_path / f"rank-{rank}").read_text()
        assert message.startswith("RankFailed: rank 1 (process ")
        assert message.endswith("has died without a word")
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-4"
    for metrics, _ in ranks.run(2, train_together, tmp_path, {"resume": True}):
        assert metrics["loss"][:4] == finished[1]["loss"][:4]
        assert len(metrics["loss"]) == STEPS
