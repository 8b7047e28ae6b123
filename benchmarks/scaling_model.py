"""Step time and memory of the sharded loss for any number of ranks: a model, fitted and checked.

    python benchmarks/scaling_model.py --output benchmarks/results/scaling

A step of rank r of n, with b samples, C classes, rates r1 and r2, d dimensions:

    time = t0 + (6 + 2) * B * (S / n) * d' / F + update * (S / n) * d / M + messages
    messages = rounds(n) * alpha + bytes(n) / beta

B = n b, S = r1 C + B, d' = r2 d. F (arithmetic), M (memory) and t0 are fitted to one process; alpha
and beta to two processes; the runs with other shapes and with 4 processes check it, and the error
is printed. On one machine the processes share its cores, so with more ranks than cores the local
part takes as many times longer. For GPUs the constants are those written below, not fitted to
anything: those predictions are only as good as they are.
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
    memory: float  # bytes/s, of row-wise passes
    alpha: float  # s per message round
    beta: float  # bytes/s sent


# 400 Tflop/s and 2.5 TB/s, about half of an H200's measured peaks; 400 Gbit/s of network per GPU.
GPU = Machine(start=2e-4, flops=4e14, memory=2.5e12, alpha=1.5e-5, beta=5e10)


def work(shape: Shape, ranks: int) -> tuple[float, float, float, float]:
    """Operations, bytes of memory traffic, message rounds, bytes sent: of one rank in one step."""
    from unicom_ext.sharding import communication_volume

    everyone = ranks * shape.batch
    rows = min(shape.classes, shape.sample_rate * shape.classes + everyone) / ranks
    flops = 8 * everyone * rows * shape.dim * shape.feature_rate
    # Gather and pack, row gradients, and AdamW's weight and two moments, read and written.
    traffic = 10 * rows * shape.dim * 4
    rounds = 0 if ranks == 1 else 4 * (ranks - 1) if ranks <= 8 else 4 * np.log2(ranks)
    sent = communication_volume(shape.batch, shape.dim, ranks).total
    return flops, traffic, rounds, sent


def predict(machine: Machine, shape: Shape, ranks: int, share: float = 1.0) -> float:
    """Seconds per step. share: of a core and its memory that each rank has for itself."""
    flops, traffic, rounds, sent = work(shape, ranks)
    local = machine.start + flops / machine.flops + traffic / machine.memory
    return local / share + rounds * machine.alpha + sent / machine.beta


def memory(shape: Shape, ranks: int) -> float:
    """Bytes of a rank: weight and two moments, packed rows, row gradients, gathered embeddings."""
    everyone = ranks * shape.batch
    rows = min(shape.classes, shape.sample_rate * shape.classes + everyone) / ranks
    state = 3 * 4 * shape.classes / ranks * shape.dim
    return state + rows * shape.dim * (2 * shape.feature_rate + 4) + 8 * everyone * shape.dim


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
    dist.destroy_process_group()


def measure(shapes: list[Shape], ranks: int, steps: int) -> list[float]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measured, (ranks, port, shapes, steps, queue), nprocs=ranks)
    return [queue.get() for _ in shapes]


def fit(shapes: list[Shape], alone: list[float], pairs: list[float], cores: int) -> Machine:
    """Non-negative least squares, relative: start, F, M from one process; alpha, beta from two."""
    from scipy.optimize import nnls

    rows = np.array([[1.0, *work(s, 1)[:2]] for s in shapes])
    scale = rows.max(axis=0)
    times = np.array(alone)
    start, flop, byte = nnls(rows / scale / times[:, None], np.ones(len(times)))[0] / scale
    machine = Machine(start, 1 / max(flop, 1e-18), 1 / max(byte, 1e-18), 0.0, np.inf)
    share = min(1.0, cores / 2)
    rest = np.array(
        [max(0.0, t - predict(machine, s, 2, share)) for s, t in zip(shapes, pairs, strict=True)]
    )
    rows = np.array([work(s, 2)[2:] for s in shapes], dtype=float)
    scale, times = rows.max(axis=0), np.array(pairs)
    alpha, second = nnls(rows / scale / times[:, None], rest / times)[0] / scale
    return machine._replace(alpha=alpha, beta=1 / max(second, 1e-18))


def plot(path: Path, checks: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for ranks in sorted({check["ranks"] for check in checks}):
        of = [check for check in checks if check["ranks"] == ranks]
        left.loglog(
            [c["measured"] for c in of], [c["predicted"] for c in of], "o", label=f"{ranks}"
        )
    ends = [min(c["measured"] for c in checks), max(c["measured"] for c in checks)]
    left.loglog(ends, ends, "k:")
    left.set(title="measured on this CPU", xlabel="measured, s", ylabel="predicted, s")
    left.legend(title="ranks")
    counts = 2 ** np.arange(11)
    for classes in (1_000_000, 10_000_000, 100_000_000):
        shape = Shape(1024, classes, dim=512)
        steps = [1e3 * predict(GPU, shape, int(n)) for n in counts]
        middle.loglog(counts, steps, label=f"{classes // 10**6}M classes")
        right.loglog(counts, [memory(shape, int(n)) / 2**30 for n in counts])
    middle.set(title="GPUs, assumed constants: step, ms", xlabel="ranks, 1024 samples each")
    middle.legend()
    right.axhline(80, color="k", linestyle=":")
    right.set(title="memory per rank, GiB", xlabel="ranks")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="writes .json and .png")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    fitted = [Shape(64, 20_000), Shape(256, 20_000), Shape(64, 100_000), Shape(256, 100_000)]
    unseen = [Shape(128, 50_000), Shape(512, 50_000)]
    cores = len(os.sched_getaffinity(0))
    times = {n: measure(fitted + unseen, n, options.steps) for n in sorted({1, 2, *options.ranks})}
    count = len(fitted)
    machine = fit(fitted, times[1][:count], times[2][:count], cores)
    checks = []
    print("| ranks | b | classes | used for the fit | measured ms | predicted ms | error |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for ranks, of in times.items():
        for i, (shape, measured_s) in enumerate(zip(fitted + unseen, of, strict=True)):
            predicted = predict(machine, shape, ranks, min(1.0, cores / ranks))
            used = i < count and ranks <= 2
            error = predicted / measured_s - 1
            print(f"| {ranks} | {shape.batch} | {shape.classes:,} | {'yes' if used else 'no'} | "
                  f"{1e3 * measured_s:.2f} | {1e3 * predicted:.2f} | {error:+.0%} |")  # fmt: skip
            checks.append({"ranks": ranks, **shape._asdict(), "fitted": used,
                           "measured": measured_s, "predicted": predicted})  # fmt: skip
    off = [abs(c["predicted"] / c["measured"] - 1) for c in checks if not c["fitted"]]
    print(f"\nNot used for the fit: median error {np.median(off):.0%}, largest {max(off):.0%}")
    result = {"machine": machine._asdict(), "gpu": GPU._asdict(), "cores": cores, "checks": checks}
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(options.output.with_suffix(".png"), checks)


if __name__ == "__main__":
    main()
