"""Processes that torchrun started, and what they say when one of them fails.

A rank that dies breaks its connections, and the others learn of it at their next message, as an
error about a socket; a rank that waits for one that waits itself learns of it later still. Here
they find out whose fault it was: ranks leave their process ids in the store when they begin, and
the reason when they fail, and a thread of each looks out for the others.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from unicom_ext.distributed.failures import RankFailed

PATIENCE = 10.0  # seconds to find out which rank has failed
# For commands in which ranks wait for work of others, which may take hours.
LONG = timedelta(days=1)
_INTERVAL = 0.25  # seconds between two looks at the others
_STORE = "unicom_ext"
_LEFT = ""  # in place of a reason: the rank has done its work


@contextmanager
def joined(
    device: torch.device | None = None,
    *,
    stops: tuple[type[BaseException], ...] = (),
    timeout: timedelta = timedelta(minutes=10),
) -> Iterator[dist.ProcessGroup | None]:
    """All processes that torchrun started, as a group; None for a process that runs alone.

    Args:
        device: what this process works on, None for the CPU. With a GPU, tensors there are sent by
            NCCL; those on the CPU, and objects, by Gloo as ever.
        stops: exceptions that end all ranks in good order, and are no failure of one.
        timeout: how long a rank waits for the others in one message. One that was killed is noticed
            at once; this is for one that hangs.

    Raises:
        RankFailed: another rank has failed. Whatever a rank raises itself goes through. From then
            on SIGTERM goes unheard: the process is about to end, and its agent would make it do so
            before it has said why.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield None
        return
    bound = device if device is not None and device.type == "cuda" else None
    if bound is not None:
        torch.cuda.set_device(bound)
    dist.init_process_group(backends(device), timeout=timeout, device_id=bound)
    roll, failed = _Roll(dist.get_rank(), dist.get_world_size()), False
    try:
        with roll.explains_sigterm(stops):
            yield dist.group.WORLD
        roll.leave()
    except stops:
        roll.leave()
        raise
    except Exception as error:
        failed = True
        culprit = roll.explain(error)
        roll.wait_for_readers()
        if culprit is None:
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # The agent names as the cause whichever process it finds dead first, and looks ten
            # times a second.
            time.sleep(4 * _INTERVAL)
        raise RankFailed(culprit) from error
    finally:
        roll.close()
        if bound is None or not failed:  # NCCL could wait for the rank that is gone
            dist.destroy_process_group()


def backends(device: torch.device | None) -> str:
    """What sends the tensors of a process that works on `device`, as torch.distributed names it."""
    return "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"


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
        self._found, self._speaking, self._done = (threading.Event() for _ in range(3))
        self._lookout = threading.Thread(target=self._look_out, name="lookout", daemon=True)
        self._lookout.start()

    @contextmanager
    def explains_sigterm(self, stops: tuple[type[BaseException], ...]) -> Iterator[None]:
        """In the block SIGTERM raises RankFailed if a rank has failed, else it does as before.

        torchrun's agent sends it to all others when a process has died, and kills them half a
        minute later. It may come at any time: before this rank has noticed anything, and when it is
        on the way to say so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, frame: object) -> None:
            signal.signal(number, signal.SIG_IGN)  # another one must not come in between
            self._look()  # on this machine a process that the agent misses is gone already
            if self._found.wait(4 * _INTERVAL):
                raise RankFailed(self._culprit)
            signal.signal(number, before)
            signal.raise_signal(number)

        before = signal.signal(signal.SIGTERM, hear)
        try:
            yield
        except stops:
            signal.signal(signal.SIGTERM, before)
            raise
        except Exception:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        except BaseException:
            signal.signal(signal.SIGTERM, before)
            raise
        signal.signal(signal.SIGTERM, before)

    def explain(self, error: Exception) -> str | None:
        """Which other rank failed first, for an error that may be its consequence.

        None: this rank's own failure, which the others can read now.
        """
        self._speaking.set()
        if not _is_about_others(error):
            self._report(f"rank {self.rank} raised {type(error).__name__}: {error}")
            return None
        self._found.wait(PATIENCE)
        return self._culprit or f"a rank on another machine has failed, or hangs: {error}"

    def leave(self) -> None:
        """This rank has done its work; that its process ends is no failure."""
        self._report(_LEFT)
        self.wait_for_readers()

    def wait_for_readers(self) -> None:
        """Rank 0 stays until the others know who failed, or have done their work too: the store may
        be in its process, and to a rank that looks later rank 0 itself would seem to have died."""
        end = time.monotonic() + PATIENCE
        others = range(1, self.world_size) if self.rank == 0 else ()
        while any(map(self._may_still_look, others)) and time.monotonic() < end:
            time.sleep(0.1)

    def close(self) -> None:
        self._speaking.set()
        self._done.set()
        self._lookout.join(PATIENCE)

    def _look_out(self) -> None:
        while not self._found.is_set() and not self._done.wait(_INTERVAL):
            self._look()
        # The main thread may be in a message that does not end, as a kernel of NCCL's does not when
        # the other side is gone. Then it is said here, before the agent kills this process too.
        if not self._speaking.wait(PATIENCE):
            print(f"rank {self.rank} is held up: {self._culprit}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        """Finds the first rank that has failed, and says that it is known here too."""
        for rank in range(self.world_size):
            reason = self._reason(rank) if rank != self.rank else None
            if reason is not None and not self._found.is_set():
                self._report(reason)
                self._culprit = reason
                self._found.set()

    def _may_still_look(self, rank: int) -> bool:
        with suppress(RuntimeError):
            host, process = self.processes[rank]
            here = host == socket.gethostname()
            return (not here or _runs(process)) and not self.store.check([f"failed/{rank}"])
        return False  # there is no store any more

    def _reason(self, rank: int) -> str | None:
        with suppress(RuntimeError):  # where the store was in a process that is gone
            if self.store.check([f"failed/{rank}"]):
                return self.store.get(f"failed/{rank}").decode() or None
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
        if isinstance(chain, RankFailed | dist.DistError):
            return True
        if isinstance(chain, RuntimeError):  # Gloo has no type of its own
            text = str(chain)
            if "gloo" in text or "NCCL" in text:
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
