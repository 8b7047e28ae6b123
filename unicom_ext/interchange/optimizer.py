"""An optimizer's state by numbers, as torch saves it, by the names of a checkpoint here.

The published trainers have one optimizer of the backbone's parameters and, last, of the head's: the
number of a parameter is its place among `backbone.parameters()`, and the last one is that of the
prototypes, of which each rank has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unicom_ext.checkpoint.names import PlainNames
from unicom_ext.checkpoint.parts import check_plain, plain_value
from unicom_ext.checkpoint.pieces import Pieces
from unicom_ext.interchange.files import OPTIMIZER, File
from unicom_ext.interchange.found import MAIN, PROTOTYPES, of_encoder
from unicom_ext.interchange.ranks import Head, optimizer_groups, same
from unicom_ext.interchange.rows import Rows, in_rank_order
from unicom_ext.utils.files import CheckpointError

_STATISTICS = ("running_mean", "running_var")


@dataclass
class State:
    """An optimizer by names of parameters.

    groups: as in a checkpoint; none where there is no optimizer.
    of_param: by parameter and torch's name what it has: a tensor, or a number.
    notes: what the user should know.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    of_param: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, param: str, key: str, value: Any) -> None:
        if value is None:  # the momentum of SGD without momentum
            return
        if key == "step":  # which torch had as a number once
            value = torch.as_tensor(value, dtype=torch.float32)
        self.of_param.setdefault(param, {})[key] = value

    def tensors(self) -> dict[str, Tensor | Pieces]:
        """By their names in a checkpoint."""
        return {
            f"optimizers.{MAIN}.{param}.{key}": value
            for param, state in self.of_param.items()
            for key, value in state.items()
            if isinstance(value, Tensor | Pieces)
        }

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of it besides."""
        values: dict[str, dict[str, Any]] = {}
        for param, state in self.of_param.items():
            for key, value in state.items():
                if not isinstance(value, Tensor | Pieces):
                    check_plain(f"{key} in the state of the optimizer", value)
                    values.setdefault(param, {})[key] = value
        return {MAIN: {"groups": self.groups, "values": values}} if self.groups else {}


def read_state(head: Head, encoder: nn.Module | None) -> State:
    """The optimizer of a trainer, or what old heads hold of it themselves.

    Args:
        encoder: says in which order its parameters are; None: in that of the state dict.

    Raises CheckpointError: it does not fit the backbone, or the ranks' are not of one run.
    """
    first = head.files[0]
    own = {
        key: in_rank_order([file.rows[key] for file in head.files])
        for key in first.rows
        if key != "weight"
    }
    if OPTIMIZER in first.trainer:
        result = _of_trainer(first, encoder)
        _add_prototypes(result, head, own)
    else:
        # Of the prototypes alone. RowSGD knows torch's SGD by its dampening; all other options are
        # the user's.
        result = State([{"params": [PROTOTYPES], "dampening": 0}], {PROTOTYPES: dict(own)})
    state = result.of_param.get(PROTOTYPES, {})
    if "exp_avg" in state and "step" not in state:
        del result.of_param[PROTOTYPES]
        result.notes.append(
            "nothing says how many steps the moments of the prototypes have had: they are left out"
        )
    if OPTIMIZER not in first.trainer and not result.of_param.get(PROTOTYPES):
        result.groups = []
    return result


def _of_trainer(file: File, encoder: nn.Module | None) -> State:
    """Its groups, and the state of the backbone's parameters."""
    groups = _groups(file)
    numbers = [number for group in groups for number in group["params"]]
    names = _parameters(file, len(numbers) - 1, encoder)
    full = [*map(of_encoder, names), PROTOTYPES]
    result = State(_named_groups(file, groups, full))
    saved = file.trainer[OPTIMIZER]["state"]
    for number, name in zip(numbers, names, strict=False):
        shape = file.encoder[name].shape
        for key, value in saved.get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != shape:
                raise CheckpointError(
                    f"{file.path}: {key} of parameter {number} of the optimizer is "
                    f"{list(value.shape)}, but {name} is {list(shape)}. Is the state dict not in "
                    "the order of the parameters? unicom_ext.interchange.read takes the encoder, "
                    "which knows it"
                )
            result.add(of_encoder(name), key, _step(file, value) if key == "step" else value)
    return result


def _step(file: File, value: Any) -> Any:
    """How many steps a parameter has had, as it is there."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # of several
        number = math.nan
    if not 0 <= number < math.inf:
        raise CheckpointError(f"{file.path}: step of the optimizer must be a number, got {value!r}")
    return value


def _groups(file: File) -> list[dict[str, Any]]:
    groups = optimizer_groups(file)
    sizes = [len(group["params"]) for group in groups]
    if len(groups) > 2 or sizes[-1] == 0 or (len(groups) == 2 and sizes[1] != 1):
        raise CheckpointError(
            f"{file.path}: the optimizer has groups of {', '.join(map(str, sizes))} parameters, "
            "and nothing says which; must be one group of the backbone's and one of the head's, "
            "or a single one"
        )
    return groups


def _named_groups(
    file: File, groups: list[dict[str, Any]], names: list[str]
) -> list[dict[str, Any]]:
    named, first = [], 0
    for group in groups:
        options = {key: plain_value(value) for key, value in group.items() if key != "params"}
        for key, value in options.items():
            check_plain(f"{file.path}: the option {key} of the optimizer", value)
        count = len(group["params"])
        named.append({"params": names[first : first + count], **options})
        first += count
    return named


def _parameters(file: File, count: int, encoder: nn.Module | None) -> list[str]:
    """The names of the backbone's parameters in their order."""
    if count == 0:
        return []
    if encoder is not None:
        plain = PlainNames(encoder)
        names = [plain(name) for name, _ in encoder.named_parameters()]
        unknown = [name for name in names if name not in file.encoder]
        if unknown or len(names) != count:
            what = f"has {unknown[0]}, which is not in it" if unknown else f"has {len(names)}"
            raise CheckpointError(
                f"{file.path}: the optimizer is of {count} parameters of the backbone, but the "
                f"encoder {what}"
            )
        return names
    names = []
    seen: set[Any] = set()
    for name, value in file.encoder.items():
        if not value.is_floating_point() or name.endswith(_STATISTICS):
            continue
        place = value.data_ptr(), value.shape, value.stride()
        if value.numel() == 0 or place not in seen:  # under another name
            names.append(name)
        seen.add(place)
    if len(names) != count:
        raise CheckpointError(
            f"{file.path}: the optimizer is of {count} parameters of the backbone, but "
            f"{len(names)} tensors of its state dict may be parameters. Give "
            "unicom_ext.interchange.read the encoder, which says which of them are"
        )
    return names


def _add_prototypes(result: State, head: Head, own: Mapping[str, Pieces]) -> None:
    """What each rank's optimizer has of its prototypes; own: what the heads themselves have."""
    first = head.files[0]
    number = first.trainer[OPTIMIZER]["param_groups"][-1]["params"][-1]
    states = []
    for file in head.files:
        state = file.trainer[OPTIMIZER]["state"].get(number, {})
        states.append({key: value for key, value in state.items() if value is not None})
        if states[-1].keys() != states[0].keys():
            raise CheckpointError(
                f"{first.path} and {file.path} are not of one run: of the prototypes their "
                f"optimizers have {', '.join(states[0]) or 'nothing'} and "
                f"{', '.join(states[-1]) or 'nothing'}"
            )
    of_rows = {key for key, value in states[0].items() if isinstance(value, Tensor) and value.dim()}
    for key in states[0].keys() - of_rows:
        result.add(PROTOTYPES, key, _shared(key, [state[key] for state in states], head, result))
    for key, pieces in own.items():
        result.add(PROTOTYPES, key, pieces)
    if any(_sampled(key, head, states) for key in sorted(of_rows - own.keys())):
        result.of_param.pop(PROTOTYPES, None)
        result.notes.append(
            "the optimizer's state of the prototypes is of the classes of the last step alone, and "
            "nothing says of which: it is left out, as by the trainer itself when it goes on"
        )
        return
    for key in sorted(of_rows - own.keys()):
        result.add(PROTOTYPES, key, in_rank_order([Rows(state[key]) for state in states]))


def _sampled(key: str, head: Head, states: list[dict[str, Any]]) -> bool:
    """Whether the optimizers knew the sampled classes alone, as those of heads until 2022 did."""
    sampled = False
    for file, state in zip(head.files, states, strict=True):
        weight, value = file.rows["weight"].whole, state[key]
        if value.shape[1:] != weight.shape[1:] or len(value) > len(weight):
            raise CheckpointError(
                f"{file.path}: {key} of the prototypes is {list(value.shape)} in the optimizer, "
                f"must be {list(weight.shape)} as they are"
            )
        if value.dtype != states[0][key].dtype:
            raise CheckpointError(
                f"{head.files[0].path} and {file.path} are not of one run: {key} of the prototypes "
                f"is {states[0][key].dtype} and {value.dtype}"
            )
        sampled |= len(value) < len(weight)
    return sampled


def _shared(key: str, values: list[Any], head: Head, result: State) -> Any:
    """Of all prototypes of a rank, what all ranks have."""
    if key == "step":
        steps = [int(_step(file, v)) for file, v in zip(head.files, values, strict=True)]
        if min(steps) < max(steps):
            result.notes.append(
                f"the ranks' optimizers have made {min(steps)} to {max(steps)} steps; the largest "
                "number counts for all prototypes"
            )
        return max(steps)
    if not all(same(values[0], value) for value in values):
        raise CheckpointError(
            f"{head.files[0].path} and the other ranks' files are not of one run: {key} of the "
            f"prototypes is {values}"
        )
    return values[0]
