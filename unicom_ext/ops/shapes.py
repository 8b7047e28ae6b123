"""Shapes of the operators' results, for `torch.compile`: what each returns, without values.

They must say what csrc/cpu and csrc/cuda do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from unicom_ext.ops.codes import PRECISION, REDUCTION, Codes

_LANES, _TILE = 16, 6  # csrc/cpu/kernels/layout.h
_CUDA_ROWS, _CUDA_CLASSES, _CUDA_DEPTH = 128, 256, 64  # csrc/cuda/kernels/logits.h
_CUDA_ATTENDED = 256  # kMostAttended in csrc/cuda/kernels/attention.h
_CUDA_TEAM = 16  # kTeam in csrc/cuda/kernels/tile_simt.cuh and tile_tensor_core.cuh


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _of(operator: str) -> Callable[[_Function], _Function]:
    """Makes a function say the shapes of an operator's results."""
    register: Callable[[_Function], _Function]
    register = torch.library.register_fake(f"unicom_ext::{operator}")
    return register


def _round_up(a: int, b: int) -> int:
    return (a + b - 1) // b * b


def _smaller(a: int, b: int) -> int:
    smaller: int = torch.sym_min(a, b)
    return smaller


def _width(slot: Tensor) -> int:
    return slot.shape[1] if slot.dim() == 2 else 1


def state_size(slot: Tensor) -> int:
    """Numbers that forward leaves of each sample: `state_size` in csrc/core/target.h."""
    return 6 + 3 * _width(slot)


def sums_size(labels: Tensor) -> int:
    """Numbers of each sample that shards sum up: `ShardSums` in csrc/core/problem.h."""
    return 3 + _width(labels)


def _places(num_sampled: int, centers: int, value_bytes: int, device_type: str) -> int:
    """Rows of the packed prototypes of so many classes."""
    if device_type != "cuda":
        return _round_up(num_sampled, _LANES) * centers
    if centers > 1:  # ClassOrder in csrc/cuda/kernels/logits.h
        tile = 256 if value_bytes == 2 else 512 // value_bytes
        # The operator itself refuses more than a thread has columns.
        classes = _CUDA_TEAM * max(tile // _CUDA_TEAM // centers, 1)
        num_sampled = _round_up(num_sampled, classes) // classes * tile
    return _round_up(num_sampled, _CUDA_CLASSES)


def _packed_bytes(classes: int, dim: int, bytes_per_value: int, device_type: str) -> int:
    """classes: of `_places`."""
    cuda = device_type == "cuda"
    height = _round_up(dim, _CUDA_DEPTH if cuda else _TILE)
    return classes * height * bytes_per_value + (classes + height) * 8


def _kept_bytes(
    classes: int,
    batch: int,
    dim: int,
    real_bytes: int,
    value_bytes: int,
    device_type: str,
    codes: Codes,
) -> int:
    workspace_bytes, centers = codes.workspace_bytes, codes.num_centers
    if device_type == "cuda":  # kept_bytes in csrc/cuda/host/loss.cpp
        rows, depth = _round_up(batch, _CUDA_ROWS), _round_up(dim, _CUDA_DEPTH)
        if value_bytes == 2:
            attended = codes.wants_embeddings and centers == 1 and depth <= _CUDA_ATTENDED
            return rows * (depth + 1) * 4 if attended else 0
        class_bytes = rows * real_bytes
        if class_bytes == 0:
            return 0
        fit = workspace_bytes // (class_bytes * _CUDA_CLASSES) * _CUDA_CLASSES
        return _smaller(fit, classes) * class_bytes
    panels = classes // _LANES
    panel_bytes = _round_up(batch, _TILE) * _LANES * real_bytes
    if workspace_bytes == 0 or panel_bytes == 0:
        return 0
    fit = workspace_bytes // panel_bytes
    together = 4 if centers == 1 else centers
    return (panels if fit >= panels else fit // together * together) * panel_bytes


@_of("select_classes")
def _(
    labels: Tensor,
    step: Tensor,
    num_classes: int,
    num_sampled: int,
    seed: int,
    ignore_index: int,
    start: int,
    stop: int,
) -> tuple[Tensor, ...]:
    # selection_bound in csrc/core/sampler.h
    covered = min((stop + 255) // 256 * 256, num_classes) - start // 256 * 256
    whole = covered == num_classes
    quota = num_sampled if whole else num_sampled * covered // num_classes + 1
    bound = _smaller(stop - start, quota + _smaller(labels.numel(), covered))
    new = labels.new_empty
    return (
        new((bound,), dtype=torch.int64),
        new((), dtype=torch.int64),
        new(labels.shape, dtype=torch.int64),
    )


@_of("select_features")
def _(step: Tensor, dim: int, num_selected: int, seed: int) -> Tensor:
    return step.new_empty((num_selected,))


@_of("label_slots")
def _(
    labels: Tensor,
    class_index: Tensor | None,
    num_classes: int,
    ignore_index: int,
    start: int,
    stop: int,
) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.int64)


def _saved_sizes(
    embeddings: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    codes: Codes,
) -> tuple[int, int]:
    """Bytes of `packed` and `kept`."""
    batch, dim = embeddings.shape
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    device_type = embeddings.device.type
    halves = (PRECISION["bf16"], PRECISION["fp16"] if device_type == "cuda" else None)
    value_bytes = 8 if double else 2 if codes.precision in halves else 4
    centers = codes.num_centers
    num_classes = prototypes.shape[0] // centers
    num_sampled = num_classes if class_index is None else class_index.shape[0]
    classes = _places(num_sampled, centers, value_bytes, device_type)
    num_features = dim if feature_index is None else feature_index.shape[0]
    return (
        _packed_bytes(classes, num_features, value_bytes, device_type),
        _kept_bytes(
            classes,
            batch,
            num_features,
            8 if double else 4,
            value_bytes,
            device_type,
            codes,
        ),
    )


@_of("loss")
def _(
    embeddings: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    count: Tensor | None,
    feature_index: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    scale: Tensor | None,
    reals: list[float],
    codes: list[int],
) -> tuple[Tensor, ...]:
    code = Codes(*codes)
    batch = embeddings.shape[0]
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    real = torch.float64 if double else torch.float32
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, code)
    new = embeddings.new_empty
    return (
        new((batch,) if code.reduction == REDUCTION["none"] else (), dtype=real),
        new((batch,), dtype=real),
        new(slot.shape, dtype=real),
        new((batch,), dtype=real),
        new((batch, state_size(slot)), dtype=torch.float64),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@_of("loss_sums")
def _(
    embeddings: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    count: Tensor | None,
    feature_index: Tensor | None,
    total_sampled: int,
    reals: list[float],
    codes: list[int],
) -> tuple[Tensor, ...]:
    batch = embeddings.shape[0]
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, Codes(*codes))
    new = embeddings.new_empty
    return (
        new((batch, sums_size(slot)), dtype=torch.float64),
        *(new((batch,), dtype=torch.float64) for _ in range(3)),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@_of("loss_merge")
def _(
    sums: Tensor,
    exponent: Tensor,
    inverse_norm: Tensor,
    slot: Tensor,
    m2: Tensor | None,
    m3: Tensor | None,
    reals: list[float],
    codes: list[int],
) -> tuple[Tensor, Tensor]:
    batch = slot.shape[0]
    return sums.new_empty((batch,)), sums.new_empty((batch, state_size(slot)))


@_of("loss_backward")
def _(
    grad_loss: Tensor,
    embeddings: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    count: Tensor | None,
    feature_index: Tensor | None,
    state: Tensor,
    packed: Tensor,
    kept: Tensor,
    reals: list[float],
    codes: list[int],
    want_embeddings: bool,
    want_radial: bool,
    want_prototypes: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = prototypes.shape
    if compact and class_index is not None:
        rows = class_index.shape[0] * Codes(*codes).num_centers
    return (
        embeddings.new_empty(embeddings.shape if want_embeddings else (0, 0)),
        prototypes.new_empty((rows, dim) if want_prototypes else (0, 0)),
        embeddings.new_empty(embeddings.shape[0] if want_radial else 0, dtype=torch.float64),
    )
