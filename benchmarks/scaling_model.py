"""Step time and memory of the sharded loss for any number of ranks: a model, fitted and checked.

    python benchmarks/scaling_model.py --output benchmarks/results/scaling

A step of one of n ranks, with b samples, C classes, rates r1 and r2, d dimensions:

    time = local + rounds(n) * alpha + bytes(n) / beta
    local = own * crowding * max(1, n / cores)
    own = start + 8 * B * (S / n) * d' / F + B * (S / n) / E + 40 * (S / n) * d / M

B = n b, S = r1 C + B, d' = r2 d. start, F (arithmetic), E (entries of the logits, whose exponential
is taken twice) and M (memory) are fitted to one process; crowding, alpha and beta to two; runs of
other shapes and those with 4 processes check it, and the error is printed. Processes on one machine
share its memory and caches, which is what `crowding` stands for, and its cores: with more processes
than cores they take turns. How long a message waits for a process whose turn it is not is not in
the model, so with more processes than cores it is too fast.

For GPUs the constants are those written below, not fitted to anything: those predictions are only
as good as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Shape(NamedTuple):
    batch: int  # samples per rank
    classes: int
    dim: int = 128
    sample_rate: float = 0.1
    feature_rate: float = 0.5


class Machine(NamedTuple):
    """What one rank has."""

    start: float  # s, of everything that does not grow
    flops: float  # 1/s
    entries: float  # 1/s
    memory: float  # bytes/s, of row-wise passes
    alpha: float = 0.0  # s per message round
    beta: float = np.inf  # bytes/s sent
    crowding: float = 1.0  # how many times longer local work takes beside that of other ranks


# 400 Tflop/s and 2.5 TB/s, about half of an H200's measured peaks; half of the rate of its special
# function units; 400 Gbit/s of network per GPU.
GPU = Machine(start=2e-4, flops=4e14, entries=1e12, memory=2.5e12, alpha=1.5e-5, beta=5e10)


class Work(NamedTuple):
    """Of one rank in one step."""

    flops: float
    entries: float  # of the logits
    traffic: float  # bytes of memory
    rounds: float  # of messages
    sent: float  # bytes


def work(shape: Shape, ranks: int) -> Work:
    from unicom_ext.loss.sharded.volume import communication_volume

    everyone = ranks * shape.batch
    rows = min(shape.classes, shape.sample_rate * shape.classes + everyone) / ranks
    flops = 8 * everyone * rows * shape.dim * shape.feature_rate
    # Gather and pack, row gradients, and AdamW's weight and two moments, read and written.
    traffic = 10 * rows * shape.dim * 4
    rounds = 0 if ranks == 1 else 4 * (ranks - 1) if ranks <= 8 else 4 * np.log2(ranks)
    sent = communication_volume(shape.batch, shape.dim, ranks).total
    return Work(flops, everyone * rows, traffic, rounds, sent)


def local_work(machine: Machine, shape: Shape, ranks: int, cores: int | None) -> float:
    """Seconds of one rank's own work where it is alone.  cores: that all ranks share, None: each
    has its own."""
    todo = work(shape, ranks)
    turns = 1.0 if cores is None else max(1.0, ranks / cores)
    return turns * (
        machine.start
        + todo.flops / machine.flops
        + todo.entries / machine.entries
        + todo.traffic / machine.memory
    )


def predict(machine: Machine, shape: Shape, ranks: int, cores: int | None = None) -> float:
    """Seconds per step."""
    todo, local = work(shape, ranks), local_work(machine, shape, ranks, cores)
    crowding = machine.crowding if ranks > 1 else 1.0
    return local * crowding + todo.rounds * machine.alpha + todo.sent / machine.beta


class Memory(NamedTuple):
    """Bytes on a rank."""

    state: float  # its prototypes, their two moments, and per row its steps and decay
    sampled: float  # unit rows and ids of the classes that were drawn, and their gradient
    samples: float  # embeddings of all ranks, their gradient, and what is known of each sample

    @property
    def total(self) -> float:
        return sum(self)


def memory(shape: Shape, ranks: int, unit_bytes: int = 2) -> Memory:
    """fp32 with RowAdamW.  unit_bytes: per value of the unit rows, 2 on tensor cores."""
    everyone, owned = ranks * shape.batch, shape.classes / ranks
    # Room for all samples' classes lying in this shard, and for what is drawn from blocks of 256
    # classes that it owns in part.
    border = 256 if ranks > 1 else 0
    rows = min(owned, shape.sample_rate * (owned + border) + everyone)
    features = shape.feature_rate * shape.dim
    return Memory(
        state=owned * (3 * 4 * shape.dim + 4 + 8),
        sampled=rows * (unit_bytes * features + 8 + 8 + 4 * shape.dim + 8),
        samples=everyone * (2 * 4 * shape.dim + 8 + 6 * 8),
    )


def measured(rank: int, ranks: int, port: int, shapes: list[Shape], steps: int, queue) -> None:
    """Median step of each shape: forward, backward, RowAdamW."""
    from unicom_ext import PartialMarginSoftmax
    from unicom_ext.optim import RowAdamW

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    for shape in shapes:
        loss = PartialMarginSoftmax(
            shape.dim, shape.classes, sample_rate=shape.sample_rate, sparse_grad=True,
            feature_rate=shape.feature_rate, process_group=dist.group.WORLD,
            uneven_batches=False,
        )  # fmt: skip
        optimizer = RowAdamW(loss.parameters())
        embeddings = torch.randn(shape.batch, shape.dim, requires_grad=True)
        labels = torch.randint(shape.classes, (shape.batch,))
        times = []
        for _ in range(steps):
            dist.barrier()
            began = time.perf_counter()
            optimizer.zero_grad()
            loss(embeddings, labels).backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
        slowest = torch.tensor(float(np.median(times[2:])))
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if rank == 0:
            queue.put(float(slowest))
    del loss, optimizer  # which hold the group
    dist.barrier()
    dist.destroy_process_group()


def measure(shapes: list[Shape], ranks: int, steps: int) -> list[float]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measured, (ranks, port, shapes, steps, queue), nprocs=ranks)
    return [queue.get() for _ in shapes]


def fit(shapes: list[Shape], alone: list[float], pairs: list[float], cores: int) -> Machine:
    """Start, F, E, M from one process; crowding, alpha, beta from two."""
    alone_costs = _solve([(1.0, *work(s, 1)[:3]) for s in shapes], alone)
    start, *rates = (float(c) for c in alone_costs)
    machine = Machine(start, *(1 / max(cost, 1e-18) for cost in rates))
    rows = [(local_work(machine, s, 2, cores), *work(s, 2)[3:]) for s in shapes]
    crowding, alpha, second = (float(c) for c in _solve(rows, pairs))
    return machine._replace(alpha=alpha, beta=1 / max(second, 1e-18), crowding=crowding)


def _solve(rows: list[tuple[float, ...]], times: list[float]) -> np.ndarray:
    """Non-negative least squares of relative errors."""
    from scipy.optimize import nnls

    matrix, target = np.array(rows, dtype=float), np.array(times)
    scale = matrix.max(axis=0)
    return nnls(matrix / scale / target[:, None], np.ones(len(target)))[0] / scale


def plot(path: Path, checks: list[dict]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for ranks in sorted({check["ranks"] for check in checks}):
        of = [check for check in checks if check["ranks"] == ranks]
        left.loglog(
            [1e3 * c["measured"] for c in of],
            [1e3 * c["predicted"] for c in of],
            "o",
            label=f"{ranks}",
        )
    ends = [1e3 * pick(c["measured"] for c in checks) for pick in (min, max)]
    left.loglog(ends, ends, "k:")
    left.set(title="measured on this CPU", xlabel="measured, ms", ylabel="predicted, ms")
    left.legend(title="ranks")
    counts = 2 ** np.arange(11)
    for classes in (1_000_000, 10_000_000, 100_000_000):
        shape = Shape(1024, classes, dim=512)
        steps = [1e3 * predict(GPU, shape, int(n)) for n in counts]
        middle.loglog(counts, steps, label=f"{classes // 10**6}M classes")
        right.loglog(counts, [memory(shape, int(n)).total / 2**30 for n in counts])
    middle.set(title="GPUs, assumed constants: step, ms", xlabel="ranks, 1024 samples each")
    middle.legend()
    right.axhline(80, color="k", linestyle=":")
    right.set(title="memory per rank, GiB", xlabel="ranks")
    for axes in (left, middle, right):
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is left else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="writes .json and .png")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    fitted = [
        Shape(64, 20_000), Shape(256, 20_000), Shape(64, 100_000), Shape(256, 100_000),
        Shape(64, 20_000, 256), Shape(256, 20_000, 256),
    ]  # fmt: skip
    unseen = [Shape(128, 50_000), Shape(512, 50_000)]
    cores = len(os.sched_getaffinity(0))
    times = {n: measure(fitted + unseen, n, options.steps) for n in sorted({1, 2, *options.ranks})}
    count = len(fitted)
    machine = fit(fitted, times[1][:count], times[2][:count], cores)
    checks = []
    print("| ranks | b | classes | d | used for the fit | measured ms | predicted ms | error |")
    print("| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for ranks, of in times.items():
        for i, (shape, measured_s) in enumerate(zip(fitted + unseen, of, strict=True)):
            predicted = predict(machine, shape, ranks, cores)
            used = i < count and ranks <= 2
            error = predicted / measured_s - 1
            figures = f"{1e3 * measured_s:.2f} | {1e3 * predicted:.2f} | {error:+.0%}"
            print(f"| {ranks} | {shape.batch} | {shape.classes:,} | {shape.dim} "
                  f"| {'yes' if used else 'no'} | {figures} |")  # fmt: skip
            checks.append({"ranks": ranks, **shape._asdict(), "fitted": used,
                           "measured": measured_s, "predicted": predicted})  # fmt: skip
    off = [abs(c["predicted"] / c["measured"] - 1) for c in checks if not c["fitted"]]
    print(f"\nNot used for the fit: median error {np.median(off):.0%}, largest {max(off):.0%}")
    result = {"machine": machine._asdict(), "gpu": GPU._asdict(), "cores": cores, "checks": checks}
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(options.output.with_suffix(".png"), checks)


if __name__ == "__main__":
    main()
