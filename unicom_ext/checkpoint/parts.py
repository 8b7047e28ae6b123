"""What goes into a checkpoint: modules and optimizers by name, and the names of their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from unicom_ext.checkpoint.names import PlainNames, clash, joined
from unicom_ext.distributed.ranks import Ranks, default_group
from unicom_ext.distributed.shard import by_class
from unicom_ext.loss.checks import is_local
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.utils.files import CheckpointError


class Parts:
    """Modules and optimizers by name, and which of their parameters are prototypes."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.modules = modules
        self.optimizers = optimizers
        self.losses: dict[str, PartialMarginSoftmax] = {}  # by the name of their weight
        self.names: dict[Tensor, str] = {}
        self._plain = {name: PlainNames(module) for name, module in modules.items()}
        for name, module in modules.items():
            plain = self._plain[name]
            for path, part in module.named_modules():
                if isinstance(part, PartialMarginSoftmax):
                    self.losses[joined("modules", name, plain(path), "weight")] = part
            for path, param in module.named_parameters():
                self.names[param] = joined("modules", name, plain(path))
        groups = [loss.shard.group for loss in self.losses.values() if loss.shard is not None]
        self.group = process_group or next(iter(groups), None) or default_group()
        self.is_first = Ranks(self.group).is_first

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors, and the plain values that belong to them."""
        state: dict[str, Tensor] = {}
        for key, value in self.named(self.module_states()):
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{key.removeprefix('modules.')} must be a tensor to be saved, got "
                    f"{type(value).__name__}"
                )
            loss = self.losses.get(key)
            state[key] = value if loss is None else in_checkpoint(loss, value)
        about: dict[str, Any] = {"classes": {}, "optimizers": {}}
        for key, loss in self.losses.items():
            about["classes"][key] = {
                "num_classes": loss.num_classes,
                "num_centers": loss.options.num_centers,
                "embedding_size": loss.embedding_size,
                "seed": loss.seed,
            }
        for name, optimizer in self.optimizers.items():
            values: dict[str, dict[str, Any]] = {}
            for param_name, param in self.params(name, optimizer):
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        full = joined("optimizers", name, param_name, key)
                        owner = self.loss_of(optimizer, param_name, key, value.shape, len(param))
                        state[full] = _as_global(owner, param, key, value)
                    else:
                        check_plain(f"{key} in the state of optimizers[{name!r}]", value)
                        values.setdefault(param_name, {})[key] = value
            groups = self.groups(optimizer)
            for group in groups:
                for key, value in group.items():
                    check_plain(f"the option {key} of optimizers[{name!r}]", value)
            about["optimizers"][name] = {"groups": groups, "values": values}
        return state, about

    def module_states(self) -> dict[str, dict[str, Any]]:
        """The modules' state dicts, whose keys have the names of wrappers in them.

        The prototypes of a process group are `DTensor`s in any case.
        """
        full = [loss for loss in self.losses.values() if loss.full_state_dict]
        try:
            for loss in full:
                loss.full_state_dict = False
            return {name: module.state_dict() for name, module in self.modules.items()}
        finally:
            for loss in full:
                loss.full_state_dict = True

    def named(self, states: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
        """What is in the modules' state dicts, by its name in a checkpoint."""
        seen: dict[str, str] = {}
        for name, state in states.items():
            for key, value in state.items():
                full = joined("modules", name, self._plain[name](key))
                here = joined("modules", name, key)
                if full in seen:
                    raise clash(full, [seen[full], here])
                seen[full] = here
                yield full, value

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

    def loss_of(
        self, optimizer: Optimizer, param_name: str, key: str, shape: Sequence[int], rows: int
    ) -> PartialMarginSoftmax | None:
        """The loss of whose classes each has a row in a state tensor; None where they have none.

        rows: how many classes the tensor is of, if it is of classes.
        """
        loss = self.losses.get(param_name)
        if loss is None or not shape or key in getattr(optimizer, "shared_state", ()):
            return None
        # Such as Adafactor's sums over all rows.
        return loss if shape[0] == rows or loss.shard is not None else None

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimizer's groups as JSON can hold them."""
        return [
            {
                key: [self.names[p] for p in value] if key == "params" else plain_value(value)
                for key, value in group.items()
            }
            for group in optimizer.param_groups
        ]


def plain_value(value: Any) -> Any:
    """An option of an optimizer's group as JSON can hold it."""
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, tuple):
        return tuple(plain_value(each) for each in value)
    if isinstance(value, np.floating):
        return float(value)
    return str(value) if isinstance(value, torch.dtype) else value


def check_plain(name: str, value: Any) -> None:
    """CheckpointError unless it is what JSON can hold; tensors are saved otherwise."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} must be what JSON can hold: {error}") from None


def as_option(value: Any, here: Any) -> Any:
    """An option of an optimizer's group again, from what `groups` made of it.  here: its value now,
    which may be a tensor."""
    if isinstance(here, Tensor):
        return torch.as_tensor(value).to(here)
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(value) if isinstance(value, list) else value


def in_checkpoint(loss: PartialMarginSoftmax, value: Tensor) -> Tensor:
    """What has a row for each prototype, as it is in a checkpoint: [C, ...], or with K > 1 centres
    [C, K, ...], as ranks share it (`ClassShard.as_global`)."""
    return by_class(value, loss.options.num_centers) if is_local(value) else value


def _as_global(loss: PartialMarginSoftmax | None, param: Tensor, key: str, value: Tensor) -> Tensor:
    if loss is None:
        return value
    if loss.shard is None:
        return in_checkpoint(loss, value)
    if value.shape[0] != len(param):
        raise CheckpointError(
            f"the optimizer's {key} of the prototypes must have a row for each of this rank's "
            f"{len(param)} prototypes, or be a scalar, to be saved; got {list(value.shape)}"
        )
    return loss.shard.as_global(value)
