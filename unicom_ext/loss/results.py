"""What the loss tells beside its value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Metrics(NamedTuple):
    """Per-sample figures of one call, without gradient; B samples, ignored ones included."""

    loss: Tensor  # [B], 0 where ignored
    target_cosine: Tensor  # like labels, before the margin, 0 where ignored or repeated
    # With a process group the next two are there if they were asked for, and else None.
    largest_negative: Tensor  # [B], largest cosine of a negative in S, before the filter
    top1: Tensor  # [B] bool, some target_cosine >= largest_negative, False where ignored


def is_top1(counts: Tensor, target_cosine: Tensor, largest_negative: Tensor) -> Tensor:
    """`Metrics.top1`.  counts: bool like labels, False for those that do not count."""
    if counts.dim() == 1:
        return counts & (target_cosine >= largest_negative)
    return (counts & (target_cosine >= largest_negative[:, None])).any(dim=1)


class Selection(NamedTuple):
    """What the last forward pass drew."""

    class_index: Tensor  # [|S|] int64, sorted class ids; with a process group this rank's part
    feature_index: Tensor  # [d'] int64, sorted dimensions


class NearestClasses(NamedTuple):
    """What `PartialMarginSoftmax.topk` finds for each of b samples, without gradient."""

    cosine: Tensor  # [b, k] float32, falling
    class_index: Tensor  # [b, k] int64, the lower id first where cosines are equal
