"""A checkpoint of this package as InsightFace's trainer writes it: one file for each rank."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicom_ext.checkpoint.directory import read, read_tensors, save_file
from unicom_ext.checkpoint.names import joined, plain_name
from unicom_ext.checkpoint.parts import as_option
from unicom_ext.checkpoint.pieces import read_rows
from unicom_ext.interchange.files import BACKBONE, OPTIMIZER, SCHEDULER, SOFTMAX
from unicom_ext.interchange.found import ENCODER, LOSS, MAIN, PROTOTYPES, of_encoder
from unicom_ext.interchange.rows import class_counts
from unicom_ext.loss import checks
from unicom_ext.utils.files import CheckpointError, sync_directory

_OF_ROWS = {"row_step", "by_rows"}  # in the state of rows of RowAdamW and RowSGD


def to_partial_fc(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ranks: int,
    optimizer: bool = True,
) -> list[str]:
    """Write ``checkpoint_gpu_{rank}.pt``, from which InsightFace's trainer goes on.

    Args:
        directory: a checkpoint with the modules "encoder" and "loss", and the optimizer "main" of
            their parameters, the prototypes last: what `read` makes, and `unicom-ext train`. The
            others must be in the order of ``encoder.parameters()``, as the trainer has them, which
            no checkpoint says.
        output: a directory, which must not exist; it appears when it is whole.
        ranks: as many files, of which the first C % ranks have C // ranks + 1 classes, the others
            one fewer.
        optimizer: False to leave out its state.

    In memory at a time is what one file holds, and a piece of the checkpoint.

    Returns what the trainer reads and the checkpoint does not have.

    Raises CheckpointError: the checkpoint does not have these parts, or state that the trainer's
    optimizers do not have; ValueError: ranks; OSError: it cannot be written. Nothing is left in
    output then.
    """
    directory, output = Path(directory), Path(output)
    checks.integer("ranks", ranks, 1)
    if output.exists():
        raise CheckpointError(f"{output}: is there already")
    source = _Source(directory)
    if ranks > source.num_classes:
        raise ValueError(f"ranks must be at most the {source.num_classes} classes, got {ranks}")
    state = source.optimizer() if optimizer else None
    shared, missing = source.progress()
    shared[BACKBONE] = source.encoder([] if state is None else state.names)
    if state is None:
        missing = [OPTIMIZER, *missing]
    else:
        shared[OPTIMIZER] = {
            "state": source.states(state, state.names[:-1]),
            "param_groups": state.groups,
        }
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        start = 0
        for rank, count in enumerate(class_counts(source.num_classes, ranks)):
            path = temporary / f"checkpoint_gpu_{rank}.pt"
            save_file(path, _of_rank(source, shared, state, start, start + count))
            start += count
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(output.parent)
    return missing


def _of_rank(
    source: _Source, shared: dict[str, Any], optimizer: _Optimizer | None, start: int, stop: int
) -> dict[str, Any]:
    """What the file of the rank with these classes holds.  shared: what all files do."""
    weight, own = source.head(optimizer, start, stop)
    content = {**shared, SOFTMAX: {"weight": weight}}
    if optimizer is not None and own:
        number = len(optimizer.names) - 1
        states = {**shared[OPTIMIZER]["state"], number: own}
        content[OPTIMIZER] = {**shared[OPTIMIZER], "state": states}
    return content


@dataclass
class _Optimizer:
    """groups: with numbers of parameters; names: of these, in their order; keys: what each has, by
    its name here and there; values: what is no tensor."""

    groups: list[dict[str, Any]]
    names: list[str]
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Source:
    """A checkpoint that is to be written otherwise; it is checked, then read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata, self.about = read(directory)
        self.saved = self.metadata.state_dict_metadata
        classes = self.about["classes"].get(PROTOTYPES)
        if classes is None or not any(name.startswith(of_encoder("")) for name in self.saved):
            modules = {name.split(".")[1] for name in self.saved if name.startswith("modules.")}
            raise CheckpointError(
                f"{directory}: must have the modules {ENCODER!r} and {LOSS!r}, the loss; has "
                f"{', '.join(sorted(modules))}"
            )
        if classes.get("num_centers", 1) > 1:
            raise CheckpointError(
                f"{directory}: has {classes['num_centers']} centers of each class, PartialFC has "
                "one"
            )
        self.num_classes: int = classes["num_classes"]

    def progress(self) -> tuple[dict[str, Any], list[str]]:
        """Plain values of a trainer's checkpoint, and which of them are missing."""
        extra = self.about["extra"]
        step = self.read({"step": f"modules.{LOSS}.step"})["step"]
        trainer = {"epoch": extra.get("epoch"), "global_step": extra.get("global_step", int(step))}
        trainer[SCHEDULER] = extra.get("lr_scheduler")
        missing = [key for key, value in trainer.items() if value is None]
        return {key: value for key, value in trainer.items() if value is not None}, missing

    def encoder(self, order: list[str]) -> dict[str, Tensor]:
        """Its state dict, parameters in the optimizer's order, so that numbers mean them again."""
        names = {
            plain_name(name).removeprefix(of_encoder("")): name
            for name in self.saved
            if name.startswith(of_encoder(""))
        }
        place = {name.removeprefix(of_encoder("")): number for number, name in enumerate(order)}
        ordered = sorted(names, key=lambda name: place.get(name, len(place)))
        return self.read({name: names[name] for name in ordered})

    def optimizer(self) -> _Optimizer:
        """Its groups, and what is there of its parameters."""
        there = self.about["optimizers"]
        if MAIN not in there:
            raise CheckpointError(
                f"{self.directory}: must have the optimizer {MAIN!r}, has "
                f"{', '.join(map(repr, sorted(there))) or 'none'}; without its state it can be "
                "written"
            )
        saved = there[MAIN]
        params = [name for group in saved["groups"] for name in group["params"]]
        if not params or plain_name(params[-1]) != PROTOTYPES:
            raise CheckpointError(
                f"{self.directory}: the optimizer's last parameter must be the prototypes, as in "
                f"the trainer, but is {params[-1] if params else 'none'}; without its state it can "
                "be written"
            )
        sizes = [len(group["params"]) for group in saved["groups"]]
        if len(sizes) > 2 or sizes[-1] not in (1, len(params)):
            raise CheckpointError(
                f"{self.directory}: the optimizer has groups of {', '.join(map(str, sizes))} "
                "parameters, the trainer has one of the encoder's and one of the prototypes; "
                "without its state it can be written"
            )
        groups, first = [], 0
        for group in saved["groups"]:
            options = {key: as_option(value, None) for key, value in group.items()}
            if "momentum" in options:
                options.setdefault("dampening", 0)  # which RowSGD does not have
            count = len(group["params"])
            groups.append({**options, "params": list(range(first, first + count))})
            first += count
        result = _Optimizer(groups, [plain_name(name) for name in params])
        for name, plain in zip(params, result.names, strict=True):
            prefix = joined("optimizers", MAIN, name) + "."
            keys = {key.removeprefix(prefix): key for key in self.saved if key.startswith(prefix)}
            result.keys[plain] = {key: full for key, full in keys.items() if "." not in key}
            result.values[plain] = saved["values"].get(name, {})
            if keys.keys() & _OF_ROWS:
                raise CheckpointError(
                    f"{self.directory}: the state of {plain} is by rows, of RowAdamW or RowSGD, "
                    "which torch's optimizers do not have; without its state it can be written"
                )
        return result

    def states(self, optimizer: _Optimizer, names: list[str]) -> dict[int, dict[str, Any]]:
        """What the optimizer has of the encoder's parameters, by their numbers."""
        found = {}
        for number, name in enumerate(names):
            state = {**optimizer.values[name], **self.read(optimizer.keys[name])}
            if state:
                found[number] = state
        return found

    def head(
        self, optimizer: _Optimizer | None, start: int, stop: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """The prototypes of classes [start, stop), and the optimizer's state of them."""
        keys = {} if optimizer is None else optimizer.keys[PROTOTYPES]
        of_rows = {key: name for key, name in keys.items() if len(self.saved[name].size)}
        shared = self.read({key: name for key, name in keys.items() if key not in of_rows})
        rows = read_rows(
            self.directory, self.metadata, {"weight": PROTOTYPES, **of_rows}, start, stop
        )
        values = {} if optimizer is None else optimizer.values[PROTOTYPES]
        return rows.pop("weight"), {**values, **shared, **rows}

    def read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Whole tensors, by the names here of those there."""
        targets = {name: _empty(self.saved[there]) for name, there in names.items()}
        if targets:
            by_name = {there: targets[name] for name, there in names.items()}
            read_tensors(by_name, checkpoint_id=self.directory, no_dist=True)
        return targets


def _empty(entry: Any) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)
