"""Checks of tensors and sizes that the function, the module and the reference share.

`unicom_ext.loss.options` checks the options. Nothing here looks at the values inside a tensor, but
for `check_finite` and `check_values`: the operators do that.
"""

from __future__ import annotations

import operator
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from unicom_ext.loss.labels import place
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.options import LossOptions, kind
from unicom_ext.ops.library import check_device


def integer(name: str, value: object, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """Any kind of whole number, NumPy's too, as an int in [low, high]."""
    if (low, high) == (-(2**63), 2**63 - 1):
        allowed = "that fits in int64"
    else:
        allowed = f">= {low}" if high == 2**63 - 1 else f"in [{low}, {high}]"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        raise TypeError(f"{name} must be an integer {allowed}, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be an integer {allowed}, got {number}")
    return number


def boolean(name: str, value: object) -> bool:
    if value not in (False, True):
        raise ValueError(f"{name} must be one of (False, True), got {value!r}")
    return bool(value)


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in _FLOATING:
        raise TypeError(f"dtype must be None or one of {_FLOATING}, got {dtype!r}")


def is_local(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor, and no `DTensor` (whose module is slow to import)."""
    plain = type(value) in (Tensor, Parameter)  # which saves a look for what is not there
    return plain or (isinstance(value, Tensor) and not hasattr(value, "placements"))


def check_call(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    options: LossOptions,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> None:
    """All that can be seen before the operators.

    num_classes: with a process group those of all ranks, of which this one may own none.
    """
    check_tensors(
        embeddings,
        labels,
        prototypes,
        options.margin,
        class_index,
        feature_index,
        num_classes=num_classes,
        num_centers=options.num_centers,
    )
    check_device(embeddings.device)
    if options.check_inputs:
        total = num_classes
        if total is None:
            total = len(prototypes) // options.num_centers
        check_values(embeddings, labels, total, options.ignore_index)


def _check_own(name: str, value: object) -> None:
    if isinstance(value, Tensor) and not is_local(value):
        raise TypeError(
            f"{name} must be this rank's own, got a DTensor: give its to_local() if it is "
            "sharded by rows like the batch, or else its full_tensor()"
        )


def check_rows(
    embeddings: Tensor, prototypes: Tensor, *, min_classes: int = 1, num_centers: int = 1
) -> None:
    """That they are [B, d] and [C * num_centers, d]; without a look at devices."""
    for name, value in (("embeddings", embeddings), ("prototypes", prototypes)):
        _check_own(name, value)
    for name, tensor in (("embeddings", embeddings), ("prototypes", prototypes)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING:
            raise TypeError(
                f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {kind(tensor)}"
            )
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got the shape {list(tensor.shape)}")
    rows, dim = prototypes.shape
    if embeddings.shape[1] != dim:
        raise ValueError(
            f"embeddings must be [B, {prototypes.shape[1]}] like the prototypes "
            f"{list(prototypes.shape)}, got {list(embeddings.shape)}"
        )
    if rows < min_classes or dim < 1 or rows % num_centers:
        wanted = "[C, d]" if num_centers == 1 else f"[C * {num_centers}, d]"
        raise ValueError(
            f"prototypes must be {wanted} with C, d >= 1, got {list(prototypes.shape)}"
        )


def check_tensors(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    margin: CombinedMargin,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    *,
    num_classes: int | None = None,
    num_centers: int = 1,
) -> None:
    """num_classes: as `check_call` has it."""
    _check_own("labels", labels)
    check_rows(
        embeddings,
        prototypes,
        min_classes=1 if num_classes is None else 0,
        num_centers=num_centers,
    )
    batch = len(embeddings)
    num_classes = len(prototypes) // num_centers if num_classes is None else num_classes
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            "labels must be an int32 or int64 tensor, or a pair (ids, offsets) of such, got "
            f"{kind(labels)}"
        )
    if labels.dim() not in (1, 2) or labels.shape[0] != batch or 0 in labels.shape[1:]:
        raise ValueError(
            f"labels must have shape [{batch}], or [{batch}, P] for several positives, "
            f"got {list(labels.shape)}"
        )
    if num_classes > 1 and labels.shape[1:] == (num_classes,):
        raise ValueError(
            f"labels must have shape [{batch}], or [{batch}, P] for P class ids of each sample; "
            f"got {list(labels.shape)}, which look like a one-hot code of {num_classes} classes"
        )
    for name, each in (("margin.m2", margin.m2), ("margin.m3", margin.m3)):
        if isinstance(each, Tensor) and each.shape not in (labels.shape[:1], labels.shape):
            one_each = "" if labels.dim() == 1 else f" or {list(labels.shape)}"
            raise ValueError(f"{name} must have shape [{batch}]{one_each}, got {list(each.shape)}")
    for name, index in (("class_index", class_index), ("feature_index", feature_index)):
        if index is None:
            continue
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {kind(index)}")
        if index.dim() != 1:
            raise ValueError(f"{name} must be a vector, got the shape {list(index.shape)}")
    device = embeddings.device
    for name, other in (
        ("labels", labels),
        ("prototypes", prototypes),
        ("margin.m2", margin.m2),
        ("margin.m3", margin.m3),
        ("class_index", class_index),
        ("feature_index", feature_index),
    ):
        if isinstance(other, Tensor) and other.device != device:
            raise ValueError(f"{name} must be on {device} like the embeddings, got {other.device}")


def check_finite(embeddings: Tensor) -> None:
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"embeddings must be finite when check_inputs=True, got NaN or infinity in row {row}"
        )


def check_values(embeddings: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """What only `check_inputs` looks at; waits for the device."""
    check_finite(embeddings)
    check_labels(labels, num_classes, ignore_index)


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bad.any():
        position = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}), got "
            f"{int(labels.flatten()[position])} at position {place(labels, position)}"
        )
