"""Checkpoints that any number of ranks can read: modules, optimizers and plain values.

    checkpoint.save("runs/a/step-1000", modules={"encoder": encoder, "loss": loss_fn},
                    optimizers={"main": optimizer}, extra={"epoch": 3})
    extra = checkpoint.load("runs/a/step-1000", modules=..., optimizers=...)

A checkpoint is a directory of `torch.distributed.checkpoint`: every rank writes and reads its
own rows. Prototypes, and the optimizer state that belongs to them row by row, are global tensors
[C, ...]: eight ranks save, three load. `class_map` loads into a loss of other classes. Everything
in it is a tensor (plain values are JSON in a tensor of bytes), so reading one runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unicom_ext.files import CheckpointError, sync_directory, write_atomically
from unicom_ext.loss import PartialMarginSoftmax
from unicom_ext.sharding import agree
from unicom_ext.sharding.failures import failures_of

FORMAT = "unicom_ext checkpoint"
VERSION = 1  # raise it when the content changes
_ABOUT = "about"  # the tensor of plain values


def save(
    directory: str | os.PathLike,
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
        modules: by name. Those inside DistributedDataParallel or torch.compile are taken out of it.
        optimizers: by name; of parameters of the modules.
        extra: what JSON can hold: step, epoch, settings.
        process_group: the ranks that save; default the group of a `PartialMarginSoftmax` among the
            modules, else all ranks of a program that has initialised torch.distributed.

    Raises CheckpointError, or what writing raised.
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    parts = _Parts(modules, optimizers or {}, process_group)
    for loss in parts.losses.values():
        if loss.shard is not None:
            failures_of(loss.shard.group).raise_earlier()  # in the last step
    failure = None
    state: dict[str, Tensor] = {}
    try:
        state, about = parts.collect()
        text = json.dumps({"format": FORMAT, "version": VERSION, **about, "extra": extra or {}})
        state[_ABOUT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        if parts.is_first:
            if directory.exists():
                raise CheckpointError(f"{directory}: is there already")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except Exception as error:
        failure = error
    # Ranks that would name other tensors must not write them.
    agree({"the tensors to save": sorted(state)}, failure, parts.group)
    _dcp_save(
        state, checkpoint_id=temporary, process_group=parts.group, no_dist=parts.group is None
    )
    failure = None
    if parts.is_first:
        try:
            os.rename(temporary, directory)
            sync_directory(directory.parent)
        except OSError as error:
            failure = error
    agree({}, failure, parts.group)


def load(
    directory: str | os.PathLike,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    class_map: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into modules and optimizers, in place; returns its `extra`.

    Every rank calls this; their number need not be that of the ranks that saved.

    Args:
        directory: what `save` wrote.
        modules, optimizers, process_group: as for `save`, with the same names; those of the
            checkpoint that are not named are left out.
        class_map: int64 [C], for a loss of C classes that are not those of the checkpoint: the
            class there that each class here goes on from, or -1 for a class that is new, which
            keeps its initial prototype and gets fresh optimizer state. The others must increase.
            ``torch.arange(C)`` with -1 past the old classes appends classes;
            ``torch.tensor(kept_ids)`` drops those that are not in it.

    Raises CheckpointError, on every rank, if something does not fit; nothing has changed then.
    """
    directory = Path(directory)
    parts = _Parts(modules, optimizers or {}, process_group)
    failure, plan = None, None
    try:
        plan = _Plan(directory, parts, class_map)
    except Exception as error:
        failure = error
    agree({}, failure, parts.group)
    where = {
        "checkpoint_id": directory,
        "process_group": parts.group,
        "no_dist": parts.group is None,
    }
    _dcp_load(plan.whole, **where)
    if plan.rows:
        _dcp_load({key: rows.buffer for key, rows in plan.rows.items()}, **where,
                 planner=_RowPlanner(plan.rows))  # fmt: skip
    plan.finish()
    return plan.about["extra"]


def latest(directory: str | os.PathLike) -> Path | None:
    """The checkpoint ``step-N`` in a directory with the largest N; None if there is none."""
    found = [path for path in Path(directory).glob("step-*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def read_about(directory: str | os.PathLike) -> dict[str, Any]:
    """The plain values of a checkpoint: its losses' sizes, optimizers' settings, and `extra`."""
    return _read(Path(directory))[1]


def show(directory: str | os.PathLike) -> None:
    """Print what is in a checkpoint."""
    metadata, about = _read(Path(directory))
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if key != _ABOUT:
            parts = len(entry.chunks)
            written = f" in {parts} parts" if parts > 1 else ""
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            print(f"{key}  {dtype} {list(entry.size)}{written}")
    print(json.dumps(about, indent=1, ensure_ascii=False))


def merge(directory: str | os.PathLike, file: str | os.PathLike) -> None:
    """A checkpoint as one file for `torch.load`: a dict of tensors by name."""
    metadata, _ = _read(Path(directory))
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
    }
    _dcp_load(state, checkpoint_id=directory, no_dist=True)
    write_atomically(file, lambda handle: torch.save(state, handle))


def split(file: str | os.PathLike, directory: str | os.PathLike) -> None:
    """The inverse of `merge`: a directory that any number of ranks can load."""
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory}: is there already")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        about = json.loads(bytes(state[_ABOUT].tolist()))
    except Exception as error:
        raise CheckpointError(f"{file}: is not a merged checkpoint: {_reason(error)}") from error
    _check_format(file, about)
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _dcp_save(state, checkpoint_id=temporary, no_dist=True)
    os.rename(temporary, directory)


def _read(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Metadata and plain values."""
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory}: there is no checkpoint")
    try:
        metadata = FileSystemReader(directory).read_metadata()
        entry = metadata.state_dict_metadata[_ABOUT]
        text = {_ABOUT: torch.empty(entry.size, dtype=torch.uint8)}
        _dcp_load(text, checkpoint_id=directory, no_dist=True)
        about = json.loads(bytes(text[_ABOUT].tolist()))
    except Exception as error:  # whatever the reader's parts raise
        raise CheckpointError(f"{directory}: cannot be read: {_reason(error)}") from error
    _check_format(directory, about)
    return metadata, about


def _dcp_save(state: dict[str, Tensor], **where: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.save(state, **where)


def _dcp_load(state: dict[str, Tensor], **where: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, **where)


def _check_format(path: str | os.PathLike, about: Mapping[str, Any]) -> None:
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a {FORMAT}")
    if about["version"] != VERSION:
        raise CheckpointError(
            f"{path}: has version {about['version']} of the format, this program reads version "
            f"{VERSION}"
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# ---- names of tensors ----


class _Parts:
    """Modules and optimizers by name, and which of their parameters are prototypes."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.modules = {name: _unwrapped(module) for name, module in modules.items()}
        self.optimizers = optimizers
        self.losses: dict[str, PartialMarginSoftmax] = {}  # by the name of their weight
        self.names: dict[Tensor, str] = {}
        for name, module in self.modules.items():
            for path, part in module.named_modules():
                if isinstance(part, PartialMarginSoftmax):
                    self.losses[_joined("modules", name, path, "weight")] = part
            for path, param in module.named_parameters():
                self.names[param] = _joined("modules", name, path)
        groups = [loss.shard.group for loss in self.losses.values() if loss.shard is not None]
        if process_group is None and groups:
            process_group = groups[0]
        elif process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.group = process_group
        self.is_first = process_group is None or dist.get_rank(process_group) == 0

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors, and the plain values that belong to them."""
        state: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                if not isinstance(value, Tensor):
                    raise CheckpointError(
                        f"{name}.{key} must be a tensor to be saved, got {type(value).__name__}"
                    )
                state[_joined("modules", name, key)] = value
        about: dict[str, Any] = {"classes": {}, "optimizers": {}}
        for key, loss in self.losses.items():
            about["classes"][key] = {
                "num_classes": loss.num_classes,
                "embedding_size": loss.embedding_size,
                "seed": loss.seed,
            }
        for name, optimizer in self.optimizers.items():
            values: dict[str, dict[str, Any]] = {}
            for param_name, param in self.params(name, optimizer):
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        full = _joined("optimizers", name, param_name, key)
                        state[full] = self._as_global(param_name, param, key, value)
                    else:
                        values.setdefault(param_name, {})[key] = value
            about["optimizers"][name] = {"groups": self.groups(optimizer), "values": values}
        return state, about

    def params(self, name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's parameters in its order."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param not in self.names:
                    raise CheckpointError(
                        f"optimizers[{name!r}] has a parameter of shape {list(param.shape)} that "
                        "is in none of the modules"
                    )
                yield self.names[param], param

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        return [
            {
                key: [self.names[p] for p in value]
                if key == "params"
                else float(value)
                if isinstance(value, Tensor)
                else value
                for key, value in group.items()
            }
            for group in optimizer.param_groups
        ]

    def _as_global(self, param_name: str, param: Tensor, key: str, value: Tensor) -> Tensor:
        loss = self.losses.get(param_name)
        if loss is None or loss.shard is None or value.dim() == 0:
            return value
        if value.shape[0] != len(param):
            raise CheckpointError(
                f"the optimizer's {key} of the prototypes must have a row for each of this rank's "
                f"{len(param)} classes, or be a scalar, to be saved; got {list(value.shape)}"
            )
        return loss.shard.as_global(value)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):  # torch.compile
            module = module._orig_mod
        else:
            return module


# ---- loading ----


class _Rows(NamedTuple):
    """Rows of a saved tensor for this rank's classes, where they are not the same classes."""

    buffer: Tensor  # [n, ...] saved rows
    first: int  # the saved class of the first
    of_row: Tensor  # [rows] which row of the buffer each row of the target gets, -1 for none
    target: Tensor  # [rows, ...]


# What a row that was never updated holds in a state tensor, where that is not zero.
_FRESH = {"log_decay": "total_log_decay"}


class _Plan:
    """What to read where, checked; `finish` puts the optimizers' state in its place."""

    def __init__(self, directory: Path, parts: _Parts, class_map: Tensor | None) -> None:
        self.directory = directory
        self.parts = parts
        self.saved, self.about = _read(directory)
        self.whole: dict[str, Tensor] = {}
        self.rows: dict[str, _Rows] = {}
        self.module_states: dict[str, dict[str, Tensor]] = {}
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}  # of optimizers' parameters
        self._check_classes(class_map)
        self.class_map = class_map
        for name, module in parts.modules.items():
            self.module_states[name] = module.state_dict()
            for key, value in self.module_states[name].items():
                full = _joined("modules", name, key)
                self._add(full, parts.losses.get(full), value)
        for name, optimizer in parts.optimizers.items():
            self._add_optimizer(name, optimizer)

    def _check_classes(self, class_map: Tensor | None) -> None:
        for key, loss in self.parts.losses.items():
            saved = self.about["classes"].get(key)
            if saved is None:
                raise CheckpointError(
                    f"{self.directory}: has no {key}, only {sorted(self.about['classes'])}"
                )
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
        """target: the tensor to be read into; global where it is sharded."""
        entry = self.saved.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.directory}: has no {key}")
        if loss is not None and self.class_map is not None:
            local = target.to_local() if isinstance(target, DTensor) else target
            self.rows[key] = self._rows(loss, entry, local)
        elif list(entry.size) != list(target.shape):
            raise CheckpointError(
                f"{self.directory}: {key} has shape {list(entry.size)} there, but "
                f"{list(target.shape)} is expected"
            )
        else:
            self.whole[key] = target

    def _rows(self, loss: PartialMarginSoftmax, entry: Any, target: Tensor) -> _Rows:
        start = 0 if loss.shard is None else loss.shard.start
        old = self.class_map[start : start + len(target)].cpu()
        known = old[old >= 0]
        first, stop = (int(known[0]), int(known[-1]) + 1) if len(known) else (0, 0)
        buffer = torch.empty((stop - first, *entry.size[1:]), dtype=entry.properties.dtype)
        of_row = torch.where(old >= 0, old - first, -1)
        return _Rows(buffer, first, of_row, target)

    def _add_optimizer(self, name: str, optimizer: Optimizer) -> None:
        saved = self.about["optimizers"].get(name)
        if saved is None:
            raise CheckpointError(
                f"{self.directory}: has no optimizer {name!r}, only "
                f"{sorted(self.about['optimizers'])}"
            )
        there = [group["params"] for group in saved["groups"]]
        here = [group["params"] for group in self.parts.groups(optimizer)]
        if there != here:
            raise CheckpointError(
                f"{self.directory}: optimizer {name!r} has the parameters {there} there, "
                f"but {here} here"
            )
        states = self.states[name] = {}
        for param_name, param in self.parts.params(name, optimizer):
            prefix = _joined("optimizers", name, param_name) + "."
            states[param_name] = {}
            for key, entry in self.saved.state_dict_metadata.items():
                if key.startswith(prefix) and "." not in key[len(prefix) :]:
                    state = self._state(param_name, param, entry)
                    states[param_name][key[len(prefix) :]] = state
                    loss = self.parts.losses.get(param_name) if state.dim() > 0 else None
                    self._add(key, loss, state)

    def _state(self, param_name: str, param: Tensor, entry: TensorStorageMetadata) -> Tensor:
        """Room for a state tensor, laid out as its parameter is."""
        loss, dtype = self.parts.losses.get(param_name), entry.properties.dtype
        if loss is not None and len(entry.size) > 0:
            rows = torch.zeros((len(param), *entry.size[1:]), dtype=dtype, device=param.device)
            return rows if loss.shard is None else loss.shard.as_global(rows)
        if param.shape == entry.size:  # in its memory format, which fused optimizers rely on
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return torch.zeros(entry.size, dtype=dtype)

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
        for index, (param_name, _) in enumerate(self.parts.params(name, optimizer)):
            values = {**saved["values"].get(param_name, {}), **self.states[name][param_name]}
            if param_name in self.parts.losses:
                for key, value in values.items():
                    values[key] = value.to_local() if isinstance(value, DTensor) else value
                for key, source in _FRESH.items():
                    rows = self.rows.get(_joined("optimizers", name, param_name, key))
                    if rows is not None:
                        values[key][rows.of_row < 0] = values[source].to(values[key])
            if values:
                state[index] = values
        groups, first = [], 0
        for group, here in zip(saved["groups"], optimizer.param_groups, strict=True):
            count = len(here["params"])
            values = {
                key: torch.as_tensor(value).to(here[key])
                if isinstance(here.get(key), Tensor)
                else tuple(value)
                if isinstance(value, list)
                else value
                for key, value in group.items()
            }
            groups.append({**values, "params": list(range(first, first + count))})
            first += count
        optimizer.load_state_dict({"state": state, "param_groups": groups})


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


class _RowPlanner(LoadPlanner):
    """Reads runs of rows of saved tensors, whichever ranks wrote them."""

    def __init__(self, rows: Mapping[str, _Rows]) -> None:
        self.rows = rows

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
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

    def load_bytes(self, read_item, value) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item) -> Tensor:
        tensor = self.rows[read_item.dest_index.fqn].buffer
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item, tensor) -> None:
        pass
