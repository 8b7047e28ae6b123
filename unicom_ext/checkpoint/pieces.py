"""Tensors of any size, written and read piece by piece: of ten million prototypes no second copy.

`write` is for tensors that are somewhere else, in files of other programs; `read_rows` is for the
rows that one rank of another program will own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, LoadPlan, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from unicom_ext.checkpoint.directory import ABOUT, FORMAT, VERSION, read_tensors, write_tensors
from unicom_ext.checkpoint.planner import TensorPlanner
from unicom_ext.utils.files import CheckpointError, sync_directory

PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Pieces:
    """A tensor whose rows are made when they are written.

    shape, dtype: of all of it.
    rows: start, stop -> tensor [stop - start, ...], on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Of each piece, start and stop."""
        row_bytes = max(math.prod(self.shape[1:]) * self.dtype.itemsize, 1)
        count = max(PIECE_BYTES // row_bytes, 1)
        for start in range(0, self.shape[0], count):
            yield start, min(start + count, self.shape[0])


def write(
    directory: Path,
    tensors: Mapping[str, Tensor | Pieces],
    *,
    classes: Mapping[str, Any],
    optimizers: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint of tensors by their names in it, in one process.

    Args:
        directory: must not exist. It appears when it is whole.
        tensors, classes, optimizers, extra: what `unicom_ext.checkpoint.save` would write.

    At most one piece of each of `Pieces` is in memory at a time.

    Raises CheckpointError, or what making rows raised; nothing is left then.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: is there already")
    about = {"format": FORMAT, "version": VERSION, "classes": classes, "optimizers": optimizers}
    text = json.dumps({**about, "extra": extra}).encode()
    state = {**tensors, ABOUT: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_tensors(state, checkpoint_id=temporary, no_dist=True, planner=_PiecePlanner())
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def read_rows(
    directory: Path, metadata: Any, names: Mapping[str, str], start: int, stop: int
) -> dict[str, Tensor]:
    """Rows [start, stop) of tensors of a checkpoint, by the names here of those there.

    Beside the rows at most one piece of a file is in memory, as large as the rank that has saved it
    has made it.
    """
    targets = {}
    for here, there in names.items():
        entry = metadata.state_dict_metadata[there]
        targets[here] = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
    by_name_there = {there: targets[here] for here, there in names.items()}
    planner = _RowsPlanner(by_name_there, start)
    read_tensors(by_name_there, checkpoint_id=directory, no_dist=True, planner=planner)
    return targets


class _PiecePlanner(DefaultSavePlanner):
    """Writes what is in `Pieces` as pieces of one tensor."""

    def create_local_plan(self) -> SavePlan:
        whole, self.pieces = self.state_dict, {}
        self.state_dict = {}
        items: list[WriteItem] = []
        for name, value in whole.items():
            if isinstance(value, Pieces):
                self.pieces[name] = value
                items += _write_items(name, value)
            else:
                self.state_dict[name] = value
        plan = super().create_local_plan()
        self.plan = SavePlan([*plan.items, *items], planner_data=plan.planner_data)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | Any:
        pieces = self.pieces.get(write_item.index.fqn)
        if pieces is None:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        start = chunk.offsets[0]
        return pieces.rows(start, start + chunk.sizes[0]).contiguous()


def _write_items(name: str, pieces: Pieces) -> Iterator[WriteItem]:
    properties = TensorProperties(dtype=pieces.dtype)
    rest = pieces.shape[1:]
    for start, stop in pieces.bounds():
        chunk = ChunkStorageMetadata(
            torch.Size([start, *[0] * len(rest)]), torch.Size([stop - start, *rest])
        )
        yield WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(pieces.shape)),
        )


class _RowsPlanner(TensorPlanner):
    """Reads the same rows of several tensors, whichever ranks wrote them."""

    def __init__(self, targets: Mapping[str, Tensor], start: int) -> None:
        self.targets, self.start = targets, start

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, target in self.targets.items():
            offsets = torch.Size([self.start, *[0] * (target.dim() - 1)])
            chunk = ChunkStorageMetadata(offsets, target.shape)
            saved = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, saved, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        into = self.targets[read_item.dest_index.fqn]
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            into = into.narrow(dim, offset, length)
        return into

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was read in place
