"""Timing in interleaved rounds, peak memory in fresh processes, and what machine this is."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path

import torch
from candidates import CANDIDATES, BareProducts, Candidate, Head, Problem, Shape, Unavailable
from device import CPU, Cpu, Cuda

import unicom_ext
from unicom_ext import _engine
from unicom_ext.utils.versions import cpu_model

PHASES = ("forward", "backward", "optimizer")
# Sums of phases that are reported too.
SPANS = {
    "forward": PHASES[:1],
    "backward": PHASES[1:2],
    "optimizer": PHASES[2:],
    "forward+backward": PHASES[:2],
    "step": PHASES,
}
# The environment decides how dear fresh memory is and how threads wait: keep it with the figures.
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
)


def time_step(head: Head | BareProducts, where: Cpu | Cuda = CPU) -> tuple[float, ...]:
    """Seconds of forward, backward and update. Freeing the gradients belongs to the update."""
    return where.time(head.forward, head.backward, head.update)


def prepare(candidate: Candidate, problem: Problem, where: Cpu | Cuda = CPU) -> Head | BareProducts:
    """A head after two steps, so that it has compiled, allocated and chosen what it will.

    Raises Unavailable if the candidate cannot run here.
    """
    head = candidate.build(problem)
    try:
        for _ in range(2):
            time_step(head, where)
    except Exception as error:
        if not candidate.fragile:
            raise
        head.zero_grad()
        reason = str(error).strip() or type(error).__name__
        raise Unavailable(f"{type(error).__name__}: {reason.splitlines()[0]}") from error
    return head


def time_rounds(
    heads: dict[str, Head | BareProducts],
    rounds: int,
    advance: Callable[[str], None],
    where: Cpu | Cuda = CPU,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each phase of each head in each round; within a round the heads take turns.

    advance: called with the name of the head before each of its turns.
    """
    seconds = {name: {phase: [] for phase in PHASES} for name in heads}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, head in heads.items():
                advance(name)
                for phase, value in zip(PHASES, time_step(head, where), strict=True):
                    seconds[name][phase].append(value)
    finally:
        gc.enable()
    return seconds


def spans(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of every span in each round."""
    return {
        span: [sum(values) for values in zip(*(seconds[phase] for phase in phases), strict=True)]
        for span, phases in SPANS.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: dict[str, list[float]], peer: dict[str, list[float]]) -> dict[str, dict]:
    """How many times longer the peer took, for each span, from the pairs of each round.

    There is no ratio of updates: ours may happen inside backward.
    """
    ours, peer = spans(ours), spans(peer)
    result = {}
    for span in ("forward", "backward", "forward+backward", "step"):
        pairs = [p / o for o, p in zip(ours[span], peer[span], strict=True)]
        result[span] = {**summary(pairs), "pairs": pairs}
    return result


# ---- memory --------------------------------------------------------------------------------------


def peak_memory(shape: Shape, name: str, threads: int) -> dict[str, int] | str:
    """Peak memory of a step in a fresh process, or in a string why there is no figure.

    Bytes beyond what was there before the step: parameters, inputs, optimizer state, libraries.
    Gradients are part of it. Keys: "forward+backward" and "step".
    """
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux"
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(_peak_memory_here, shape, name, threads).result()
    except (Unavailable, MemoryError, BrokenProcessPool, PermissionError) as error:
        return f"{type(error).__name__}: {error}"


def _peak_memory_here(shape: Shape, name: str, threads: int) -> dict[str, int]:
    _map_large_blocks()
    torch.set_num_threads(threads)
    candidate = next(c for c in CANDIDATES if c.name == name)
    problem = Problem(shape)
    if candidate.ours:
        # Threads and libraries are there after a small step; nothing of this size is.
        prepare(candidate, Problem(Shape(64, 8, 16, 0.5, 0.5)))
        head = candidate.build(problem)
    else:
        # Whatever a peer keeps from step to step is not counted against it.
        head = prepare(candidate, problem)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = status_bytes("VmRSS")
    head.forward()
    head.backward()
    forward_backward = status_bytes("VmHWM") - before
    head.update()
    # Linux counts pages per CPU and sums up late: a later peak can read a little smaller.
    step = max(forward_backward, status_bytes("VmHWM") - before)
    return {"forward+backward": forward_backward, "step": step}


def _map_large_blocks() -> None:
    """Give glibc's large blocks back as soon as they are free: the peak is what is alive then.

    Otherwise its threshold rises with use, and the peak depends on holes in the heap (+-15 %).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        m_mmap_threshold = -3  # malloc.h
        set_option(m_mmap_threshold, 1 << 18)


def status_bytes(key: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


# ---- machine -------------------------------------------------------------------------------------


def describe_machine() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "capability": _engine.cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "unicom_ext": unicom_ext.__version__,
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def load_average() -> float | None:
    """Programs that wanted to run in the last minute, ours among them; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _git_commit() -> str | None:
    """The commit, with "+changes" if the tree differs from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
