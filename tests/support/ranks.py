"""Processes that form a Gloo group, started once and given many functions to run.

Groups of 1, 2, 3 and 4 ranks are made of the same four workers.
"""

from __future__ import annotations

import random
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

from support.processes import CONTEXT, begin

MOST = 4
# Seconds that a rank waits for another, and that we wait for a rank: only a hang takes so long,
# however busy the machine.
TIMEOUT = 300.0


class Raised(Exception):
    """A function failed on a rank: its traceback there."""


class Ranks:
    """`run(world_size, function, *arguments)` calls the function on that many ranks at once.

    The function gets the process group first; it must be importable, and its result picklable.
    Returns the results in rank order.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._start()

    def _start(self) -> None:
        most = self._most
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._workers = []
        for rank in range(most):
            ours, theirs = CONTEXT.Pipe()
            worker = CONTEXT.Process(
                target=_serve,
                args=(theirs, rank, most, store),
                daemon=True,
                name=f"rank {rank}",
            )
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))

    def run(self, world_size: int, function, *arguments):
        try:
            outcomes = self.outcomes(world_size, function, *arguments)
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, Exception):
                    raise AssertionError(f"rank {rank} raised") from outcome
        except AssertionError:
            self.close()  # the other ranks may be anywhere
            self._start()
            raise
        return outcomes

    def outcomes(self, world_size: int, function, *arguments):
        """As `run`, but what a rank raised is returned in its place."""
        for _, pipe in self._workers[:world_size]:
            pipe.send((world_size, function, arguments))
        results = []
        for rank, (worker, pipe) in enumerate(self._workers[:world_size]):
            if not pipe.poll(TIMEOUT + 10):
                raise AssertionError(f"rank {rank} hangs in {function.__name__}")
            try:
                error, result, trace = pipe.recv()
            except EOFError:
                worker.join()
                raise AssertionError(f"rank {rank} died, status {worker.exitcode}") from None
            if error is not None:
                error.__cause__ = Raised(f"on rank {rank}:\n{trace}")
            results.append(result if error is None else error)
        return results

    def close(self) -> None:
        for _, pipe in self._workers:
            pipe.close()
        for worker, _ in self._workers:
            worker.kill()
            worker.join()
        self._folder.cleanup()


def free_port() -> int:
    """A port to listen on, of those that no system gives to outgoing connections: theirs may be
    taken again, by tests beside this one, before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _serve(pipe, rank: int, most: int, store: str) -> None:
    import torch.distributed as dist

    begin()
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=most,
        timeout=timeout,
    )
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, most)}
    groups[most] = dist.group.WORLD
    while True:
        try:
            world_size, function, arguments = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            pipe.send((None, function(groups[world_size], *arguments), ""))
        except Exception as error:
            pipe.send((error, None, traceback.format_exc()))
