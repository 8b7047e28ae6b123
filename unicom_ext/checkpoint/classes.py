"""Loading into other classes: which saved rows each class goes on from, and several made one."""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.optim import Optimizer

from unicom_ext.checkpoint.planner import TensorPlanner


def check_class_map(class_map: Tensor, num_classes: int, saved_classes: int) -> None:
    """ValueError unless each class here has saved classes, each at most once, or -1s alone."""
    if not isinstance(class_map, Tensor) or class_map.dtype != torch.int64:
        got = class_map.dtype if isinstance(class_map, Tensor) else type(class_map).__name__
        raise ValueError(f"class_map must be an int64 tensor, got {got}")
    of_class = class_map.unsqueeze(-1) if class_map.dim() == 1 else class_map
    if of_class.dim() != 2 or len(of_class) != num_classes or of_class.shape[1] == 0:
        raise ValueError(
            f"class_map must have one entry for each of the {num_classes} classes of the loss, or "
            f"one row of entries, got the shape {list(class_map.shape)}"
        )
    bad = ((of_class < -1) | (of_class >= saved_classes)).nonzero()
    if len(bad):
        here, place = bad[0].tolist()
        raise ValueError(
            f"class_map must hold classes of the checkpoint in [0, {saved_classes}), or -1 for "
            f"none, got {int(of_class[here, place])} for class {here}"
        )
    ordered = of_class.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        here, place = twice[0].tolist()
        raise ValueError(
            "class_map must name a class of the checkpoint once for a class here, got "
            f"{int(ordered[here, place])} twice for class {here}"
        )


def described(class_map: Tensor | None) -> str:
    """What ranks compare."""
    if not isinstance(class_map, Tensor):
        return str(class_map)
    digest = hashlib.sha256(class_map.cpu().contiguous().numpy().tobytes()).hexdigest()
    return f"{list(class_map.shape)} (SHA-256 {digest[:12]})"


class OldClasses:
    """The saved classes that this rank's classes go on from.

    ids: int64 [u], all of them, ascending.
    fresh, single, merged: bool [rows], whether a class here has none, one or several.
    place: int64 [rows], where in `ids` the one is.
    merging: int64 [v], places in `ids` of those that are merged, ascending.
    places: int64 [merged.sum(), m], where in `merging` those of each class are, -1 for none.
    """

    def __init__(self, class_map: Tensor, start: int, count: int) -> None:
        old = class_map.cpu()[start : start + count]
        old = old.unsqueeze(-1) if old.dim() == 1 else old
        number = (old >= 0).sum(dim=1)
        self.fresh, self.single, self.merged = number == 0, number == 1, number > 1
        self.ids, place = _numbered(old)
        self.place = place.amax(dim=1)
        self.merging, self.places = _numbered(place[self.merged])


def _numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are not negative, ascending, and each value's place in them, -1 for none."""
    known = values >= 0
    distinct = values[known].unique()
    return distinct, torch.where(known, torch.searchsorted(distinct, values.contiguous()), -1)


@dataclass
class Rows:
    """Rows of a saved tensor for this rank's classes, where they are not the same classes."""

    old: OldClasses
    buffer: Tensor  # [u, ...] the saved rows of old.ids
    target: Tensor  # [rows, ...]
    up_to_date: Tensor | None = None  # [v, ...] those of old.merging; None: as in the buffer

    def fill(self, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Give each row of the target what it goes on from; those of new classes stay.

        merge: rows [v, ...] and places [n, m] in them, -1 for none -> [n, ...], each several rows
            made one.
        """
        old = self.old
        self._put(old.single, self.buffer[old.place[old.single]])
        if len(old.merging):
            rows = self.buffer[old.merging] if self.up_to_date is None else self.up_to_date
            self._put(old.merged, merge(rows, old.places))

    def _put(self, where: Tensor, rows: Tensor) -> None:
        self.target[where.to(self.target.device)] = rows.to(self.target)


def merged_prototypes(rows: Tensor, places: Tensor) -> Tensor:
    """The direction of the mean of the unit rows, as only directions count in the loss, with the
    mean of their norms, on which it depends how far a step turns the row. Zero where they cancel.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norm > 0, rows / norm, 0.0)
    mean = merged_state(unit, places)
    length = mean.norm(dim=1, keepdim=True)
    return torch.where(length > 0, mean / length, 0.0) * merged_state(norm, places)


def merged_state(rows: Tensor, places: Tensor) -> Tensor:
    """The mean of state by rows, and the maximum of counts, rows [v].

    A moment is biased towards zero by its row's few steps. With the largest count the mean is
    corrected for the least of it: a smaller one would blow up the moments of the rows that have had
    more steps, for second moments by up to 1 / (1 - beta2).
    """
    if not rows.is_floating_point():
        return torch.where(places >= 0, rows[places], 0).amax(dim=1)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros((len(places), *rows.shape[1:]), dtype=dtype)
    for column in places.T:  # not all at once, which would take m times as much memory
        there = column >= 0
        total[there] += rows[column[there]].to(dtype)
    number = (places >= 0).sum(dim=1)
    return total / number.view(-1, *[1] * (rows.dim() - 1))


def catch_up(
    optimizer: Optimizer, prototypes: Rows, state: Mapping[str, Rows], shared: Mapping[str, Any]
) -> None:
    """Bring the rows that will be merged up to date, where the optimizer lets rows lag.

    Rows lag by different numbers of steps, and what they have missed depends on the row: decay, or
    momentum that goes on. So a mean is one of rows that have missed nothing, nor does it itself.
    Where such a row is also kept as it is, it goes on lagging.

    shared: what the state has for all rows together.
    """
    merging = prototypes.old.merging
    if not len(merging) or not hasattr(optimizer, "catch_up"):
        return
    param = nn.Parameter(prototypes.buffer[merging])
    values = {key: rows.buffer[merging] for key, rows in state.items()}
    stand_in: Any = copy.copy(optimizer)
    stand_in.state = defaultdict(dict, {param: {**copy.deepcopy(dict(shared)), **values}})
    stand_in.catch_up()
    prototypes.up_to_date = param.detach()
    for key, rows in state.items():
        rows.up_to_date = stand_in.state[param][key]


class RowPlanner(TensorPlanner):
    """Reads rows of saved tensors, whichever ranks wrote them.

    One piece of a file after the other is read, and of each only what is wanted is kept.
    """

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        self.rows = rows

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, rows in self.rows.items():
            ids = rows.old.ids
            if len(ids) > 0:
                offsets = torch.Size([int(ids[0]), *[0] * (rows.buffer.dim() - 1)])
                span = torch.Size([int(ids[-1]) + 1 - int(ids[0]), *rows.buffer.shape[1:]])
                chunk = ChunkStorageMetadata(offsets, span)
                saved = self.metadata.state_dict_metadata[key]
                found = create_read_items_for_chunk_list(key, saved, [chunk])
                items += (item for item in found if len(self._wanted(item)[0]))
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        buffer = self.rows[read_item.dest_index.fqn].buffer
        return torch.empty(read_item.lengths, dtype=buffer.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        wanted, into = self._wanted(read_item)
        into.copy_(tensor[wanted])

    def _wanted(self, item: ReadItem) -> tuple[Tensor, Tensor]:
        """Which rows of a piece are wanted, and the part of the buffer that they belong into."""
        rows = self.rows[item.dest_index.fqn]
        ids = rows.old.ids
        begin = int(ids[0]) + item.dest_offsets[0]
        bounds = torch.tensor([begin, begin + item.lengths[0]])
        first, last = torch.searchsorted(ids, bounds).tolist()
        into = rows.buffer[first:last]
        for dim in range(1, into.dim()):
            into = into.narrow(dim, item.dest_offsets[dim], item.lengths[dim])
        return ids[first:last] - begin, into
