"""The processes of a clustering: one, or those that torchrun started. torch.distributed does the
work; with one process nothing is initialised and nothing is communicated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.shard import all_gather, reduce_scatter


class ProcessFailed(RuntimeError):
    """Another process raised; the message says which, and what."""


class Ranks:
    """All processes of the default group, if there is one; or this one alone.

    rank, size: of this process, and how many there are.
    """

    def __init__(self, alone: bool = False) -> None:
        grouped = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.size = dist.get_world_size() if grouped else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """The part [start, stop) of `rows` that is this process's."""
        return rows * self.rank // self.size, rows * (self.rank + 1) // self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the processes; x itself, changed in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x of the first process, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def unit_sums(self, sums: Tensor) -> Tensor:
        """The sums [k, d] float64 over all processes, divided by their norms: [k, d] float32, zero
        where the sum is zero. `sums` is used up.

        Each process gets the sums of its part of the clusters (reduce-scatter), divides, and sends
        float32 to the others: half of what an all-reduce of the sums would send.
        """
        if self.size == 1:
            return _unit(sums)
        k, d = sums.shape
        part = -(-k // self.size)
        if part * self.size != k:
            sums = torch.cat([sums, sums.new_zeros(part * self.size - k, d)])
        own = sums.new_empty(part, d)
        reduce_scatter(own, sums)
        units = torch.empty(part * self.size, d)
        all_gather(units, _unit(own))
        return units[:k].clone()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one process fails on all: on the others with `ProcessFailed`. The block
        must not communicate."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        if self.size > 1:
            texts: list[str | None] = [None] * self.size
            dist.all_gather_object(texts, failure and f"{type(failure).__name__}: {failure}")
            if failure is None:
                for rank, text in enumerate(texts):
                    if text is not None:
                        raise ProcessFailed(f"process {rank} of {self.size} failed: {text}")
        if failure is not None:
            raise failure


def _unit(sums: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return (sums / torch.where(norm > 0, norm, torch.inf)).float()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The processes that torchrun started, joined for the length of the block."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        if started:
            dist.destroy_process_group()
