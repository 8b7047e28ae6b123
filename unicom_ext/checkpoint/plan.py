"""Loading: what to read where, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unicom_ext.checkpoint.directory import read
from unicom_ext.checkpoint.names import SavedNames, joined, plain_name
from unicom_ext.checkpoint.parts import Parts, as_option
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.utils.files import CheckpointError


class _Rows(NamedTuple):
    """Rows of a saved tensor for this rank's classes, where they are not the same classes."""

    buffer: Tensor  # [n, ...] saved rows
    first: int  # the saved class of the first
    of_row: Tensor  # [rows] which row of the buffer each row of the target gets, -1 for none
    target: Tensor  # [rows, ...]


# What a row that was never updated holds in a state tensor, where that is not zero.
_FRESH = {"log_decay": "total_log_decay", "last_step": "step"}


class Plan:
    """What to read where, checked; `finish` puts the optimizers' state in its place."""

    def __init__(self, directory: Path, parts: Parts, class_map: Tensor | None) -> None:
        self.directory = directory
        self.parts = parts
        self.saved, self.about = read(directory)
        self.names = SavedNames(self.saved.state_dict_metadata)
        # Of what is in optimizers' states by "optimizers.NAME.PARAMETER": its name by its key.
        self.saved_states: dict[str, dict[str, str]] = {}
        for key in self.saved.state_dict_metadata:
            of_param, _, short = plain_name(key).rpartition(".")
            self.saved_states.setdefault(of_param, {})[short] = key
        self.whole: dict[str, Tensor] = {}
        self.rows: dict[str, _Rows] = {}
        self.module_states = parts.module_states()
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}  # of optimizers' parameters
        self._check_classes(class_map)
        self.class_map = class_map
        for key, value in parts.named(self.module_states):
            self._add(key, parts.losses.get(key), value)
        for name, optimizer in parts.optimizers.items():
            self._add_optimizer(name, optimizer)

    def _check_classes(self, class_map: Tensor | None) -> None:
        classes = self.about["classes"]
        names = SavedNames(classes)
        for key, loss in self.parts.losses.items():
            name = names.find(key)
            if name is None:
                raise CheckpointError(f"{self.directory}: has no {key}, only {sorted(classes)}")
            saved = classes[name]
            there = [saved["num_classes"], saved["embedding_size"]]
            here = [loss.num_classes, loss.embedding_size]
            if there[1] != here[1] or (class_map is None and there != here):
                hint = "" if there[1] != here[1] else " (class_map loads other classes)"
                raise CheckpointError(
                    f"{self.directory}: {key} has shape {there} there, but the loss here expects "
                    f"{here}{hint}"
                )
            if class_map is not None:
                _check_class_map(class_map, here[0], there[0])

    def _add(self, key: str, loss: PartialMarginSoftmax | None, target: Tensor) -> None:
        """key: of the tensor here; target: to be read into; global where it is sharded."""
        name = self.names.find(key)
        entry = self.saved.state_dict_metadata.get(name)
        taken = name in self.whole or name in self.rows  # by another tensor here
        if name is None or taken or not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.directory}: has no {key}")
        if loss is not None and self.class_map is not None:
            local = target.to_local() if isinstance(target, DTensor) else target
            self.rows[name] = _saved_rows(self.class_map, loss, entry, local)
        elif list(entry.size) != list(target.shape):
            raise CheckpointError(
                f"{self.directory}: {key} has shape {list(entry.size)} there, but "
                f"{list(target.shape)} is expected"
            )
        else:
            self.whole[name] = target

    def _add_optimizer(self, name: str, optimizer: Optimizer) -> None:
        saved = self.about["optimizers"].get(name)
        if saved is None:
            raise CheckpointError(
                f"{self.directory}: has no optimizer {name!r}, only "
                f"{sorted(self.about['optimizers'])}"
            )
        there = [group["params"] for group in saved["groups"]]
        here = [group["params"] for group in self.parts.groups(optimizer)]
        if not _same_names(there, here):
            raise CheckpointError(
                f"{self.directory}: optimizer {name!r} has the parameters {there} there, "
                f"but {here} here"
            )
        states = self.states[name] = {}
        for param_name, saved_name, param in self._optimized(name, optimizer):
            states[param_name] = {}
            of_param = plain_name(joined("optimizers", name, saved_name))
            for short, key in self.saved_states.get(of_param, {}).items():
                entry = self.saved.state_dict_metadata[key]
                loss = self.parts.loss_of(optimizer, param_name, short, len(entry.size))
                states[param_name][short] = _room(loss, param, entry)
                self._add(plain_name(key), loss, states[param_name][short])

    def _optimized(self, name: str, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
        """The optimizer's parameters: the name here, the name there, and itself."""
        groups = self.about["optimizers"][name]["groups"]
        there = [saved_name for group in groups for saved_name in group["params"]]
        here = self.parts.params(name, optimizer)
        for (param_name, param), saved_name in zip(here, there, strict=True):
            yield param_name, saved_name, param

    @torch.no_grad()
    def finish(self) -> None:
        for rows in self.rows.values():
            known = rows.of_row >= 0
            loaded = rows.buffer[rows.of_row[known]].to(rows.target)
            rows.target[known.to(rows.target.device)] = loaded
        # Tensors were read in place; this is for what is not one, such as the seed.
        for name, module in self.parts.modules.items():
            module.load_state_dict(self.module_states[name])
        for name, optimizer in self.parts.optimizers.items():
            self._finish_optimizer(name, optimizer)

    def _finish_optimizer(self, name: str, optimizer: Optimizer) -> None:
        saved = self.about["optimizers"][name]
        state: dict[int, dict[str, Any]] = {}
        for index, (param_name, saved_name, _) in enumerate(self._optimized(name, optimizer)):
            values = {**saved["values"].get(saved_name, {}), **self.states[name][param_name]}
            if param_name in self.parts.losses:
                for key, value in values.items():
                    values[key] = value.to_local() if isinstance(value, DTensor) else value
                for key, source in _FRESH.items():
                    rows = self.rows.get(joined("optimizers", name, saved_name, key))
                    if rows is not None:
                        values[key][rows.of_row < 0] = values[source].to(values[key])
            if values:
                state[index] = values
        groups, first = [], 0
        for group, here in zip(saved["groups"], optimizer.param_groups, strict=True):
            count = len(here["params"])
            values = {key: as_option(value, here.get(key)) for key, value in group.items()}
            groups.append({**values, "params": list(range(first, first + count))})
            first += count
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _same_names(there: list[list[str]], here: list[list[str]]) -> bool:
    """Whether groups have the same parameters, but for wrappers' names there."""
    if [len(group) for group in there] != [len(group) for group in here]:
        return False
    return all(
        SavedNames([saved_name]).find(name) is not None
        for saved_group, group in zip(there, here, strict=True)
        for saved_name, name in zip(saved_group, group, strict=True)
    )


def _saved_rows(
    class_map: Tensor, loss: PartialMarginSoftmax, entry: TensorStorageMetadata, target: Tensor
) -> _Rows:
    """What to read of a saved tensor for the rows of `target`, this rank's classes."""
    start = 0 if loss.shard is None else loss.shard.start
    old = class_map[start : start + len(target)].cpu()
    known = old[old >= 0]
    first, stop = (int(known[0]), int(known[-1]) + 1) if len(known) else (0, 0)
    buffer = torch.empty((stop - first, *entry.size[1:]), dtype=entry.properties.dtype)
    of_row = torch.where(old >= 0, old - first, -1)
    return _Rows(buffer, first, of_row, target)


def _room(loss: PartialMarginSoftmax | None, param: Tensor, entry: TensorStorageMetadata) -> Tensor:
    """Room for a state tensor, laid out as its parameter is.  loss: whose classes have rows."""
    dtype = entry.properties.dtype
    if loss is not None:
        rows = torch.zeros((len(param), *entry.size[1:]), dtype=dtype, device=param.device)
        return rows if loss.shard is None else loss.shard.as_global(rows)
    if param.shape == entry.size:  # in its memory format, which fused optimizers rely on
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.zeros(entry.size, dtype=dtype)


def _check_class_map(class_map: Tensor, num_classes: int, saved_classes: int) -> None:
    if not isinstance(class_map, Tensor) or class_map.dtype != torch.int64:
        raise ValueError(f"class_map must be an int64 tensor, got {type(class_map).__name__}")
    if class_map.shape != (num_classes,):
        raise ValueError(
            f"class_map must have one entry for each of the {num_classes} classes of the loss, "
            f"got the shape {list(class_map.shape)}"
        )
    known = class_map[class_map >= 0]
    if (class_map < -1).any() or (known >= saved_classes).any() or (known.diff() <= 0).any():
        raise ValueError(
            f"class_map must hold increasing classes of the checkpoint in [0, {saved_classes}), "
            "or -1 for a new class"
        )


class RowPlanner(LoadPlanner):
    """Reads runs of rows of saved tensors, whichever ranks wrote them."""

    def __init__(self, rows: Mapping[str, _Rows]) -> None:
        self.rows = rows

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, rows in self.rows.items():
            if len(rows.buffer) > 0:
                offsets = torch.Size([rows.first, *[0] * (rows.buffer.dim() - 1)])
                chunk = ChunkStorageMetadata(offsets, rows.buffer.shape)
                saved = self.metadata.state_dict_metadata[key]
                items += create_read_items_for_chunk_list(key, saved, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.rows[read_item.dest_index.fqn].buffer
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
