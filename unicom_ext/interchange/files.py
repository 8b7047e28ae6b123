"""One file of another trainer: what it holds, recognised by what is in it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicom_ext.encoders import weights
from unicom_ext.interchange.rows import Rows
from unicom_ext.utils.files import CheckpointError

# What kinds of files are called, with the names that their trainers give them.
TRAINER = "InsightFace's checkpoint_gpu_{rank}.pt"
HEAD = "InsightFace's softmax_fc_gpu_{rank}.pt"
OLDEST = "InsightFace's rank_{rank}_softmax_weight.pt"
METRIC_LEARNING = "a loss of pytorch-metric-learning"
ENCODER = "weights of an encoder"

BACKBONE, SOFTMAX = "state_dict_backbone", "state_dict_softmax_fc"
OPTIMIZER, SCHEDULER = "state_optimizer", "state_lr_scheduler"
_OF_TRAINER = (BACKBONE, SOFTMAX, OPTIMIZER, SCHEDULER, "epoch", "global_step")

# Of the heads until 2022, by torch's names for the same. While a step samples classes, their rows
# are in tensors of their own, which go back into those of all classes at the next step.
_OLD_STATE = {
    "weight_mom": "momentum_buffer",
    "weight_exp_avg": "exp_avg",
    "weight_exp_avg_sq": "exp_avg_sq",
}
_INDEX = "weight_index"
_OF_HEAD = (
    *("weight", *_OLD_STATE, _INDEX, "weight_activated"),
    *(name.replace("weight", "weight_activated", 1) for name in _OLD_STATE),
)
_RANK = re.compile(r"(?:gpu|rank)[_:]?([0-9]+)|(?<![0-9])([0-9]+)(?=_softmax_weight)")
_MUST_HOLD = "tensors and plain values alone, as a trainer's checkpoint does"


@dataclass
class File:
    """A file that was read; its tensors stay in it until they are wanted.

    kind: one of the names above.
    rank: of those that are of one rank, if its name says so.
    rows: what it holds for each class: the "weight", and the optimizer's state by torch's names.
    trainer: the values of a trainer's checkpoint besides, by its keys.
    """

    path: Path
    kind: str
    rank: int | None = None
    rows: dict[str, Rows] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Tensor] = field(default_factory=dict)


def read_file(path: Path) -> File:
    """Recognise a file.

    Raises CheckpointError: it cannot be read, or is none of those that can be imported;
    ConfigError: reading it needs a package that is not installed.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return File(path, ENCODER, encoder=weights.read(str(path)).tensors)
    if not path.exists():
        raise CheckpointError(f"{path}: is not there")
    content = weights.read_torch(path, _MUST_HOLD)
    if isinstance(content, Tensor):
        return _oldest(path, content)
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{path}: holds no tensors by name")
    if content.keys() & {BACKBONE, SOFTMAX}:
        return _trainer(path, content)
    plain = weights.without_wrappers(content)
    if "W" in plain:
        _check_keys(path, plain, ("W",), ("W",))
        rows = {"W": Rows(_matrix(path, "W", plain["W"]))}
        return File(path, METRIC_LEARNING, rows=rows)
    if {"weight", "weight_activated"} & plain.keys() and plain.keys() <= set(_OF_HEAD):
        return File(path, HEAD, rank_of(path), rows=_rows(path, plain))
    return File(path, ENCODER, encoder=weights.read(str(path)).tensors)


def rank_of(path: Path) -> int | None:
    """The rank that a file's name says."""
    found = _RANK.search(path.name)
    return None if found is None else int(found[found.lastindex or 1])


def beside(path: Path) -> list[Path]:
    """The files in its folder that are called as this one but for the rank, in their order."""
    found = _RANK.search(path.name)
    if found is None:
        return [path]
    start, stop = found.span(found.lastindex or 1)
    alike = re.compile(f"{re.escape(path.name[:start])}[0-9]+{re.escape(path.name[stop:])}")
    paths = [other for other in path.parent.iterdir() if alike.fullmatch(other.name)]
    return sorted(paths, key=lambda other: rank_of(other) or 0)


def _oldest(path: Path, content: Tensor) -> File:
    is_momentum = path.stem.endswith("_softmax_weight_mom")
    if not is_momentum and not path.stem.endswith("_softmax_weight"):
        raise CheckpointError(
            f"{path}: holds one tensor {list(content.shape)}, and nothing says what it is; "
            "prototypes are called rank_0_softmax_weight.pt, their momentum "
            "rank_0_softmax_weight_mom.pt"
        )
    name = "momentum_buffer" if is_momentum else "weight"
    rows = {name: Rows(_matrix(path, "the tensor", content))}
    return File(path, OLDEST, rank_of(path), rows=rows)


def _trainer(path: Path, content: dict[str, Any]) -> File:
    _check_keys(path, content, _OF_TRAINER, (BACKBONE, SOFTMAX))
    for key in _OF_TRAINER:
        kind = int if key in ("epoch", "global_step") else dict
        if key in content and not isinstance(content[key], kind):
            raise CheckpointError(
                f"{path}: {key} must be of type {kind.__name__}, got {type(content[key]).__name__}"
            )
    backbone, head = content.pop(BACKBONE), content.pop(SOFTMAX)
    for name, value in backbone.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {BACKBONE} holds a {type(value).__name__} under {name!r}, must hold "
                "tensors by name"
            )
    if not 0 <= (step := content.get("global_step", 0)) < 1 << 63:
        raise CheckpointError(f"{path}: global_step must be in [0, 2^63), got {step}")
    rows = _rows(path, weights.without_wrappers(head))
    encoder = _without_parallel(backbone)
    return File(path, TRAINER, rank_of(path), rows=rows, trainer=content, encoder=encoder)


def _without_parallel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of DistributedDataParallel and torch.compile around all of it."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _rows(path: Path, head: dict[str, Any]) -> dict[str, Rows]:
    """What the state dict of a head holds for each class."""
    _check_keys(path, head, _OF_HEAD, ())
    if "weight" not in head and "weight_activated" in head:  # of one that samples all classes
        head = {"weight": head["weight_activated"]}
    if "weight" not in head:
        raise CheckpointError(f"{path}: the head has no weight, only {_listed(head)}")
    index = head.get(_INDEX)
    sampled = index if isinstance(index, Tensor) and index.numel() else None
    rows = {}
    for key, name in {"weight": "weight", **_OLD_STATE}.items():
        if key not in head:
            continue
        whole = _matrix(path, key, head[key])
        newer = head.get(key.replace("weight", "weight_activated", 1))
        if sampled is None and newer is not None and newer.numel():
            raise CheckpointError(
                f"{path}: the head has newer rows of {key}, but no {_INDEX} that says of which "
                "classes"
            )
        if sampled is None or newer is None:
            rows[name] = Rows(whole)
            continue
        if (
            newer.shape != (len(sampled), whole.shape[1])
            or sampled.dtype != torch.int64
            or not all(0 <= int(end) < len(whole) for end in sampled.aminmax())
        ):
            raise CheckpointError(
                f"{path}: {key.replace('weight', 'weight_activated', 1)} {list(newer.shape)} must "
                f"have a row for each of the {len(sampled)} classes of {_INDEX}, which must be "
                f"below {len(whole)}"
            )
        rows[name] = Rows(whole, sampled, newer)
    return rows


def _matrix(path: Path, name: str, value: Any) -> Tensor:
    if (
        not isinstance(value, Tensor)
        or value.dim() != 2
        or not value.is_floating_point()
        or value.layout != torch.strided
        or value.is_meta
    ):
        got = (
            f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            got += f" on {value.device}, {str(value.layout).removeprefix('torch.')}"
        raise CheckpointError(f"{path}: {name} must be a dense matrix of floats, got {got}")
    return value.detach()


def _check_keys(
    path: Path, content: dict[str, Any], known: Collection[str], needed: Collection[str]
) -> None:
    unknown = [key for key in content if key not in known]
    missing = [key for key in needed if key not in content]
    if unknown or missing:
        what = f"{_listed(unknown)} is not known" if unknown else f"{_listed(missing)} is missing"
        raise CheckpointError(
            f"{path}: {what}; it holds {_listed(content)}, expected are {_listed(known)}"
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "nothing"
