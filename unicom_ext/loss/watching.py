"""Looks at losses while they are trained: mistakes that raise nothing and train badly.

A warning is given once for a loss. Of what other ranks must know, a step of an optimizer that one
rank has left out alone, the steps are counted here, and compared in the next step of the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from unicom_ext.distributed.failures import failures_of
from unicom_ext.distributed.shard import ClassShard, class_range

_IN_EVAL = 5  # steps; fewer may belong to gradients of before
_EXPECTED = 1000  # labels of a rank's own classes, if all classes were equally frequent


@dataclass
class _Watched:
    """A loss, and what is known of it."""

    loss: ReferenceType[nn.Module]
    steps_in_eval: int = 0
    version: int | None = None  # of the loss's counter of training calls, at the last step
    labels: int = 0  # of all ranks, ignored ones included
    counts: Tensor | None = None  # int64 [2], of labels of this rank's classes and of others
    told: set[str] = field(default_factory=set)


_watched: dict[int, _Watched] = {}  # by the ids of the losses


def watch(loss: nn.Module) -> None:
    """From now on look at a loss, an owner of prototypes."""
    key = id(loss)
    _watched[key] = _Watched(ref(loss, lambda _: _watched.pop(key, None)))


def _look(optimizer: Optimizer, *_: Any) -> None:
    """After each step of any optimizer."""
    for watched in tuple(_watched.values()):
        loss: Any = watched.loss()
        if loss is None:
            continue
        param = loss._parameters.get("weight")
        if param is None:  # where weight_norm or the like has put a function of these
            param = next(loss.parameters(), None)
        if param is None:
            continue
        holds = _holds(optimizer, param)
        if not holds and loss.training:
            loss._standing_still.look(param)
        if holds:
            # Fused optimizers change nothing at a learning rate of 0, not even torch's count.
            loss._standing_still.steps = 0
            if loss.shard is not None and _all_have_classes(loss.shard):
                with suppress(ValueError):  # the group was destroyed
                    failures_of(loss.shard.group).optimizer_steps += _steps_of(optimizer)
            for mistake, message in _mistakes(watched, loss, param):
                if mistake not in watched.told:
                    watched.told.add(mistake)
                    warnings.warn(message, stacklevel=3)


register_optimizer_step_post_hook(_look)


def _holds(optimizer: Optimizer, param: Tensor) -> bool:
    """From the end, where prototypes usually are."""
    groups = reversed(optimizer.param_groups)
    return any(other is param for group in groups for other in reversed(group["params"]))


def _all_have_classes(shard: ClassShard) -> bool:
    """Or else the last rank has none, and may have left its empty prototypes in no optimizer."""
    start, stop = class_range(shard.num_classes, shard.world_size, shard.world_size - 1)
    return start < stop


def _mistakes(watched: _Watched, loss: Any, param: Tensor) -> Iterator[tuple[str, str]]:
    """Of a loss of which an optimizer has just updated the prototypes."""
    before, watched.version = watched.version, loss.step._version
    # An evaluation may stand between the gradient and the step; or there is no gradient.
    trains = loss.training or param.grad is None or before not in (None, watched.version)
    watched.steps_in_eval = 0 if trains else watched.steps_in_eval + 1
    if watched.steps_in_eval >= _IN_EVAL and loss.draws:
        yield (
            "eval",
            f"an optimizer has updated the prototypes at {_IN_EVAL} steps while the loss was in "
            "eval() mode, where all classes and dimensions take part, whatever sample_rate and "
            "feature_rate are: call train() of the loss (or of the model it is a part of) after "
            "each evaluation",
        )
    if param.dtype == torch.float16:
        yield (
            "float16",
            "the prototypes (the weight of the loss) are float16, in which small updates are "
            "rounded away and an optimizer's moments underflow: keep them in float32 and give the "
            'loss precision="fp16", which multiplies in float16',
        )
    if loss.shard is None and dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        if world_size > 1:
            yield (
                "alone",
                f"the loss has no process_group, and there are {world_size} ranks: each trains "
                "prototypes of its own on its own batches. Give every rank's loss "
                "process_group=torch.distributed.group.WORLD, unless you average its gradients",
            )


def look_at_labels(loss: Any, slot: Tensor) -> None:
    """After a training call with a process group, until it is known that this rank's classes occur.

    slot: int64, of the labels of all ranks: >= 0 for this rank's classes, -1 where ignored.
    """
    watched, shard = _watched.get(id(loss)), loss.shard
    if watched is None or "labels" in watched.told or not len(shard):
        return
    if slot.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    counts = torch.stack([(slot >= 0).sum(), (slot < -1).sum()])
    watched.counts = counts if watched.counts is None else watched.counts + counts
    watched.labels += slot.numel()
    share = len(shard) / loss.num_classes
    if watched.labels * share < _EXPECTED:
        return
    watched.told.add("labels")
    own, others = watched.counts.tolist()  # where they are on a device, the host waits once
    if own == 0 and others * share > _EXPECTED / 2:
        warnings.warn(
            f"of the last {others} labels of all ranks none is of the classes {shard.start} to "
            f"{shard.stop - 1}, which rank {shard.rank} owns: labels are class ids in [0, "
            f"{loss.num_classes}) on every rank, not places in a rank's own part; and samples must "
            "be shuffled",
            stacklevel=5,
        )


def _steps_of(optimizer: Optimizer) -> int | Tensor:
    """1, or 0 where a GradScaler lets an optimizer leave out the step itself, which those do that
    are fused. Others it does not call. On a device nobody waits for the number."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return 1
    if found.is_cuda and torch.cuda.is_current_stream_capturing():
        return 1
    return (found.detach() != 1).long().reshape(())  # as the fused kernels read it
