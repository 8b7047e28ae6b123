"""Options of the row optimizers: which of torch's they take, and which values."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicom_ext.loss import checks

# In this order: the abstract class, which NumPy's numbers are of, takes ten times as long.
_NUMBERS = (float, int, Tensor, Real, np.ndarray)

_DENSE_ONLY = {
    "amsgrad": "it needs the largest second moment of every step, also of those a row missed",
    "dampening": "rows join at different steps, and only the first one is exempt from dampening",
    "foreach": "rows are updated in one fused pass",
    "capturable": "rows are updated in one fused pass",
    "differentiable": "the update is made in place",
}


def refuse_dense_only(optimizer: str, options: dict[str, Any]) -> None:
    """Options of torch's dense optimizers may be given where they are off."""
    for name, value in options.items():
        if name not in _DENSE_ONLY:
            raise TypeError(f"{optimizer} got an unexpected keyword argument {name!r}")
        if value:
            raise ValueError(
                f"{optimizer} cannot honour {name}={value!r}: {_DENSE_ONLY[name]}. "
                f"Leave it out, or use a dense optimizer and sparse_grad=False"
            )


def check_number(name: str, value: object, *, below: float = math.inf) -> None:
    is_number = isinstance(value, _NUMBERS) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and value.dtype != torch.bool
    elif isinstance(value, np.ndarray):
        is_number = value.ndim == 0 and value.dtype.kind in "iuf"
    if not is_number or not 0 <= float(value) < below:  # type: ignore[arg-type]  # it is one
        allowed = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_betas(betas: Any) -> None:
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}") from None
    check_number("betas[0]", first, below=1)
    check_number("betas[1]", second, below=1)


def plain_option(value: Any) -> Any:
    """An option in Python's own numbers, as every format of checkpoints can hold them.

    Tensors stay what they are, and so does what is no number.
    """
    if isinstance(value, np.ndarray) and value.ndim:
        value = tuple(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain_option, value))
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item()
    return value if isinstance(value, (bool, int)) or not isinstance(value, Real) else float(value)


def plain_switch(name: str, value: Any) -> bool | None:
    """An option that is on or off, or None for `fused`.

    Raises ValueError where it is neither.
    """
    if name == "fused" and value is None:
        return None
    return checks.boolean(name, plain_option(value))


def plain_lr(group: dict[str, Any]) -> float | Tensor:
    """The learning rate as torch's functions take it."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) else float(lr)


def log_of_decay(lr: float, weight_decay: float) -> float:
    """log(1 - lr * weight_decay): what one step's decay adds to the log of a row's shrinking."""
    if not lr * weight_decay < 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got lr {lr:g} and weight_decay {weight_decay:g}"
        )
    return math.log1p(-lr * weight_decay)


# How torch's optimizers work, not what they compute: it stays behind where a state dict of theirs
# is loaded.
_HOW = ("foreach", "capturable", "differentiable", "decoupled_weight_decay")


def without_dense_only(optimizer: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group of a state dict without options of torch's dense optimizers.

    Raises ValueError where one of them is on that changes the result.
    """
    decay = group.get("weight_decay")
    if decay and group.get("decoupled_weight_decay") is False:
        raise ValueError(
            f"{optimizer} cannot honour weight_decay={decay!r} of a state dict with "
            "decoupled_weight_decay=False, such as torch.optim.Adam's: it would decay the "
            "parameters themselves, not add to their gradients"
        )
    kept = {name: value for name, value in group.items() if name not in _HOW}
    refuse_dense_only(optimizer, {name: kept.pop(name) for name in _DENSE_ONLY if name in kept})
    return kept
