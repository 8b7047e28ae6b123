"""State dicts of the row optimizers: what goes into one, and what a parameter takes out of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unicom_ext.loss.owner import loss_of, own_rows
from unicom_ext.optim.options import plain_option


def arithmetic(param: Tensor) -> torch.dtype:
    """In which a parameter is updated by rows."""
    return torch.promote_types(param.dtype, torch.float32)


def option_to_save(value: Any) -> Any:
    """An option of a group as every format of checkpoints can hold it."""
    return str(value) if isinstance(value, torch.dtype) else plain_option(value)


def option_again(value: Any) -> Any:
    """What `option_to_save` was given, but for the kinds of numbers."""
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

    Raises ValueError where it holds other classes, or nothing says which, or is of other shapes
    than the parameter's.
    """
    loss = loss_of(param)
    shard = None if loss is None else loss.shard
    state = state.copy()
    for name, value in state.items():
        if not _has_rows(name, value, shared) and not _is_known(name, value):
            continue
        rows, rest = [len(param)] if param.dim() else [], list(param.shape[1:])
        centers = 1 if loss is None else loss.options.num_centers
        is_global = loss is not None and (
            hasattr(value, "placements") or value.shape[:1] == (loss.num_classes * centers,)
        )
        if loss is not None and is_global:
            rows = [loss.num_classes * centers]
            if centers > 1 and hasattr(value, "placements"):  # as `ClassShard.as_global` makes them
                rows = [loss.num_classes, centers]
        elif shard is not None and shard.world_size > 1:
            raise ValueError(
                f"{name} in the state dict must be of all {shard.num_classes} classes, a DTensor "
                f"or a plain tensor, of which this rank takes its own; got a plain tensor "
                f"{list(value.shape)}, and nothing says of which classes. If they are "
                f"[{shard.start}, {shard.stop}), say so by loss.shard.as_global(tensor)"
            )
        allowed = _allowed_shapes(name, rows, rest, by_rows)
        if _is_known(name, value) and list(value.shape) not in allowed:
            raise ValueError(
                f"{name} in the state dict must be {' or '.join(map(str, allowed))} for a "
                f"parameter {list(param.shape)}, got {list(value.shape)}"
            )
        if loss is not None and is_global:
            taken = own_rows(loss, f"{name} in the state dict", value)
            # A view would keep the rows of all ranks in memory.
            is_own = hasattr(value, "placements") or taken is value
            state[name] = taken if is_own else taken.clone()
    return state


def layout(value: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    """What torch's fused passes want to be the same of a parameter and its state."""
    return value.dtype, value.device, value.stride()


def dense(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """State of a parameter with dense gradients, as torch's fused passes want it: of its dtype, on
    its device, the step too, and of its layout, as they take no notice of strides."""
    state = {
        name: torch.empty_like(param).copy_(value)
        if _is_known(name, value) and layout(value) != layout(param)
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


def _is_known(name: str, value: Any) -> bool:
    return name in _KNOWN and isinstance(value, Tensor)


def _has_rows(name: str, value: Any, shared: tuple[str, ...]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and name not in shared


def _allowed_shapes(name: str, rows: list[int], rest: list[int], by_rows: bool) -> list[list[int]]:
    """Of the state of a parameter [*rows, *rest]."""
    if name in _VECTORS:
        return [rows]
    return [rows + rest, rows] if name == "exp_avg_sq" and by_rows else [rows + rest]
