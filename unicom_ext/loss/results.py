"""What the loss tells beside its value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Metrics(NamedTuple):
    """Per-sample figures of one call, without gradient; B samples, ignored ones included.

    With a process group `largest_negative` and `top1` are there if they were asked for, and else
    None.

    Attributes:
        loss: [B] floating point, 0 where ignored.
        target_cosine: floating point like labels, the cosine before the margin; 0 where ignored or
            repeated.
        largest_negative: [B] floating point, the largest cosine of a negative in S, before the
            filter.
        top1: [B] bool, some target_cosine >= largest_negative; False where ignored.
    """

    loss: Tensor
    target_cosine: Tensor
    largest_negative: Tensor
    top1: Tensor


def is_top1(counts: Tensor, target_cosine: Tensor, largest_negative: Tensor) -> Tensor:
    """`Metrics.top1`.  counts: bool like labels, False for those that do not count."""
    if counts.dim() == 1:
        return counts & (target_cosine >= largest_negative)
    return (counts & (target_cosine >= largest_negative[:, None])).any(dim=1)


class Selection(NamedTuple):
    """What the last forward pass drew.

    Attributes:
        class_index: int64 [number of classes], sorted ids; with a process group this rank's part.
        feature_index: int64 [number of dimensions], sorted.
    """

    class_index: Tensor
    feature_index: Tensor


class NearestClasses(NamedTuple):
    """What `PartialMarginSoftmax.topk` finds for each of b samples, without gradient.

    Attributes:
        cosine: [b, k] float32, falling.
        class_index: [b, k] int64, the lower id first where cosines are equal.
    """

    cosine: Tensor
    class_index: Tensor
