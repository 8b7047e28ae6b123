"""Processes of tests, forked from a server that has imported what they need.

Importing torch and a trainer costs seconds in each process that Python starts anew. No thread has
started in the server, so what it forks may fork again.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS = 300  # that a process may take: only one that hangs takes so long, on any machine
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "matplotlib.backends.backend_agg", "matplotlib.figure", "numpy", "PIL.Image", "pytest",
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.launcher.api", "torch.nn.parallel",
    "unicom_ext.cli.main", "unicom_ext.cluster", "unicom_ext.loss.sharded.step",
    "unicom_ext.pipeline.run", "unicom_ext.train.run",
])  # fmt: skip


class Process:
    """`function(*arguments)` in a process of its own, which writes what it prints to a file.

    An exception ends it with status 1.
    """

    def __init__(self, printed: Path, function: Callable[..., None], *arguments: object) -> None:
        self.printed = printed
        self._process = CONTEXT.Process(target=_work, args=(printed, function, arguments))
        self._process.start()
        self.pid = self._process.pid

    def end(self) -> int:
        """Its status; minus the signal that has killed it."""
        self._process.join(SECONDS)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"still running after {SECONDS} s: {self.text()}")
        return self._process.exitcode

    def runs(self) -> bool:
        return self._process.is_alive()

    def text(self) -> str:
        """What it has printed and written to stderr until now."""
        return self.printed.read_text() if self.printed.exists() else ""


def begin() -> None:
    """What a process of the server does first."""
    import torch

    gc.freeze()  # what is imported is not looked through again and again for garbage
    torch.set_num_threads(1)


def _work(printed: Path, function: Callable[..., None], arguments: tuple) -> None:
    begin()
    with printed.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)


def fork(function: Callable[..., None], *arguments: object, **options: object) -> int:
    """Call it in a child of this process, in which no thread may have started: the child's pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*arguments, **options)
            status = 0
        except BaseException as error:
            print("".join(traceback.format_exception_only(error)), end="", flush=True)
        finally:
            os._exit(status)
    return pid


def status(pid: int) -> int:
    """Wait for a process that this one has forked."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
