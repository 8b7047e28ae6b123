"""Processes that work together, and what they send each other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import RankFailed, exchange

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Word = TypeVar("Word")


def default_group() -> dist.ProcessGroup | None:
    """All processes, where torch.distributed is initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


class Ranks:
    """The processes of a group, or this one alone, which sends nothing.

    Args:
        group: None for this process alone.

    Attributes:
        rank, world_size: this process in it, and how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        # Who destroys a group must be the last to hold it: its threads end with it, and one that is
        # left when the interpreter ends can abort the process.
        self._group = None if group is None else weakref.ref(group)
        self.check_alive()
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Raises ValueError where it was destroyed."""
        if self._group is None:
            return None
        group = self._group()
        if group is None:
            raise ValueError("process_group was destroyed")
        return group

    def check_alive(self) -> None:
        """ValueError where the group was destroyed."""
        if (group := self.group) is not None:
            try:
                dist.get_process_group_ranks(group)
            except (KeyError, ValueError):
                raise ValueError("process_group was destroyed") from None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """The part [start, stop) of `rows` that is this process's."""
        return rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; x itself, changed in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of x over the ranks; x itself, changed in place."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x of the first rank, in place."""
        if self.group is not None:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def of_first(self, word: Word) -> Word:
        """What the first rank has given, on all: anything that can be pickled."""
        words = [word]
        if self.group is not None:
            dist.broadcast_object_list(words, group=self.group, group_src=0)
        return words[0]

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank, the same n everywhere -> [world_size * n, ...] in rank order."""
        if self.group is None:
            return rows
        result, arrival = self.start_gather(rows)
        arrival.wait()
        return result

    def start_gather(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """`gather` of a group, and what must be waited for before the result is read."""
        result = rows.new_empty((self.world_size * len(rows), *rows.shape[1:]))
        work = _all_gather(result, rows.contiguous(), group=self.group, async_op=True)
        return result, work

    def sum_scatter(self, rows: Tensor) -> Tensor:
        """[world_size * n, ...] on each rank, summed over ranks -> this rank's [n, ...]."""
        if self.group is None:
            return rows
        if backend(self.group, rows.device) == "gloo":
            # Its reduce-scatter is an all-reduce of everything: twice the bytes of this.
            return self.swap(rows).sum(dim=0)
        result = rows.new_empty((len(rows) // self.world_size, *rows.shape[1:]))
        _reduce_scatter(result, rows.contiguous(), group=self.group)
        return result

    def swap(self, rows: Tensor) -> Tensor:
        """[world_size * n, ...], n rows for each rank -> [world_size, n, ...], each rank's for this
        one."""
        parts = torch.empty_like(rows, memory_format=torch.contiguous_format)
        if self.group is None:
            parts.copy_(rows)
        else:
            dist.all_to_all_single(parts, rows.contiguous(), group=self.group)
        return parts.view(self.world_size, len(rows) // self.world_size, *rows.shape[1:])

    def sends_from(self, device: torch.device) -> torch.device:
        """Where large tensors of `device` are best sent from: there, or from the CPU if it would be
        Gloo that takes them there, as it copies them to the CPU itself."""
        if self.group is None or backend(self.group, device) != "gloo":
            return device
        return torch.device("cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one process fails on all: on the others with `RankFailed`. The block must
        not communicate."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        for rank, (reason, _) in enumerate(exchange(None, failure, self.group)):
            if reason is not None:
                raise RankFailed(f"process {rank} of {self.world_size} failed: {reason}")


def backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """Which of its backends a group sends tensors of a device with, such as "gloo"."""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return dict(pairs).get(device.type, "")
