"""Random selection of classes and feature dimensions.

Both selections are pure functions of ``(seed, step)`` and, for classes, of the positives: nothing
is communicated between ranks and nothing is stored but the step. Class sampling with positives
kept is PartialFC (arXiv:2203.15565); feature selection is UNICOM (arXiv:2304.05884), nested it is
Matryoshka's (arXiv:2205.13147).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from unicom_ext.loss.checks import integer
from unicom_ext.loss.nested import prefix_length
from unicom_ext.ops import library

FeatureSelection = Literal["random", "nested"]

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def select_classes(
    num_classes: int,
    rate: float,
    positives: Tensor | Sequence[int],
    *,
    seed: int,
    step: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Draw the classes that take part in one step.

    Ids are cut into blocks of 256 consecutive classes. The blocks' quotas sum to exactly
    ``K = max(1, round(rate * num_classes))``, or to 0 at a rate of 0. A block holds its positives
    and random negatives up to its quota, or all its positives where they exceed it: the whole
    selection has ``sum over blocks of max(quota, positives)`` classes, at most
    ``K + min(len(positives), num_classes)``. Without positives every class is equally likely.

    Args:
        num_classes: size C of the id space, 1 to 2**32 - 1.
        rate: share of classes to draw, in [0, 1]. At 1 the result is every class, at 0 the
            positives alone.
        positives: global class ids that must be selected: a 1-D integer tensor on any device, or a
            sequence; duplicates are allowed, and it may be empty. All ranks pass the positives of
            the *global* batch.
        seed: any int64; different seeds give independent selections.
        step: any int64; different steps give independent selections.
        start: return only the ids in ``[start, stop)``, a rank's shard; default all. Shards need
            not follow block borders: over any split they concatenate to the whole selection.
        stop: the id after the shard's last; default num_classes.

    Returns:
        Sorted unique ids, int64 on the CPU.

    Raises:
        ValueError: a value is out of range; a bad positive is named with its position.
        TypeError: an argument has the wrong type.
    """
    num_classes = integer("num_classes", num_classes, 1, library.engine.MAX_CLASSES)
    stop = num_classes if stop is None else integer("stop", stop, 0, num_classes)
    start = integer("start", start, 0, stop)
    labels = _class_ids(positives)
    # Every id must be a class: an ignore_index that is a class itself excuses nothing.
    bad = library.engine.find_bad_label(labels, num_classes, ignore_index=0)
    if bad >= 0:
        raise ValueError(
            f"positives must be in [0, num_classes = {num_classes}), "
            f"got {labels[bad]} at position {bad}"
        )
    class_index, _ = library.engine.select_classes(
        labels,
        num_classes,
        num_sampled_classes(num_classes, rate, name="rate"),
        seed=integer("seed", seed),
        step=integer("step", step),
        ignore_index=-1,
        start=start,
        stop=stop,
    )
    return torch.from_numpy(class_index)


def select_features(
    dim: int,
    rate: float,
    *,
    seed: int,
    step: int,
    feature_selection: FeatureSelection = "random",
) -> Tensor:
    """Draw the feature dimensions that take part in one step, the same on every rank.

    Args:
        dim: embedding size d, at least 1.
        rate: share of dimensions to draw, in (0, 1]; d' = round(rate * dim) must not be 0.
        seed: any int64.
        step: any int64.
        feature_selection: ``"random"`` draws any d' dimensions, ``"nested"`` the first ones: as
            many as it draws, at least an eighth of d', and d' on average.

    Returns:
        Sorted unique dimensions in [0, dim), int64 on the CPU; d' of them if not nested.

    Raises:
        ValueError: a value is out of range, or the rate gives zero dimensions.
        TypeError: an argument has the wrong type.
    """
    dim = integer("dim", dim, 1)
    count = num_selected_features(dim, rate, name="rate")
    seed, step = integer("seed", seed), integer("step", step)
    if check_feature_selection(feature_selection) == "nested":
        return torch.arange(prefix_length(dim, count, seed, step))
    feature_index = library.engine.select_features(dim, count, seed=seed, step=step)
    return torch.from_numpy(feature_index)


def num_sampled_classes(num_classes: int, rate: float, *, name: str = "sample_rate") -> int:
    """How many of `num_classes` classes a step draws at least: max(1, rate * C rounded half up).

    Args:
        num_classes: C, how many classes there are.
        rate: share of the classes, in [0, 1].
        name: of the rate in messages.

    Returns:
        The number; 0 for a rate of 0, with which the positives alone take part.

    Raises:
        TypeError, ValueError: the rate is wrong.
    """
    rate = _rate(name, rate, zero=True)
    return max(1, library.engine.sample_size(rate, num_classes)) if rate else 0


def num_selected_features(dim: int, rate: float, *, name: str = "feature_rate") -> int:
    """How many of `dim` dimensions a step draws: rate * d rounded half up.

    Args:
        dim: d, the dimensions of an embedding.
        rate: share of the dimensions, in (0, 1].
        name: of the rate in messages.

    Returns:
        The number, at least 1.

    Raises:
        TypeError, ValueError: the rate is wrong, or gives no dimension.
    """
    count = library.engine.sample_size(_rate(name, rate, zero=False), dim)
    if count == 0:
        raise ValueError(f"{name} must give at least one dimension: {rate} of {dim} rounds to zero")
    return count


def check_feature_selection(value: FeatureSelection) -> FeatureSelection:
    allowed = get_args(FeatureSelection)
    if value not in allowed:
        raise ValueError(f"feature_selection must be one of {allowed}, got {value!r}")
    return value


def _rate(name: str, value: float, *, zero: bool) -> float:
    allowed = "[0, 1]" if zero else "(0, 1]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number in {allowed}, got {type(value).__name__}: {value!r}"
        )
    rate = float(value)
    if not 0 <= rate <= 1 or (rate == 0 and not zero):
        raise ValueError(f"{name} must be in {allowed}, got {value}")
    return rate


def _class_ids(positives: Tensor | Sequence[int]) -> np.ndarray:
    if not isinstance(positives, Tensor):
        if len(positives) == 0:
            return np.empty(0, np.int64)
        positives = torch.as_tensor(positives)
    if positives.dtype not in _INTEGERS:
        raise TypeError(f"positives must hold integers, got {positives.dtype}")
    if positives.dim() != 1:
        raise ValueError(f"positives must be one-dimensional, got shape {tuple(positives.shape)}")
    return positives.detach().to("cpu", torch.int64).contiguous().numpy()
