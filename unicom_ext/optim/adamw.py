"""AdamW for prototypes of which each step samples some."""

from __future__ import annotations

from collections.abc import Iterable, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from unicom_ext.ops import memory
from unicom_ext.optim import plain, states
from unicom_ext.optim.options import (
    check_betas,
    check_number,
    log_of_decay,
    plain_lr,
    refuse_dense_only,
)
from unicom_ext.optim.rows import RowOptimizer


class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) on the rows that have a gradient.

    Parameters with dense gradients are updated exactly as by `torch.optim.AdamW`, so that one
    optimizer can hold an encoder and prototypes in separate groups. A matrix with a sparse gradient
    is updated by rows, in one pass that reads and writes the sampled rows only:

    - A sampled row takes an AdamW step. The dimensions that were not selected have gradient zero in
      it: their moments decay, and they keep moving by their first moment.
    - A row that was not sampled stands still, its moments too. (Under a dense optimizer it would go
      on along its first moment.)
    - The bias of a row's moments is corrected by the number of steps the row itself has had.
    - Weight decay is caught up when a row is sampled again: the row is multiplied by the product
      of ``1 - lr * weight_decay`` over the steps it missed, with the lr and weight_decay of each.
      It costs nothing per missed step. `catch_up` does so for all rows at once.

    With every row sampled this is `torch.optim.AdamW`.

    Args:
        params: parameters, or groups of them (dicts with their own options).
        lr: step size, >= 0. May change from step to step.
        betas: decay of the first and second moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient; lr * weight_decay must stay below 1.
        maximize: climb instead.
        moment_dtype: of the moments of row parameters. None: float32 (float64 for float64
            parameters). torch.bfloat16 halves their memory; they are rounded at random then,
            unbiased, by a hash of row, step and column, so that small changes are not lost and
            results are reproducible.
        row_second_moment: keep one second moment per row, that of the row's mean squared gradient,
            [C] instead of [C, d]. All dimensions of a row then share a step size.
        fused: one pass in C++, or several in plain PyTorch; None: the pass where it exists for the
            parameter's device. Both give the same results but for rounding.
        dense_only: options of `torch.optim.AdamW` that rows do not have; they must be off.

    State of a row parameter [C, d]: exp_avg [C, d]; exp_avg_sq [C, d] or [C]; row_step [C] int32,
    steps each row has had; log_decay [C] float64, log of the decay each row has had, and
    total_log_decay, that of a row that missed nothing.

    Raises:
        ValueError: an option is out of range, or one of `torch.optim.AdamW`'s that rows cannot
            honour (amsgrad, foreach, capturable, differentiable).
    """

    _operator = "row_adamw_"
    _backward_operator = "loss_backward_adamw_"
    _row_marker = "row_step"
    _row_state = MappingProxyType(
        {
            "exp_avg": None,
            "exp_avg_sq": None,
            "row_step": torch.int32,
            "log_decay": torch.float64,
            "total_log_decay": torch.float64,
        }
    )
    _dense_state = MappingProxyType({"step": True, "exp_avg": True, "exp_avg_sq": True})
    _moment = "exp_avg"
    _origins = ("amsgrad", "moment_dtype", "row_second_moment")
    _switches = ("maximize", "row_second_moment", "fused")
    _later_options = MappingProxyType(
        {"maximize": False, "moment_dtype": None, "row_second_moment": False, "fused": None}
    )

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        row_second_moment: bool = False,
        fused: bool | None = None,
        **dense_only: Any,
    ) -> None:
        refuse_dense_only("RowAdamW", dense_only)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "row_second_moment": row_second_moment,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"])
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        check_betas(group["betas"])
        if group["moment_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                "moment_dtype must be None, torch.float32 or torch.bfloat16, got "
                f"{group['moment_dtype']}"
            )
        log_of_decay(float(group["lr"]), float(group["weight_decay"]))

    def _init_dense_state(self, group: dict[str, Any], param: Tensor) -> None:
        self.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def _dense_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self._init_dense_state(group, param)
        of_each = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in of_each],
            [s["exp_avg_sq"] for s in of_each],
            [],
            [s["step"] for s in of_each],
            fused=self._fused_dense(group, params),
            amsgrad=False,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            lr=plain_lr(group),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=bool(group["maximize"]),
        )

    def _init_row_state(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if "row_step" in state:
            self._follow_by_rows(param)
            return
        arithmetic = states.arithmetic(param)
        dtype = group["moment_dtype"] or arithmetic
        if arithmetic == torch.float64:
            dtype = torch.float64
        shape = (len(param),) if group["row_second_moment"] else param.shape
        square_dtype = arithmetic if group["row_second_moment"] else dtype
        steps = 0
        if state:  # so far it had dense gradients
            steps = int(state.pop("step"))
            state["exp_avg"] = state["exp_avg"].to(param.device, dtype).contiguous()
            square = state["exp_avg_sq"].to(param.device, arithmetic)
            square = square.mean(dim=1) if group["row_second_moment"] else square
            state["exp_avg_sq"] = square.to(square_dtype).contiguous()
        else:
            state["exp_avg"] = memory.zeros(*param.shape, dtype=dtype, device=param.device)
            state["exp_avg_sq"] = memory.zeros(*shape, dtype=square_dtype, device=param.device)
        state["row_step"] = param.new_full((len(param),), steps, dtype=torch.int32)
        state["log_decay"] = param.new_zeros(len(param), dtype=torch.float64)
        state["total_log_decay"] = torch.zeros((), dtype=torch.float64)

    def _is_elsewhere(self, param: Tensor, state: dict[str, Any]) -> bool:
        moment = state["exp_avg"]
        doubles = moment.dtype == torch.float64, param.dtype == torch.float64
        return doubles[0] != doubles[1] or moment.device != param.device

    def _required(self, names: Set[str]) -> tuple[str, ...]:
        return tuple(self._row_state)

    def _row_operands(
        self, group: dict[str, Any], param: Tensor
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        state, lr = self.state[param], float(group["lr"])
        total = float(state["total_log_decay"]) + log_of_decay(lr, float(group["weight_decay"]))
        tensors = (state["exp_avg"], state["exp_avg_sq"], state["row_step"], state["log_decay"])
        beta1, beta2 = group["betas"]
        return tensors, (
            total, lr, float(beta1), float(beta2), float(group["eps"]), group["maximize"]
        )  # fmt: skip

    def _finish_row_step(
        self, group: dict[str, Any], param: Tensor, numbers: tuple[Any, ...]
    ) -> None:
        self.state[param]["total_log_decay"].fill_(numbers[0])

    def _catch_up(self, param: Tensor) -> None:
        state = self.state[param]
        total = state["total_log_decay"].to(param.device)
        plain.scale_rows_(param, (total - state["log_decay"]).exp())
        state["log_decay"].fill_(total)
