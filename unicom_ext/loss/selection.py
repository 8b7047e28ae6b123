"""The classes and dimensions that take part in a call, on one rank or several."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unicom_ext.loss.labels import once_each
from unicom_ext.loss.nested import prefix_length
from unicom_ext.ops import counter, library


class Sampling(NamedTuple):
    """How much a step draws, and from which random stream."""

    num_classes: int  # of all ranks
    num_sampled: int  # classes to draw; `num_classes` for none
    dim: int
    num_features: int  # dimensions to draw, on average where nested; `dim` for none
    seed: int
    nested: int = 0  # 1: the first ones, of a number that is drawn

    @classmethod
    def nothing(cls, num_classes: int, dim: int) -> Sampling:
        return cls(num_classes, num_classes, dim, dim, 0)

    @property
    def draws_classes(self) -> bool:
        return self.num_sampled < self.num_classes

    @property
    def draws_features(self) -> bool:
        return self.num_features < self.dim

    def draw_features(self, step: Tensor) -> Tensor:
        """The dimensions of a step, sorted."""
        if not self.nested:
            return library.ops.select_features(step, self.dim, self.num_features, self.seed)
        length = prefix_length(self.dim, self.num_features, self.seed, counter.on_host(step))
        return torch.arange(length, device=step.device)


class Selected(NamedTuple):
    """What takes part, in the order in which the operators take it."""

    slot: Tensor  # int64 like labels: places in class_index; -1 ignored or repeated, -2 elsewhere
    class_index: Tensor | None  # [bound] int64, sorted; None for all
    num_valid: Tensor | None  # of class_index, int64 scalar; None for all
    feature_index: Tensor | None  # [d'] int64, sorted; None for all


def select(
    labels: Tensor,
    sampling: Sampling,
    ignore_index: int,
    *,
    step: Tensor | None = None,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Selected:
    """What is drawn, or else what is given, or else everything.

    Args:
        labels: [B] or [B, P] int32 or int64, of all ranks.
        sampling: whether classes and dimensions are drawn.
        ignore_index: the label of samples without loss.
        step: int64 scalar tensor, for which they are drawn.
        class_index: sorted ids of the classes that take part; not with classes that are drawn.
        feature_index: sorted dimensions, also those that were drawn before.
        start, stop: only of the classes in [start, stop), which this rank owns. Past what
            is valid `class_index` may hold others.

    Raises:
        ValueError: a label is no class or not in `class_index`.
    """
    num_valid = None
    if labels.dim() == 2:
        labels = once_each(labels, ignore_index)
    owned = start, sampling.num_classes if stop is None else stop
    if sampling.draws_classes:
        class_index, num_valid, slot = library.ops.select_classes(
            labels,
            step,
            sampling.num_classes,
            sampling.num_sampled,
            sampling.seed,
            ignore_index,
            *owned,
        )
    else:
        slot = library.ops.label_slots(
            labels, class_index, sampling.num_classes, ignore_index, *owned
        )
    if sampling.draws_features and feature_index is None:
        assert step is not None
        feature_index = sampling.draw_features(step)
    return Selected(slot, class_index, num_valid, feature_index)
