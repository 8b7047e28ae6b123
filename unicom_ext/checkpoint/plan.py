"""Loading: what to read where, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unicom_ext.checkpoint.classes import (
    OldClasses,
    Rows,
    catch_up,
    check_class_map,
    merged_prototypes,
    merged_state,
)
from unicom_ext.checkpoint.directory import read
from unicom_ext.checkpoint.names import SavedNames, joined, plain_name
from unicom_ext.checkpoint.parts import Parts, as_option, in_checkpoint
from unicom_ext.distributed.shard import each_row
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.utils.files import CheckpointError

_OF_ROWS = {"row_step", "by_rows"}  # in the state of rows of RowAdamW and RowSGD
# What a row that has missed nothing holds in a state tensor: new ones, and those made of several.
_UP_TO_DATE = {"log_decay": "total_log_decay", "last_step": "step"}


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
        self.rows: dict[str, Rows] = {}
        self.old: dict[str, OldClasses] = {}  # by the name of a loss's weight
        self.module_states = parts.module_states()
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}  # of optimizers' parameters
        self._check_classes(class_map)
        for key, value in parts.named(self.module_states):
            loss = parts.losses.get(key)
            target = value if loss is None else in_checkpoint(loss, value)
            self._add(key, self.old.get(key), target)
        for name, optimizer in parts.optimizers.items():
            self._add_optimizer(name, optimizer)

    def _check_classes(self, class_map: Tensor | None) -> None:
        if class_map is not None and not self.parts.losses:
            raise ValueError("class_map needs a PartialMarginSoftmax among the modules, got none")
        classes = self.about["classes"]
        names = SavedNames(classes)
        for key, loss in self.parts.losses.items():
            name = names.find(key)
            if name is None:
                raise CheckpointError(f"{self.directory}: has no {key}, only {sorted(classes)}")
            saved = classes[name]
            there = [saved["num_classes"], saved["embedding_size"]]
            here = [loss.num_classes, loss.embedding_size]
            centers = saved.get("num_centers", 1), loss.options.num_centers
            if centers[0] != centers[1]:
                raise CheckpointError(
                    f"{self.directory}: {key} has {centers[0]} centers of each class there, but "
                    f"the loss here has num_centers={centers[1]}"
                )
            if there[1] != here[1] or (class_map is None and there != here):
                hint = "" if there[1] != here[1] else " (class_map loads other classes)"
                raise CheckpointError(
                    f"{self.directory}: {key} has shape {there} there, but the loss here expects "
                    f"{here}{hint}"
                )
            if class_map is not None:
                check_class_map(class_map, here[0], there[0])
                if centers[1] > 1 and ((class_map.reshape(here[0], -1) >= 0).sum(1) > 1).any():
                    raise ValueError(
                        "class_map can merge classes only where each has one center, as none of "
                        f"{centers[1]} is another's counterpart; got several for one class"
                    )
                start = 0 if loss.shard is None else loss.shard.start
                self.old[key] = OldClasses(class_map, start, len(loss.weight) // centers[1])

    def _saved_classes(self, weight: str) -> int:
        """How many classes the prototypes of this name have there; 0 of other parameters."""
        name = SavedNames(self.about["classes"]).find(weight)
        return 0 if name is None else self.about["classes"][name]["num_classes"]

    def _add(self, key: str, old: OldClasses | None, target: Tensor) -> None:
        """key: of the tensor here; old: of its rows, where they are of other classes than there;
        target: to be read into; global where it is sharded."""
        name = self._saved_name(key)
        entry = self.saved.state_dict_metadata[name]
        taken = name in self.whole or name in self.rows  # by another tensor here
        if taken or not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.directory}: has no {key}")
        if old is not None:
            local = target.to_local() if isinstance(target, DTensor) else target
            buffer = torch.empty((len(old.ids), *entry.size[1:]), dtype=entry.properties.dtype)
            self.rows[name] = Rows(old, buffer, local)
        elif list(entry.size) != list(target.shape):
            raise CheckpointError(
                f"{self.directory}: {key} has shape {list(entry.size)} there, but "
                f"{list(target.shape)} is expected"
            )
        else:
            self.whole[name] = target

    def _saved_name(self, key: str) -> str:
        name = self.names.find(key)
        if name is None:
            raise CheckpointError(f"{self.directory}: has no {key}")
        return name

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
        of_rows = hasattr(optimizer, "own_state_dict")
        for param_name, saved_name, param in self._optimized(name, optimizer):
            states[param_name] = {}
            of_param = plain_name(joined("optimizers", name, saved_name))
            tensors = self.saved_states.get(of_param, {})
            names = tensors.keys() | saved["values"].get(saved_name, {}).keys()
            if not of_rows and names & _OF_ROWS:
                raise CheckpointError(
                    f"{self.directory}: optimizer {name!r} has been saved by a row optimizer of "
                    f"unicom_ext.optim, from which {type(optimizer).__name__} cannot go on"
                )
            for short, key in tensors.items():
                entry = self.saved.state_dict_metadata[key]
                classes = self._saved_classes(param_name)
                loss = self.parts.loss_of(optimizer, param_name, short, entry.size, classes)
                target = states[param_name][short] = _room(loss, param, entry)
                old = None
                if loss is not None:
                    target, old = in_checkpoint(loss, target), self.old.get(param_name)
                self._add(plain_name(key), old, target)
        if of_rows:
            try:
                optimizer.own_state_dict(self._state_dict(name, optimizer))  # type: ignore[attr-defined]
            except ValueError as error:
                message = f"{self.directory}: optimizer {name!r}: {error}"
                raise CheckpointError(message) from None

    def _optimized(self, name: str, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
        """The optimizer's parameters: the name here, the name there, and itself."""
        groups = self.about["optimizers"][name]["groups"]
        there = [saved_name for group in groups for saved_name in group["params"]]
        here = self.parts.params(name, optimizer)
        for (param_name, param), saved_name in zip(here, there, strict=True):
            yield param_name, saved_name, param

    @torch.no_grad()
    def finish(self) -> None:
        for name, optimizer in self.parts.optimizers.items():
            for param_name, saved_name, _ in self._optimized(name, optimizer):
                if param_name in self.old:
                    self._finish_rows(name, optimizer, param_name, saved_name)
        for key in self.old:
            self.rows[self._saved_name(key)].fill(merged_prototypes)
        # Tensors were read in place; this is for what is not one, such as the seed.
        for name, module in self.parts.modules.items():
            module.load_state_dict(self.module_states[name])
        for name, optimizer in self.parts.optimizers.items():
            optimizer.load_state_dict(self._state_dict(name, optimizer))

    def _finish_rows(
        self, name: str, optimizer: Optimizer, param_name: str, saved_name: str
    ) -> None:
        """The state of prototypes, and these up to date, where they are of other classes."""
        of_param = plain_name(joined("optimizers", name, saved_name))
        keys = self.saved_states.get(of_param, {})
        rows = {short: self.rows[key] for short, key in keys.items() if key in self.rows}
        state = self.states[name][param_name]
        values = self.about["optimizers"][name]["values"].get(saved_name, {})
        shared = {short: value for short, value in state.items() if short not in rows}
        catch_up(optimizer, self.rows[self._saved_name(param_name)], rows, {**values, **shared})
        for short, of_state in rows.items():
            of_state.fill(merged_state)
            if short in _UP_TO_DATE:
                missed_nothing = ~of_state.old.single.to(of_state.target.device)
                of_state.target[missed_nothing] = state[_UP_TO_DATE[short]].to(of_state.target)

    def _state_dict(self, name: str, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer will load; before `finish` with nothing in its tensors yet."""
        saved = self.about["optimizers"][name]
        of_rows = hasattr(optimizer, "own_state_dict")
        state: dict[int, dict[str, Any]] = {}
        for index, (param_name, saved_name, _) in enumerate(self._optimized(name, optimizer)):
            values = {**saved["values"].get(saved_name, {}), **self.states[name][param_name]}
            # A row optimizer takes them as they are, and is told so which classes they are of.
            loss = self.parts.losses.get(param_name)
            if loss is not None and not of_rows:
                centers = loss.options.num_centers
                for key, value in values.items():
                    if isinstance(value, DTensor):
                        values[key] = each_row(value.to_local(), centers)
            if values:
                state[index] = values
        groups, first = [], 0
        for group, here in zip(saved["groups"], optimizer.param_groups, strict=True):
            count = len(here["params"])
            values = {key: as_option(value, here.get(key)) for key, value in group.items()}
            # What was not an option of the optimizer that saved it stays as it is here; a row
            # optimizer sees to it itself.
            kept = {} if of_rows else here
            groups.append({**kept, **values, "params": list(range(first, first + count))})
            first += count
        return {"state": state, "param_groups": groups}


def _same_names(there: list[list[str]], here: list[list[str]]) -> bool:
    """Whether groups have the same parameters, but for wrappers' names there."""
    if [len(group) for group in there] != [len(group) for group in here]:
        return False
    return all(
        SavedNames([saved_name]).find(name) is not None
        for saved_group, group in zip(there, here, strict=True)
        for saved_name, name in zip(saved_group, group, strict=True)
    )


def _room(loss: PartialMarginSoftmax | None, param: Tensor, entry: TensorStorageMetadata) -> Tensor:
    """Room for a state tensor, laid out as its parameter is.  loss: whose classes have rows."""
    dtype = entry.properties.dtype
    if loss is not None:
        of_row = entry.size[1 if loss.options.num_centers == 1 else 2 :]
        rows = _zeros(torch.Size([len(param), *of_row]), param, dtype)
        return rows if loss.shard is None else loss.shard.as_global(rows)
    if param.shape == entry.size:
        return _zeros(entry.size, param, dtype)
    return torch.zeros(entry.size, dtype=dtype)


def _zeros(shape: torch.Size, param: Tensor, dtype: torch.dtype) -> Tensor:
    """In the parameter's layout if of its shape: torch's fused optimizers take no notice of
    strides."""
    if param.shape == shape:
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=param.device)
