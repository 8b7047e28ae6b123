"""What the adaptive margins share: checks, which samples count, norms, and what ranks tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_ext.loss.options import kind
from unicom_ext.ops import counter


class OfRanks(nn.Module):
    """A margin made of the batches of all ranks of a `process_group`, or of one process."""

    process_group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.process_group)] = self.process_group  # the copy is on the same rank of it
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise TypeError(
                f"{type(self).__name__} with a process_group cannot be pickled: save its "
                "state_dict instead"
            )
        return super().__reduce_ex__(protocol)


def number(name: str, value: object, low: float, high: float, *, low_too: bool = True) -> float:
    """A real number in [low, high], or in (low, high] without `low_too`; finite."""
    allowed = f"a number in {'[' if low_too else '('}{low:g}, {high:g}]"
    if math.isinf(high):
        allowed = f"a finite number {'>=' if low_too else '>'} {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {kind(value)}: {value!r}")
    real = float(value)
    if not low <= real <= high or (real == low and not low_too) or math.isinf(real):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return real


def check_labels(labels: Tensor, device: torch.device | None = None) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be an int32 or int64 tensor, got {kind(labels)}")
    if device is not None and labels.device != device:
        raise ValueError(f"labels must be on {device} like the margins, got {labels.device}")


def check_embeddings(embeddings: Tensor, labels: Tensor) -> None:
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"embeddings must be a floating point tensor, got {kind(embeddings)}")
    if embeddings.dim() != 2 or labels.dim() == 0 or len(embeddings) != len(labels):
        raise ValueError(
            "embeddings must be [B, d] with a row for each of the labels "
            f"{list(labels.shape)}, got {list(embeddings.shape)}"
        )
    if embeddings.device != labels.device:
        raise ValueError(
            f"embeddings must be on {labels.device} like the labels, got {embeddings.device}"
        )


def with_part(labels: Tensor, ignore_index: int) -> Tensor:
    """Which samples have part in the loss, [B]: those with a label that is not ignored."""
    kept = labels != ignore_index
    return kept if kept.dim() == 1 else kept.flatten(1).any(dim=1)


def norms(embeddings: Tensor, kept: Tensor) -> Tensor:
    """Lengths [B], float32 at least; 0 for samples without part, whose gradient is 0 then whatever
    their rows hold."""
    rows = embeddings.masked_fill(~kept[:, None], 0.0)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype)


def refuse_repetition(margin: nn.Module) -> None:
    """RuntimeError where activation checkpointing repeats a call that has changed buffers."""
    if not torch.compiler.is_compiling() and counter.in_backward():
        raise RuntimeError(
            f"{type(margin).__name__} is called in backward, as activation checkpointing does, and "
            "cannot make the margins that it made at first: leave it and the loss, which keeps no "
            "logits, out of what is checkpointed"
        )


def of_all_ranks(
    row: Callable[[], Tensor], width: int, device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
    """The [width] float64 numbers of each rank, [world_size, width], the same on every rank.

    Where `row` raises on one rank all raise, the others a `RankFailed` (on a GPU, where to know
    would be to wait, only the rank itself does).
    """
    if group is None:
        return row()[None]
    from unicom_ext.distributed.failures import RankFailed
    from unicom_ext.distributed.ranks import Ranks

    ranks, failure = Ranks(group), None
    try:
        mine = row()
    except (TypeError, ValueError, RuntimeError) as error:
        failure = error
        mine = torch.full((width,), math.nan, dtype=torch.float64, device=device)
    rows = ranks.gather(mine[None])
    if failure is not None:
        raise failure
    if device.type == "cpu" and (failed := rows[:, 0].isnan()).any():
        raise RankFailed(f"rank {int(failed.nonzero()[0])} could not make its margins")
    return rows
