"""Bytes on the wire per step and rank, measured: our sharded loss against PartialFC v2's pattern.

    python benchmarks/wire_bytes.py --ranks 2 4 --batch 256 --dim 512

Processes on this machine exchange over TCP (Gloo), and each asks the kernel how much its sockets
have sent. PartialFC v2's pattern is its sequence of collectives on tensors of its sizes, without
the arithmetic: gather of embeddings and of labels, MAX and SUM of one number per sample, SUM of the
losses, and in backward one reduction per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS = 10


def bytes_sent() -> int:
    """What the TCP sockets of this process have sent so far, payload only (Linux)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        with copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) >= 208:  # tcpi_bytes_sent less tcpi_bytes_retrans
                total += int.from_bytes(info[200:208], "little")
                total -= int.from_bytes(info[208:216], "little")
    return total


def partial_fc_step(rank: int, world_size: int, embeddings: torch.Tensor) -> None:
    """The messages of one step of PartialFC v2, forward and backward."""
    batch = len(embeddings)
    gathered = [torch.empty_like(embeddings) for _ in range(world_size)]
    dist.all_gather(gathered, embeddings)
    labels = torch.zeros(batch, dtype=torch.int64)
    dist.all_gather([torch.empty_like(labels) for _ in range(world_size)], labels)
    per_sample = torch.zeros(world_size * batch, 1)
    dist.all_reduce(per_sample, op=dist.ReduceOp.MAX)
    dist.all_reduce(per_sample)
    dist.all_reduce(per_sample)
    for destination in range(world_size):
        dist.reduce(gathered[destination], destination)


def measure(step) -> float:
    step()
    dist.barrier()
    before = bytes_sent()
    for _ in range(STEPS):
        step()
    sent = (bytes_sent() - before) / STEPS
    dist.barrier()
    return sent


def worker(rank: int, world_size: int, port: int, batch: int, dim: int, queue) -> None:
    from unicom_ext import PartialMarginSoftmax

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    loss = PartialMarginSoftmax(
        dim, 1000, sample_rate=0.1, process_group=dist.group.WORLD, uneven_batches=False
    )
    embeddings = torch.randn(batch, dim, requires_grad=True)
    labels = torch.arange(batch) % 1000
    ours = measure(lambda: loss(embeddings, labels).backward())
    theirs = measure(lambda: partial_fc_step(rank, world_size, embeddings.detach()))
    queue.put((rank, ours, theirs))
    dist.destroy_process_group()


def main() -> None:
    from unicom_ext.loss.sharded.volume import communication_volume

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=256, help="samples per rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    print(f"B = {options.batch} per rank, d = {options.dim}, fp32; bytes sent per step\n")
    print("| ranks | rank | ours | counted | PartialFC v2 | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for world_size in options.ranks:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(worker, (world_size, port, options.batch, options.dim, queue), nprocs=world_size)
        counted = communication_volume(options.batch, options.dim, world_size).total
        for rank, ours, theirs in sorted(queue.get() for _ in range(world_size)):
            print(
                f"| {world_size} | {rank} | {ours:,.0f} | {counted:,} | {theirs:,.0f} "
                f"| {theirs / ours:.2f} |"
            )
            results.append(
                {"ranks": world_size, "rank": rank, "ours": ours, "counted": counted,
                 "partial_fc_v2": theirs}
            )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"batch": options.batch, "dim": options.dim,
                                            "results": results}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
