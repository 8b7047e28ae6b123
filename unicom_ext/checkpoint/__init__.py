"""Checkpoints that any number of ranks can read: modules, optimizers and plain values::

    checkpoint.save("runs/a/step-1000", modules={"encoder": encoder, "loss": loss_fn},
                    optimizers={"main": optimizer}, extra={"epoch": 3})
    extra = checkpoint.load("runs/a/step-1000", modules=..., optimizers=...)

A checkpoint is a directory of `torch.distributed.checkpoint`: every rank writes and reads its
own rows. Prototypes, and the optimizer state that belongs to them row by row, are global tensors
[C, ...], of classes with several centres [C, K, ...]: eight ranks save, three load. `class_map`
loads into a loss of other classes. Everything in it is a tensor (plain values are JSON in a tensor
of bytes), so reading one runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.optim import Optimizer

from unicom_ext.checkpoint.classes import RowPlanner, described
from unicom_ext.checkpoint.directory import (
    ABOUT,
    FORMAT,
    VERSION,
    latest,
    merge,
    read_about,
    read_tensors,
    show,
    split,
    write_tensors,
)
from unicom_ext.checkpoint.parts import Parts, check_plain
from unicom_ext.checkpoint.plan import Plan
from unicom_ext.distributed.failures import agree, failures_of
from unicom_ext.utils.files import CheckpointError, sync_directory

__all__ = ["CheckpointError", "latest", "load", "merge", "read_about", "save", "show", "split"]


def save(
    directory: str | os.PathLike[str],
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint. Every rank calls this, and all return or all raise.

    The directory appears when it is whole, under its name: a run that is killed on the way leaves
    nothing but a directory with ``.tmp`` at its end, which the next save to the name replaces.

    Args:
        directory: on a file system that all ranks share; must not exist.
        modules: by name. They, and parts of them, may be inside torch.compile,
            DistributedDataParallel, FSDP or torch's activation checkpointing: the names of these
            wrappers are left out of the names of tensors.
        optimizers: by name; of parameters of the modules.
        extra: what JSON can hold: step, epoch, settings.
        process_group: the ranks that save; default the group of a `PartialMarginSoftmax` among the
            modules, else all ranks of a program that has initialised torch.distributed.

    Raises:
        CheckpointError: the directory is there already, or something cannot be saved.
        OSError: writing failed.
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    parts = Parts(modules, optimizers or {}, process_group)
    for loss in parts.losses.values():
        if loss.shard is not None:
            failures_of(loss.shard.group).raise_earlier()  # in the last step
    failure = None
    state: dict[str, Tensor] = {}
    try:
        extra = dict(extra or {})
        check_plain("extra", extra)
        state, about = parts.collect()
        text = json.dumps({"format": FORMAT, "version": VERSION, **about, "extra": extra})
        state[ABOUT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        if parts.is_first:
            if directory.exists():
                raise CheckpointError(f"{directory}: is there already")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except Exception as error:
        failure = error
    # Ranks that would name other tensors must not write them.
    agree({"the tensors to save": sorted(state)}, failure, parts.group)
    # What all ranks have is the first one's, whose running statistics DDP hands to the others.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    where = {"process_group": parts.group, "no_dist": parts.group is None}
    write_tensors(state, checkpoint_id=temporary, planner=planner, **where)
    failure = None
    if parts.is_first:
        try:
            os.rename(temporary, directory)
            sync_directory(directory.parent)
        except OSError as error:
            failure = error
    agree({}, failure, parts.group)


def load(
    directory: str | os.PathLike[str] | None,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    class_map: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into modules and optimizers, in place.

    Every rank calls this; their number need not be that of the ranks that saved, nor need modules
    be in the same wrappers.

    Args:
        directory: what `save` wrote; None, as `latest` gives it where there is none, is refused.
        modules: as for `save`, with the same names; those of the checkpoint that are not named are
            left out.
        optimizers: as for `save`, with the same names, or left out.
        class_map: int64 [C], for a loss of C classes that are not those of the checkpoint: the
            class there that each class here goes on from, or -1 for a class that is new, which
            keeps its initial prototype and gets fresh optimizer state. In any order; a class there
            may be split among several here, which then start alike. Or int64 [C, m], up to m
            classes there that are merged into each class here, filled up with -1: the prototype
            gets the direction of the mean of their unit rows, and the mean of their norms;
            optimizer state is the mean of theirs (of steps that a row has had, the maximum), when
            they have been brought up to date as by `RowAdamW.catch_up`. The same on every rank.
            ``torch.arange(C)`` with -1 past the old classes appends classes;
            ``torch.tensor(kept_ids)`` drops those that are not in it. With `num_centers` > 1 a
            class takes all centres of another; classes cannot be merged.
        process_group: as for `save`.

    Returns:
        What was given to `save` as `extra`.

    Raises:
        CheckpointError: it is not there, not whole, or does not fit.
        ValueError: the class_map does not fit.

    Every rank raises, and nothing has changed then. (Bytes that are damaged within a file are met
    when it is read, after what was read before them has changed.)
    """
    parts = Parts(modules, optimizers or {}, process_group)
    failure, plan, same = None, None, {}
    try:
        if directory is None:
            raise CheckpointError("there is no checkpoint to load: `latest` has found none")
        plan = Plan(Path(directory), parts, class_map)
        same["class_map"] = described(class_map)
    except Exception as error:
        failure = error
    agree(same, failure, parts.group)
    assert plan is not None
    where = {
        "checkpoint_id": plan.directory,
        "process_group": parts.group,
        "no_dist": parts.group is None,
    }
    read_tensors(plan.whole, **where)
    if plan.rows:
        read_tensors({key: rows.buffer for key, rows in plan.rows.items()}, **where,
                 planner=RowPlanner(plan.rows))  # fmt: skip
    plan.finish()
    return plan.about["extra"]
