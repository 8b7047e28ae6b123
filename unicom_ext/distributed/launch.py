"""Processes that train together under torchrun, and what they say when one of them fails.

A rank that dies breaks its connections, and the others learn of it at their next message, as an
error about a socket; a rank that waits for one that waits itself learns of it later still. Here
they find out whose fault it was: ranks leave their process ids in the store when they begin, and
the reason when they fail, and a thread of each looks out for the others.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from unicom_ext.train.run import Interrupted

PATIENCE = 10.0  # seconds to find out which rank has failed
_INTERVAL = 0.25  # seconds between two looks at the others
_STORE = "unicom_ext/train"


class RankFailed(RuntimeError):
    """Another rank raised or died; the message says which, and why as far as is known."""


@contextmanager
def joined(timeout: timedelta = timedelta(minutes=10)) -> Iterator[dist.ProcessGroup | None]:
    """All processes that torchrun started, as a group; None for a process that runs alone.

    timeout: how long a rank waits for the others in one message. One that was killed is noticed at
        once; this is for one that hangs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield None
        return
    dist.init_process_group("gloo", timeout=timeout)
    roll = _Roll(dist.get_rank(), dist.get_world_size())
    try:
        yield dist.group.WORLD
    except Interrupted:
        raise
    except Exception as error:
        with _time_to_speak():
            culprit = roll.explain(error)
            roll.wait_for_readers()
        if culprit is None:
            raise
        raise RankFailed(culprit) from error
    finally:
        roll.close()
        dist.destroy_process_group()


@contextmanager
def _time_to_speak() -> Iterator[None]:
    """Leaves SIGTERM unheard: torchrun sends it to all others when a process has died, and kills
    them half a minute later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


class _Roll:
    """Which process each rank is, and which has failed."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.store = dist.PrefixStore(_STORE, dist.distributed_c10d._get_default_store())
        self.processes: list[tuple[str, int]] = [("", 0)] * world_size
        dist.all_gather_object(self.processes, (socket.gethostname(), os.getpid()))
        self._culprit: str | None = None
        self._found, self._done = threading.Event(), threading.Event()
        self._lookout = threading.Thread(target=self._look_out, name="lookout", daemon=True)
        self._lookout.start()

    def explain(self, error: Exception) -> str | None:
        """Which other rank failed first, for an error that may be its consequence.

        None: this rank's own failure, which the others can read now.
        """
        if not _is_about_others(error):
            self._report(f"rank {self.rank} raised {type(error).__name__}: {error}")
            return None
        self._found.wait(PATIENCE)
        return self._culprit or f"a rank on another machine has failed, or hangs: {error}"

    def wait_for_readers(self) -> None:
        """Rank 0 stays until the others know who failed: the store may be in its process, and to a
        rank that looks later rank 0 itself would seem to have died."""
        end = time.monotonic() + PATIENCE
        others = range(1, self.world_size) if self.rank == 0 else ()
        while any(map(self._may_still_look, others)) and time.monotonic() < end:
            time.sleep(0.1)

    def close(self) -> None:
        self._done.set()
        self._lookout.join(PATIENCE)

    def _look_out(self) -> None:
        """Finds the first rank that fails, and says that it is known here too."""
        while not self._done.wait(_INTERVAL):
            for rank in range(self.world_size):
                reason = self._reason(rank) if rank != self.rank else None
                if reason is not None:
                    self._report(reason)
                    self._culprit = reason
                    self._found.set()
                    return

    def _may_still_look(self, rank: int) -> bool:
        with suppress(RuntimeError):
            host, process = self.processes[rank]
            here = host == socket.gethostname()
            return (not here or _runs(process)) and not self.store.check([f"failed/{rank}"])
        return False  # there is no store any more

    def _reason(self, rank: int) -> str | None:
        with suppress(RuntimeError):  # where the store was in a process that is gone
            if self.store.check([f"failed/{rank}"]):
                return self.store.get(f"failed/{rank}").decode()
        host, process = self.processes[rank]
        if host == socket.gethostname() and not _runs(process):
            return f"rank {rank} (process {process} on {host}) has died without a word"
        return None

    def _report(self, reason: str) -> None:
        with suppress(RuntimeError):
            self.store.set(f"failed/{self.rank}", reason)


def _is_about_others(error: Exception) -> bool:
    """Whether an error is what a message to another rank gives when that one is gone."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if isinstance(chain, dist.DistError) or "of the process group raised" in text:
            return True
        if isinstance(chain, RuntimeError) and ("gloo" in text or "NCCL" in text):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _runs(process: int) -> bool:
    """Whether a process of this machine is there, and not merely a zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is going
        return False
