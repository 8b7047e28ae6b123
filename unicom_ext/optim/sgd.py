"""SGD for prototypes of which each step samples some."""

from __future__ import annotations

from collections.abc import Iterable, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from unicom_ext.loss.checks import is_local
from unicom_ext.ops import memory
from unicom_ext.optim import plain, states
from unicom_ext.optim.options import check_number, log_of_decay, plain_lr, refuse_dense_only
from unicom_ext.optim.rows import RowOptimizer

# Steps that `exact` remembers. Then all rows are brought up to date once: a thousandth of the rows
# sampled meanwhile, at sample_rate 0.1.
_LONGEST_HISTORY = 4096


class RowSGD(RowOptimizer):
    """SGD with momentum, Nesterov's too, on the rows that have a gradient.

    Parameters with dense gradients are updated exactly as by `torch.optim.SGD`. A matrix with a
    sparse gradient is updated by rows, in one pass that reads and writes the sampled rows only.
    What happens to a row that was not sampled:

    - ``exact=False``: it stands still, its momentum too. When it is sampled again, it is first
      multiplied by the product of ``1 - lr * weight_decay`` over the steps it missed, with the lr
      and weight_decay of each. Without momentum this is what a dense optimizer does; with momentum
      a dense one would go on along the buffer, through which weight decay acts too.
    - ``exact=True``: when it is sampled again, the steps it missed are replayed as steps with
      gradient zero, momentum and weight decay included. A step without gradient is linear in (row,
      buffer), so any number of them is one 2 x 2 matrix, whatever the learning rates were: the
      result is that of `torch.optim.SGD` with dense gradients, but for rounding. Until then the row
      lags behind: the loss sees it brought up to date only from its next update on, so call
      `catch_up` where others look at the prototypes.

    Args:
        params: parameters, or groups of them (dicts with their own options).
        lr: step size, >= 0. May change from step to step.
        momentum: in [0, 1).
        weight_decay: times the parameter, added to the gradient, as in `torch.optim.SGD`. With
            ``exact=False`` lr * weight_decay must stay below 1.
        nesterov: Nesterov's momentum; needs momentum > 0.
        exact: replay the steps that rows missed.
        maximize: climb instead.
        fused: one pass in C++, or several in plain PyTorch; None: the pass where it exists for the
            parameter's device. Both give the same results but for rounding.
        dense_only: options of `torch.optim.SGD` that rows do not have; they must be off.

    State of a row parameter [C, d]: momentum_buffer [C, d], with momentum; log_decay [C] float64
    and total_log_decay (log of the decay each row has had, and that of a row that missed nothing)
    or, exact, last_step [C] int32, step and history [4096, 4], of which the first `remembered` are
    the last steps' matrices.

    Raises:
        ValueError: an option is out of range, or one of `torch.optim.SGD`'s that rows cannot honour
            (dampening, foreach, differentiable).
    """

    _operator = "row_sgd_"
    _backward_operator = "loss_backward_sgd_"
    _row_marker = "by_rows"
    shared_state = ("history",)
    _row_state = MappingProxyType(
        {
            "momentum_buffer": None,
            "log_decay": torch.float64,
            "total_log_decay": torch.float64,
            "last_step": torch.int32,
            "step": torch.int64,
            "history": torch.float64,
            "by_rows": torch.bool,
            "remembered": torch.int64,
        }
    )
    _dense_state = MappingProxyType({"momentum_buffer": False})
    _moment = "momentum_buffer"
    _origins = ("dampening", "exact")
    _switches = ("nesterov", "exact", "maximize", "fused")
    _later_options = MappingProxyType(
        {"nesterov": False, "exact": False, "maximize": False, "fused": None}
    )

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        exact: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
        **dense_only: Any,
    ) -> None:
        refuse_dense_only("RowSGD", dense_only)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "exact": exact,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"])
        check_number("momentum", group["momentum"], below=1)
        check_number("weight_decay", group["weight_decay"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True needs a momentum above 0, got momentum 0")
        if not group["exact"]:
            log_of_decay(float(group["lr"]), float(group["weight_decay"]))

    def _init_dense_state(self, group: dict[str, Any], param: Tensor) -> None:
        if group["momentum"]:
            self.state[param] = {"momentum_buffer": torch.zeros_like(param)}

    def _dense_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        of_each = [self.state[p] for p in params]
        buffers = [s.get("momentum_buffer") for s in of_each]
        sgd(
            params,
            [p.grad for p in params if p.grad is not None],
            buffers,
            fused=self._fused_dense(group, params),
            lr=plain_lr(group),  # type: ignore[arg-type]  # a tensor too
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            dampening=0.0,
        )
        for state, buffer in zip(of_each, buffers, strict=True):
            if group["momentum"]:
                state["momentum_buffer"] = buffer

    def _fused_dense(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        # Torch's fused SGD takes no DTensors, and on CPUs moves bfloat16 and float16 parameters to
        # other places.
        halves = (torch.bfloat16, torch.float16)
        if any(p.dtype in halves and p.device.type == "cpu" for p in params):
            return False
        if not all(is_local(p) for p in params):
            return False
        return super()._fused_dense(group, params)

    def _init_row_state(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        dtype = states.arithmetic(param)
        buffer = state.get("momentum_buffer")
        if buffer is None and group["momentum"]:
            buffer = memory.zeros(*param.shape, dtype=dtype, device=param.device)
            state["momentum_buffer"] = buffer
        if "by_rows" in state:
            self._follow_by_rows(param)
            return
        if buffer is not None:  # which dense gradients may have left
            state["momentum_buffer"] = states.following(param, buffer.to(dtype), None)
        state["by_rows"] = torch.tensor(True)
        if group["exact"]:
            state["last_step"] = param.new_zeros(len(param), dtype=torch.int32)
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["remembered"] = torch.zeros((), dtype=torch.int64)
            # All of it, so that its shape is the same in every checkpoint.
            state["history"] = param.new_zeros(_LONGEST_HISTORY, 4, dtype=torch.float64)
        else:
            state["log_decay"] = param.new_zeros(len(param), dtype=torch.float64)
            state["total_log_decay"] = torch.zeros((), dtype=torch.float64)

    def _is_elsewhere(self, param: Tensor, state: dict[str, Any]) -> bool:
        buffer = state.get("momentum_buffer")
        rows = state["last_step"] if "last_step" in state else state["log_decay"]
        cast = buffer is not None and buffer.dtype != states.arithmetic(param)
        return cast or rows.device != param.device

    def _required(self, names: Set[str]) -> tuple[str, ...]:
        if "last_step" in names:
            return "last_step", "step", "history"
        return "log_decay", "total_log_decay"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for of_param in self.state.values():
            _renew(of_param)

    def _following(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        state = super()._following(param, state)
        _renew(state)
        return state

    def _row_operands(
        self, group: dict[str, Any], param: Tensor
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        state, lr = self.state[param], float(group["lr"])
        before = after = 0.0
        step = 0
        history = None
        if "last_step" in state:
            history = _last_steps(state)
            step = int(state["step"]) + 1
        else:
            before = float(state["total_log_decay"])
            after = before + log_of_decay(lr, float(group["weight_decay"]))
        # Missed steps may have had momentum where this one has none.
        uses_buffer = group["momentum"] or history is not None
        buffer = state.get("momentum_buffer") if uses_buffer else None
        tensors = (buffer, state.get("log_decay"), state.get("last_step"), history)
        reals = float(group["momentum"]), float(group["weight_decay"])
        return tensors, (before, after, step, lr, *reals, group["nesterov"], group["maximize"])

    def _finish_row_step(
        self, group: dict[str, Any], param: Tensor, numbers: tuple[Any, ...]
    ) -> None:
        state, (_, after, step, lr, *_) = self.state[param], numbers
        if "last_step" not in state:
            state["total_log_decay"].fill_(after)
            return
        # For the rows that missed this step.
        transition = plain.sgd_transition(
            lr, float(group["momentum"]), float(group["weight_decay"]), group["nesterov"]
        )
        state["step"].fill_(step)
        history = state["history"]
        history[int(state["remembered"])].copy_(transition.view(4), non_blocking=True)
        state["remembered"] += 1
        if int(state["remembered"]) >= len(history):
            self._catch_up(param)

    def _catch_up(self, param: Tensor) -> None:
        state = self.state[param]
        if "last_step" in state:
            missed = plain.missed_transitions(_last_steps(state)).to(param.device)
            missed = missed[int(state["step"]) - state["last_step"].long()]
            plain.apply_transitions_(param, state.get("momentum_buffer"), missed)
            state["last_step"].fill_(int(state["step"]))
            state["remembered"].zero_()
        else:
            total = state["total_log_decay"].to(param.device)
            plain.scale_rows_(param, (total - state["log_decay"]).exp())
            state["log_decay"].fill_(total)


def _renew(state: dict[str, Any]) -> None:
    """Of an older version: numbers that were no tensors, a history that grew from step to step."""
    if "history" in state and "remembered" not in state:
        short = state["history"]
        state["remembered"] = len(short)
        state["history"] = short.new_zeros(max(_LONGEST_HISTORY, len(short)), 4)
        state["history"][: len(short)] = short
    # torch.distributed.checkpoint reads tensors in place, and loses what is none.
    for name, dtype in (("by_rows", torch.bool), ("remembered", torch.int64)):
        if name in state:
            state[name] = torch.as_tensor(state[name], dtype=dtype)


def _last_steps(state: dict[str, Any]) -> Tensor:
    """The history that is filled: [steps, 4]."""
    history: Tensor = state["history"]
    return history[: int(state["remembered"])]
