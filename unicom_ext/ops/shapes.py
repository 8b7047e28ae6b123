"""Shapes of the operators' results, for `torch.compile`: what each returns, without values.

They must say what csrc/cpu and csrc/cuda do.
"""

from __future__ import annotations

import torch

from unicom_ext.ops.codes import PRECISION, REDUCTION, Codes

_LANES, _TILE = 16, 6  # csrc/cpu/kernels/layout.h
_CUDA_ROWS, _CUDA_CLASSES, _CUDA_DEPTH = 128, 256, 64  # csrc/cuda/kernels/logits.h


def _round_up(a, b):
    return (a + b - 1) // b * b


def _packed_bytes(num_sampled, dim, bytes_per_value, device_type):
    cuda = device_type == "cuda"
    classes = _round_up(num_sampled, _CUDA_CLASSES if cuda else _LANES)
    height = _round_up(dim, _CUDA_DEPTH if cuda else _TILE)
    return classes * height * bytes_per_value + classes * 8


def _kept_bytes(num_sampled, batch, real_bytes, value_bytes, workspace_bytes, device_type):
    if device_type == "cuda":  # kept_classes in csrc/cuda/host/loss.h
        class_bytes = _round_up(batch, _CUDA_ROWS) * real_bytes
        if value_bytes == 2 or class_bytes == 0:
            return 0
        fit = workspace_bytes // (class_bytes * _CUDA_CLASSES) * _CUDA_CLASSES
        return torch.sym_min(fit, _round_up(num_sampled, _CUDA_CLASSES)) * class_bytes
    panels = (num_sampled + _LANES - 1) // _LANES
    panel_bytes = _round_up(batch, _TILE) * _LANES * real_bytes
    if workspace_bytes == 0 or panel_bytes == 0:
        return 0
    fit = workspace_bytes // panel_bytes
    return (panels if fit >= panels else fit // 4 * 4) * panel_bytes


@torch.library.register_fake("unicom_ext::select_classes")
def _(labels, step, num_classes, num_sampled, seed, ignore_index, start, stop):
    batch = labels.shape[0]
    # selection_bound in csrc/core/sampler.h
    covered = min((stop + 255) // 256 * 256, num_classes) - start // 256 * 256
    whole = covered == num_classes
    quota = num_sampled if whole else num_sampled * covered // num_classes + 1
    bound = torch.sym_min(stop - start, quota + torch.sym_min(batch, covered))
    new = labels.new_empty
    return (
        new((bound,), dtype=torch.int64),
        new((), dtype=torch.int64),
        new((batch,), dtype=torch.int64),
    )


@torch.library.register_fake("unicom_ext::select_features")
def _(step, dim, num_selected, seed):
    return step.new_empty((num_selected,))


@torch.library.register_fake("unicom_ext::label_slots")
def _(labels, class_index, num_classes, ignore_index, start, stop):
    return labels.new_empty(labels.shape, dtype=torch.int64)


def _saved_sizes(embeddings, prototypes, class_index, feature_index, codes):
    """Bytes of `packed` and `kept`."""
    batch, dim = embeddings.shape
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    device_type = embeddings.device.type
    halves = (PRECISION["bf16"], PRECISION["fp16"] if device_type == "cuda" else None)
    value_bytes = 8 if double else 2 if codes.precision in halves else 4
    num_sampled = prototypes.shape[0] if class_index is None else class_index.shape[0]
    num_features = dim if feature_index is None else feature_index.shape[0]
    return (
        _packed_bytes(num_sampled, num_features, value_bytes, device_type),
        _kept_bytes(
            num_sampled, batch, 8 if double else 4, value_bytes, codes.workspace_bytes, device_type
        ),
    )


@torch.library.register_fake("unicom_ext::loss")
def _(embeddings, slot, prototypes, class_index, count, feature_index, m2, m3, reals, codes):
    codes = Codes(*codes)
    batch = embeddings.shape[0]
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    real = torch.float64 if double else torch.float32
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, codes)
    new = embeddings.new_empty
    return (
        new((batch,) if codes.reduction == REDUCTION["none"] else (), dtype=real),
        new((batch,), dtype=real),
        new((batch,), dtype=real),
        new((batch,), dtype=real),
        new((batch, 6), dtype=torch.float64),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@torch.library.register_fake("unicom_ext::loss_sums")
def _(embeddings, slot, prototypes, class_index, count, feature_index, total_sampled, reals, codes):
    codes = Codes(*codes)
    batch = embeddings.shape[0]
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, codes)
    new = embeddings.new_empty
    return (
        new((batch, 2), dtype=torch.float64),
        *(new((batch,), dtype=torch.float64) for _ in range(3)),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@torch.library.register_fake("unicom_ext::loss_merge")
def _(sums, exponent, inverse_norm, slot, m2, m3, reals, codes):
    batch = slot.shape[0]
    return sums.new_empty((batch,)), sums.new_empty((batch, 6))


@torch.library.register_fake("unicom_ext::loss_backward")
def _(grad_loss, embeddings, slot, prototypes, class_index, count, feature_index, state, packed,
      kept, reals, codes, want_embeddings, want_prototypes, compact):  # fmt: skip
    num_rows = class_index.shape[0] if compact else prototypes.shape[0]
    dim = embeddings.shape[1]
    return (
        embeddings.new_empty(embeddings.shape if want_embeddings else (0, 0)),
        prototypes.new_empty((num_rows, dim) if want_prototypes else (0, 0)),
    )
