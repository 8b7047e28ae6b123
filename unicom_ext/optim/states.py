"""State dicts of the row optimizers: what goes into one, and what a parameter takes out of one."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from unicom_ext.loss.owner import loss_of, own_rows


def arithmetic(param: Tensor) -> torch.dtype:
    """In which a parameter is updated by rows."""
    return torch.promote_types(param.dtype, torch.float32)


def plain_option(value: Any) -> Any:
    """An option of a group as every format of checkpoints can hold it."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, tuple):
        return tuple(plain_option(each) for each in value)
    return value if isinstance(value, (bool, int)) or not isinstance(value, Real) else float(value)


def option_again(value: Any) -> Any:
    """What `plain_option` was given, but for the kinds of numbers."""
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value


def to_save(param: Tensor, state: dict[str, Any], shared: tuple[str, ...]) -> dict[str, Any]:
    """With what belongs to the rows of prototypes that ranks share as tensors of all classes.

    shared: names of tensors that do not.
    """
    loss = loss_of(param)
    if loss is None or loss.shard is None:
        return state
    if loss.full_state_dict:
        loss.shard.meet("state_dict of an optimizer of a loss with full_state_dict=True")
    of_all = loss.shard.all_rows if loss.full_state_dict else loss.shard.as_global
    return {
        name: of_all(value) if _has_rows(name, value, shared) else value
        for name, value in state.items()
    }


def own(
    param: Tensor, state: dict[str, Any], shared: tuple[str, ...], *, by_rows: bool
) -> dict[str, Any]:
    """Of saved state, this rank's rows.

    Raises ValueError where it holds other classes or is of other shapes than the parameter's.
    """
    loss = loss_of(param)
    state = state.copy()
    for name, value in state.items():
        if not _has_rows(name, value, shared):
            continue
        shape = list(param.shape)
        is_global = loss is not None and (
            hasattr(value, "placements") or len(value) == loss.num_classes
        )
        if loss is not None and is_global:
            shape[0] = loss.num_classes
        allowed = _allowed_shapes(name, shape, by_rows)
        if name in _KNOWN and list(value.shape) not in allowed:
            raise ValueError(
                f"{name} in the state dict must be {' or '.join(map(str, allowed))} for a "
                f"parameter {list(param.shape)}, got {list(value.shape)}"
            )
        if loss is not None and is_global:
            rows = own_rows(loss, f"{name} in the state dict", value)
            # A view would keep the rows of all ranks in memory.
            state[name] = rows if hasattr(value, "placements") or rows is value else rows.clone()
    return state


def dense(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """State of a parameter with dense gradients, as torch's fused passes want it: the step on its
    device, and its layout, as they take no notice of strides."""
    state = {
        name: torch.empty_like(param, dtype=value.dtype).copy_(value)
        if name in _KNOWN and isinstance(value, Tensor) and value.stride() != param.stride()
        else value
        for name, value in state.items()
    }
    if "step" in state:
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
    return state


def following(param: Tensor, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Row state on the parameter's device, where the passes can read it.

    dtype: None for moments, which are of the arithmetic's, or bfloat16 where that is float32.
    """
    if dtype is None:
        dtype = arithmetic(param)
        if value.dtype == torch.bfloat16 and value.dim() == 2 and dtype == torch.float32:
            dtype = torch.bfloat16
    # Single numbers stay on the host, which would have to wait for them otherwise.
    device = param.device if value.dim() else torch.device("cpu")
    return value.to(device, dtype).contiguous()


_VECTORS = ("row_step", "log_decay", "last_step")
_KNOWN = ("exp_avg", "exp_avg_sq", "momentum_buffer", *_VECTORS)


def _has_rows(name: str, value: Any, shared: tuple[str, ...]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and name not in shared


def _allowed_shapes(name: str, shape: list[int], by_rows: bool) -> list[list[int]]:
    if name in _VECTORS:
        return [shape[:1]]
    return [shape, shape[:1]] if name == "exp_avg_sq" and by_rows else [shape]
