"""What the loss tells beside its value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Metrics(NamedTuple):
    """Per-sample figures of one call, without gradient; B samples, ignored ones included."""

    loss: Tensor  # [B], 0 where ignored
    target_cosine: Tensor  # [B], before the margin, 0 where ignored
    # With a process group the next two are there if they were asked for, and else None.
    largest_negative: Tensor  # [B], largest cosine of another class in S, before the filter
    top1: Tensor  # [B] bool, target_cosine >= largest_negative, False where ignored


class Selection(NamedTuple):
    """What the last forward pass drew."""

    class_index: Tensor  # [|S|] int64, sorted class ids; with a process group this rank's part
    feature_index: Tensor  # [d'] int64, sorted dimensions


class NearestClasses(NamedTuple):
    """What `PartialMarginSoftmax.topk` finds for each of b samples, without gradient."""

    cosine: Tensor  # [b, k] float32, falling
    class_index: Tensor  # [b, k] int64, the lower id first where cosines are equal
