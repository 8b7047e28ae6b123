"""Processes under torchrun: what sends their tensors, and what they say when one has died."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.processes import Process
from support.ranks import free_port

from unicom_ext.distributed import launch
from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks, backend, default_group

# ---- what sends tensors --------------------------------------------------------------------------


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("device", "right", "bound"),
    [
        (None, "gloo", None),
        (torch.device("cpu"), "gloo", None),
        (torch.device("cuda", 1), "cpu:gloo,cuda:nccl", torch.device("cuda", 1)),
    ],
)
def test_a_gpu_is_bound_and_sends_by_nccl(monkeypatch, device, right, bound):
    asked = []

    def init(backends, *, device_id, timeout):
        asked.append((backends, device_id))
        raise Asked

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    with pytest.raises(Asked), launch.joined(device):
        pass
    assert asked == ([bound] if bound else []) + [(right, bound)]


def test_a_process_alone_is_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with launch.joined() as group:
        assert group is None
    assert default_group() is None
    alone = Ranks(None)
    x = torch.arange(4.0)
    assert alone.is_first
    assert alone.share(7) == (0, 7)
    for method in (alone.sum, alone.max, alone.broadcast, alone.gather, alone.sum_scatter):
        assert method(x) is x


@pytest.mark.parametrize(
    ("config", "on_cpu", "on_cuda"),
    [
        ("cpu:gloo,cuda:gloo", "gloo", "gloo"),
        ("cpu:gloo,cuda:nccl", "gloo", "nccl"),
        ("cuda:nccl", "", "nccl"),
    ],
)
def test_which_backend_sends_from_a_device(monkeypatch, config, on_cpu, on_cuda):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert backend(None, cpu) == on_cpu
    assert backend(None, cuda) == on_cuda
    ranks = Ranks(None)
    assert ranks.sends_from(cuda) == cuda
    ranks._group = object
    assert ranks.sends_from(cuda) == (cpu if on_cuda == "gloo" else cuda)


def collectives(group):
    ranks = Ranks(group)
    rank, size = ranks.rank, ranks.world_size
    rows = torch.arange(2.0 * size)[:, None] + rank
    return (
        ranks.sum(torch.tensor(rank)).item(),
        ranks.max(torch.tensor(rank)).item(),
        ranks.broadcast(torch.tensor(rank + 5)).item(),
        ranks.gather(torch.tensor([rank, -rank])).tolist(),
        ranks.sum_scatter(rows)[:, 0].tolist(),
        ranks.share(10),
        backend(group, torch.device("cpu")),
    )


def test_collectives(ranks):
    for rank, found in enumerate(ranks.run(3, collectives)):
        total, most, first, gathered, scattered, share, sender = found
        assert (total, most, first) == (3, 2, 5)
        assert gathered == [0, 0, 1, -1, 2, -2]
        assert scattered == [3.0 * (2 * rank) + 3, 3.0 * (2 * rank + 1) + 3]
        assert share == [(0, 3), (3, 6), (6, 10)][rank]
        assert sender == "gloo"


# ---- a rank that fails ---------------------------------------------------------------------------


def fail_together(group, stage):
    failure = OSError(5, "Input/output error") if dist.get_rank(group) == 1 else None
    try:
        if stage == "agree":
            agree({}, failure, group)
        else:
            with Ranks(group).together():
                if failure is not None:
                    raise failure
    except Exception as error:
        return f"{type(error).__name__}: {error}", isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    ("stage", "word"),
    [("agree", "rank 1 of the process group raised"), ("together", "process 1 of 2 failed:")],
)
def test_one_type_of_error_says_who_failed(ranks, stage, word):
    theirs, own = ranks.run(2, fail_together, stage)
    assert theirs == (f"RankFailed: {word} OSError: [Errno 5] Input/output error", True)
    assert own == ("OSError: [Errno 5] Input/output error", False)


class Stop(Exception):
    pass


def process(work, rank, world_size, port, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    launch._INTERVAL = 0.05  # tests wait for several of them
    try:
        with launch.joined(stops=(Stop,)) as group:
            (folder / f"joined-{rank}").touch()
            work(rank, folder, group)
    except Exception as error:
        (folder / f"said-{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


class Processes:
    """`work(rank, folder, group)` on each of two processes, as torchrun would start them."""

    def __init__(self, work, folder: Path) -> None:
        self.folder = folder
        port = free_port()
        self.all = [
            Process(folder / f"printed-{rank}", process, work, rank, 2, port, folder)
            for rank in (0, 1)
        ]

    def until(self, *names):
        end = time.monotonic() + 120
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < end, f"{names} not within 120 s"
            time.sleep(0.01)

    def end(self):
        """Exit statuses."""
        return [each.end() for each in self.all]

    def said(self, rank):
        return (self.folder / f"said-{rank}").read_text()


def wait_without_a_message(rank, folder, group):
    time.sleep(600)  # which a signal handler that raises ends


@pytest.mark.slow
def test_sigterm_after_a_death_says_who_died(tmp_path):
    """Before the others have noticed, as they send nothing."""
    both = Processes(wait_without_a_message, tmp_path)
    both.until("joined-0", "joined-1")
    os.kill(both.all[1].pid, signal.SIGKILL)
    both.all[1].end()
    os.kill(both.all[0].pid, signal.SIGTERM)
    assert both.end() == [1, -signal.SIGKILL]
    assert both.said(0).startswith(f"RankFailed: rank 1 (process {both.all[1].pid} on")
    assert both.said(0).endswith("has died without a word")


@pytest.mark.slow
def test_sigterm_with_all_alive_ends_the_process_as_ever(tmp_path):
    both = Processes(wait_without_a_message, tmp_path)
    both.until("joined-0", "joined-1")
    os.kill(both.all[0].pid, signal.SIGTERM)
    both.all[0].end()
    os.kill(both.all[1].pid, signal.SIGTERM)  # to which the death of the other is no news
    assert both.end() == [-signal.SIGTERM, 1]
    assert not (tmp_path / "said-0").exists()
    assert both.said(1).startswith("RankFailed: rank 0 (process")


def notice_a_death(rank, folder, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier(group)
    finally:
        (folder / "noticed").touch()
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_sigterm_on_the_way_to_say_who_died(tmp_path, seconds):
    """Again and again, from the error to the end."""
    both = Processes(notice_a_death, tmp_path)
    both.until("noticed")
    while both.all[0].runs() and not (tmp_path / "said-0").exists():
        os.kill(both.all[0].pid, signal.SIGTERM)
        time.sleep(seconds)
    assert both.end() == [1, -signal.SIGKILL]
    assert both.said(0).startswith("RankFailed: rank 1 (process")


def in_a_message_that_does_not_end(rank, folder, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    launch.PATIENCE = 0.5
    end = time.monotonic() + 60
    while "rank 1" not in (folder / "printed-0").read_text() and time.monotonic() < end:
        ctypes.CDLL(None).usleep(20_000)


@pytest.mark.slow
def test_a_rank_that_is_held_up_says_so_from_aside(tmp_path):
    """No error reaches its main thread."""
    both = Processes(in_a_message_that_does_not_end, tmp_path)
    both.end()
    said = f"rank 0 is held up: rank 1 (process {both.all[1].pid} on"
    assert said in both.all[0].text()


def stop_in_good_order(rank, folder, group):
    raise Stop("all of us")


def leave_early(rank, folder, group):
    launch.PATIENCE = 0.1
    if rank == 0:
        end = time.monotonic() + 60
        while not (folder / "left").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(1.0)  # longer than it takes to say that the other has died


@pytest.mark.slow
def test_a_rank_that_stops_or_leaves_has_not_failed(tmp_path):
    for name, work in (("stop", stop_in_good_order), ("early", leave_early)):
        folder = tmp_path / name
        folder.mkdir()
        both = Processes(work, folder)
        both.all[1].end()
        (folder / "left").touch()
        codes = both.end()
        if name == "stop":
            assert codes == [1, 1]
            assert [both.said(rank) for rank in (0, 1)] == ["Stop: all of us"] * 2
        else:
            assert codes == [0, 0]
            assert "rank 1" not in both.all[0].text()
