"""Files of other trainers as a checkpoint of this package."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unicom_ext.checkpoint.pieces import Pieces
from unicom_ext.interchange import ranks
from unicom_ext.interchange.files import ENCODER as ENCODER_FILE
from unicom_ext.interchange.files import METRIC_LEARNING, SCHEDULER, File, read_file
from unicom_ext.interchange.found import LOSS, PROTOTYPES, Found, of_encoder
from unicom_ext.interchange.optimizer import State, read_state
from unicom_ext.interchange.ranks import Head
from unicom_ext.interchange.rows import counted, in_rank_order, of_columns
from unicom_ext.loss import checks
from unicom_ext.utils.files import CheckpointError


def read(
    files: Sequence[str | os.PathLike[str]],
    *,
    num_classes: int | None = None,
    num_centers: int = 1,
    encoder: nn.Module | None = None,
) -> Found:
    """Look into files of another trainer, and check that they are one whole checkpoint.

    Args:
        files: in any order, those of all ranks of one run: InsightFace's
            ``checkpoint_gpu_{rank}.pt``; or its older ``softmax_fc_gpu_{rank}.pt``, or
            ``rank_{rank}_softmax_weight.pt`` with ``rank_{rank}_softmax_weight_mom.pt``; or the
            state dict of a loss of pytorch-metric-learning, whose prototypes are the columns of W.
            With the latter, or alone, a file of the encoder's weights: a state dict, such as
            InsightFace's ``model.pt`` and those that UNICOM has published.
        num_classes: C, to be checked.
        num_centers: K of a `SubCenterArcFaceLoss`, whose state dict does not say it.
        encoder: the module that the trainer's optimizer was of, where the order of its parameters
            is not that of its state dict.

    What comes out is a checkpoint with the modules "encoder" and "loss" and the optimizer "main",
    whose groups are those of the trainer, the prototypes last. Of files without an optimizer, but
    with the momentum of the prototypes, it is of these alone. `extra` has "epoch", "global_step"
    and "lr_scheduler", as far as they are in the files. The loss goes on from the step global_step,
    with seed 0.

    Raises:
        CheckpointError: the files cannot be read, are unknown, incomplete, or not of one run.
        TypeError, ValueError: an argument is wrong, or num_classes or num_centers is not that of
            the files.
    """
    if num_classes is not None:
        checks.integer("num_classes", num_classes, 1)
    checks.integer("num_centers", num_centers, 1)
    if isinstance(files, str | os.PathLike):
        raise TypeError(f"files must be a list of paths, got {files!r}")
    if not files:
        raise ValueError("files must name one file or more, got none")
    found = [read_file(Path(path)) for path in files]
    encoders = [file for file in found if file.kind == ENCODER_FILE]
    heads = [file for file in found if file.kind != ENCODER_FILE]
    _check_kinds(encoders, heads)
    if num_centers > 1 and (not heads or heads[0].kind != METRIC_LEARNING):
        raise ValueError(
            f"num_centers must be 1 but for {METRIC_LEARNING}, got {num_centers}: no other file "
            "has several"
        )
    if not heads:
        if num_classes is not None:
            raise ValueError(f"num_classes is {num_classes}, but the files hold no prototypes")
        tensors = encoders[0].encoder
        described = {"format": ENCODER_FILE, "encoder": _sizes(tensors)}
        return Found(described, [], _named(tensors), {}, {}, {})
    if heads[0].kind == METRIC_LEARNING:
        return _metric_learning(heads[0], encoders, num_classes, num_centers)
    head = ranks.in_order(heads)
    _check_classes(num_classes, sum(head.counts), f"{counted(head.counts)} in the files")
    return _partial_fc(head, encoders, read_state(head, encoder))


def _check_kinds(encoders: list[File], heads: list[File]) -> None:
    kinds = sorted({file.kind for file in heads})
    if len(kinds) > 1:
        raise CheckpointError(
            "files of one kind are expected, but there are "
            + "; ".join(
                f"{kind}: {', '.join(str(f.path) for f in heads if f.kind == kind)}"
                for kind in kinds
            )
        )
    with_encoder = [*encoders, *(file for file in heads[:1] if file.encoder)]
    if len(with_encoder) > 1:
        raise CheckpointError(
            "one encoder is expected, but there are several: "
            f"{', '.join(str(file.path) for file in with_encoder)}"
        )
    if kinds == [METRIC_LEARNING] and len(heads) > 1:
        raise CheckpointError(
            f"one file of {METRIC_LEARNING} is expected, but there are several: "
            f"{', '.join(str(file.path) for file in heads)}"
        )


def _metric_learning(
    file: File, encoders: list[File], num_classes: int | None, num_centers: int
) -> Found:
    matrix = file.rows["W"].whole
    dim, columns = matrix.shape
    if columns % num_centers:
        raise ValueError(
            f"num_centers must divide the {columns} columns of W in {file.path}, got {num_centers}"
        )
    count = columns // num_centers
    _check_classes(num_classes, count, f"W is {[dim, columns]}")
    centers = f", {num_centers} centers each" if num_centers > 1 else ""
    described = {"format": file.kind, "classes": f"{count:,}{centers}"}
    return _found(described, of_columns(matrix, num_centers), num_centers, encoders, State(), {}, 0)


def _partial_fc(head: Head, encoders: list[File], state: State) -> Found:
    first = head.files[0]
    weight = in_rank_order([file.rows["weight"] for file in head.files])
    described = {
        "format": first.kind,
        "classes": f"{weight.shape[0]:,}: {counted(head.counts)}",
    }
    extra: dict[str, Any] = {
        key: first.trainer[key] for key in ("epoch", "global_step") if key in first.trainer
    }
    if SCHEDULER in first.trainer:
        if _is_plain(first.trainer[SCHEDULER]):
            extra["lr_scheduler"] = first.trainer[SCHEDULER]
        else:
            state.notes.append(
                "the state of the scheduler holds what JSON cannot: it is left out, and must be "
                "made from global_step"
            )
    if len(head.files) > 1 and any(name.endswith("running_mean") for name in first.encoder):
        state.notes.append("running statistics of the backbone are those of rank 0")
    with_encoder = [first] if first.encoder else encoders
    return _found(described, weight, 1, with_encoder, state, extra, extra.get("global_step", 0))


def _found(
    described: dict[str, str],
    weight: Pieces,
    num_centers: int,
    encoders: list[File],
    state: State,
    extra: dict[str, Any],
    step: int,
) -> Found:
    dim = weight.shape[-1]
    if 0 in weight.shape:
        raise CheckpointError(f"the files hold no prototypes: they are {list(weight.shape)}")
    dtype = str(weight.dtype).removeprefix("torch.")
    described["embeddings"] = f"{dim} dimensions, {dtype}"
    described["encoder"] = _sizes(encoders[0].encoder) if encoders else "none"
    described["optimizer"] = _optimizer(state)
    if extra:
        described["progress"] = ", ".join(
            f"{key} {extra[key]}" for key in ("epoch", "global_step") if key in extra
        )
    tensors: dict[str, Tensor | Pieces] = {
        **(_named(encoders[0].encoder) if encoders else {}),
        PROTOTYPES: weight,
        f"modules.{LOSS}.step": torch.tensor(step),
        f"modules.{LOSS}._extra_state": torch.tensor(0),  # the seed
        **state.tensors(),
    }
    about = {
        "num_classes": weight.shape[0],
        "num_centers": num_centers,
        "embedding_size": dim,
        "seed": 0,
    }
    return Found(described, state.notes, tensors, {PROTOTYPES: about}, state.about(), extra)


def _check_classes(num_classes: int | None, there: int, how: str) -> None:
    if num_classes is not None and num_classes != there:
        raise ValueError(f"num_classes is {num_classes}, but the files are of {there}: {how}")


def _optimizer(state: State) -> str:
    if not state.groups:
        return "none"
    options = state.groups[-1]
    kind = "Adam or AdamW" if "betas" in options else "SGD" if "dampening" in options else "other"
    held = {key for of_param in state.of_param.values() for key in of_param}
    count = sum(len(group["params"]) for group in state.groups)
    of_rows = ", ".join(sorted(state.of_param.get(PROTOTYPES, {}))) or "nothing"
    return (
        f"{kind}: {', '.join(sorted(held)) or 'nothing'} of {len(state.of_param)} of {count} "
        f"parameters, of the prototypes {of_rows}"
    )


def _named(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    return {of_encoder(name): value.detach() for name, value in encoder.items()}


def _sizes(tensors: dict[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()):,} values"


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
