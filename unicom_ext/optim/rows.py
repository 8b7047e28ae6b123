"""What the row optimizers share: gradients by rows, the loop over parameters, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from unicom_ext.ops import library
from unicom_ext.ops.row_sparse import attach, is_merged, merged_ids
from unicom_ext.optim import plain
from unicom_ext.optim.in_backward import UpdateInBackward

if TYPE_CHECKING:
    from unicom_ext.loss.module import PartialMarginSoftmax

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
    number = float(value) if isinstance(value, (int, float, Tensor)) else math.nan
    if isinstance(value, bool) or not 0 <= number < below:
        allowed = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def log_of_decay(lr: float, weight_decay: float) -> float:
    """log(1 - lr * weight_decay): what one step's decay adds to the log of a row's shrinking."""
    if not lr * weight_decay < 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got lr {lr:g} and weight_decay {weight_decay:g}"
        )
    return math.log1p(-lr * weight_decay)


def merge_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """ids [n] in any order and rows [n, d] -> ascending ids, and the sum of each one's rows.

    On the CPU they are distinct. On CUDA there are as many as before, as to count them would make
    the host wait: equal ids lie beside each other, the first has the sum, the others zeros.
    """
    if _has_kernel("merge_rows", rows.device):
        return library.ops.merge_rows(ids, rows)
    ids, position = ids.unique(return_inverse=True)
    return ids, rows.new_zeros(len(ids), rows.shape[1]).index_add_(0, position, rows)


def _has_kernel(operator: str, device: torch.device) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"unicom_ext::{operator}", key
    )


class RowOptimizer(torch.optim.Optimizer):
    """The loop over parameters of the row optimizers.

    A parameter is updated by rows once it has had a sparse gradient; all others go through torch's
    own implementation, with torch's own state.

    The state of a parameter that is updated by rows consists of tensors whose first dimension is
    that of the parameter, and of few numbers that are the same for all rows (`shared_state`, where
    they are tensors of one dimension or more).
    """

    _operator: str  # of the fused pass, and the name of its reference
    _backward_operator: str  # of the backward pass that updates
    _row_marker: str  # a key that only the state of row parameters has
    shared_state: tuple[str, ...] = ()  # tensors in it that have no row for each of the parameter's

    def _dense_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _row_operands(
        self, group: dict[str, Any], param: Tensor
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """What the operators take before and after the gradient: state tensors, then numbers."""
        raise NotImplementedError

    def _finish_row_step(
        self, group: dict[str, Any], param: Tensor, numbers: tuple[Any, ...]
    ) -> None:
        """Note in the state what is the same for all rows."""
        raise NotImplementedError

    def _init_row_state(self, group: dict[str, Any], param: Tensor) -> None:
        raise NotImplementedError

    def _catch_up(self, param: Tensor) -> None:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _state_shapes(self, group: dict[str, Any], param: Tensor) -> dict[str, list[list[int]]]:
        """Shapes that each per-row state tensor may have."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Raises ValueError: a gradient or an option cannot be used; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_group(group)
            for param in group["params"]:
                _check_gradient(param)
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            dense = [p for p in with_gradient if not self._by_rows(p)]
            if dense:
                self._dense_step(group, dense)
            for param in with_gradient:
                if self._by_rows(param):
                    self._row_step(group, param)
        return loss

    def _row_step(self, group: dict[str, Any], param: Tensor) -> None:
        self._init_row_state(group, param)
        tensors, numbers = self._row_operands(group, param)
        fused = self._fused(group, param)
        update = getattr(library.ops if fused else plain, self._operator)
        update(param.detach(), *tensors, *_gradient_rows(param, merged=fused), *numbers)
        increment_version(param)
        self._finish_row_step(group, param, numbers)

    def update_in_backward(self, loss_fn: PartialMarginSoftmax) -> None:
        """From now on update the prototypes of this loss inside `loss.backward()`.

        Their gradient is then never stored, which saves memory and a pass over it. `step` goes on
        to update everything else, and must follow each backward.

        For plain steps: one backward of the loss itself per step. Backward raises RuntimeError,
        before anything has changed, where the loss was scaled first (GradScaler, accumulation, a
        weight), where a backward has passed since the last step, where the prototypes have hooks,
        and with ``create_graph=True``; `clip_grad_norm_` refuses prototypes that have been updated
        already. Under `torch.compile` gradients are stored as ever, and `step` updates.

        What only asks for gradients updates nothing: `torch.autograd.grad`, `torch.func`,
        ``backward(inputs=...)`` without the weight, and a loss that was made in `eval()` mode,
        whose backward stores the gradient. Copies of the loss and the optimizer, pickled ones too,
        train the usual way until this is called for them, and so does the loss once this optimizer
        is gone.

        On CUDA the host would have to wait to see that a loss was scaled, so there is no error at
        once: the prototypes are left as they are, the gradients of the embeddings are NaN, and so
        is whatever is made of them. (A GradScaler skips such steps and lowers its factor, and the
        next backward raises as no step has been made.)

        Raises ValueError: the loss cannot be updated so.
        """
        param = loss_fn.weight
        self._group_of("the weight of the loss", param)
        if not loss_fn.options.sparse_grad:
            raise ValueError("update_in_backward needs a loss with sparse_grad=True")
        if loss_fn.options.reduction == "none":
            raise ValueError('update_in_backward needs reduction "mean" or "sum", got "none"')
        if loss_fn.shard is not None:
            raise ValueError("update_in_backward needs a loss without process_group")
        if not _has_kernel(self._backward_operator, param.device):
            raise ValueError(f"update_in_backward is not there on {param.device.type} yet")
        updater = UpdateInBackward(param, self._update_in_backward)
        self.register_step_post_hook(updater.finish_step)  # which keeps it as long as the optimizer
        attach(param, updater)

    def _update_in_backward(
        self, param: Tensor, grad_loss: Tensor, operands: tuple[Any, ...]
    ) -> Tensor:
        group = self._group_of("the weight of the loss", param)
        self._check_group(group)
        self._init_row_state(group, param)
        tensors, numbers = self._row_operands(group, param)
        operator = getattr(library.ops, self._backward_operator)
        grad_embeddings = library.run(operator, grad_loss, *operands, *tensors, *numbers)
        increment_version(param)
        self._finish_row_step(group, param, numbers)
        return grad_embeddings

    def _group_of(self, name: str, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is param for p in group["params"]):
                return group
        raise ValueError(f"{name} must be among the optimizer's parameters")

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring the rows that were not sampled lately up to date with what they missed.

        A row is brought up to date by itself when it is sampled again. This does it for all rows,
        which costs a pass over all of them: before prototypes are compared with those of a dense
        optimizer, say. It changes no later result but by rounding.
        """
        for param in self.state:
            if self._by_rows(param):
                self._catch_up(param)
                increment_version(param)

    def init_row_state(self, params: Iterable[Tensor]) -> None:
        """Make the state of these matrices now, as it will be once they have a sparse gradient.

        For code that needs the state tensors before the first step, such as
        `torch.distributed.checkpoint`.
        """
        found = [(self._group_of("params", param), param) for param in params]
        for _, param in found:
            _check_matrix(param)
        for group, param in found:
            self._init_row_state(group, param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; state keeps its own dtypes.

        Raises ValueError where the state is of other shapes; nothing has changed then.
        """
        saved = [
            (group, param, state_dict["state"].get(index, {}))
            for group, saved_group in zip(
                self.param_groups, state_dict["param_groups"], strict=False
            )
            for param, index in zip(group["params"], saved_group["params"], strict=False)
        ]
        for group, param, state in saved:
            shapes = self._state_shapes(group, param) if self._row_marker in state else {}
            for name, allowed in shapes.items():
                if name in state and list(state[name].shape) not in allowed:
                    raise ValueError(
                        f"{name} in the state dict must be {' or '.join(map(str, allowed))} for a "
                        f"parameter {list(param.shape)}, got {list(state[name].shape)}"
                    )
        super().load_state_dict(state_dict)
        for _, param, state in saved:
            if self._row_marker in state:
                # torch has made all of them of the parameter's dtype.
                for name, value in state.items():
                    self.state[param][name] = _restored(value, param)

    def _by_rows(self, param: Tensor) -> bool:
        return self._row_marker in self.state.get(param, ()) or (
            param.grad is not None and param.grad.is_sparse
        )

    def _fused(self, group: dict[str, Any], param: Tensor) -> bool:
        fused = group["fused"]
        return _has_kernel(self._operator, param.device) if fused is None else fused


def _restored(value: Any, param: Tensor) -> Any:
    """Single numbers stay on the host, which would have to wait for them otherwise."""
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device if value.dim() else "cpu")


def _check_gradient(param: Tensor) -> None:
    gradient = param.grad
    if gradient is None or not gradient.is_sparse:
        return
    _check_matrix(param)
    if gradient.sparse_dim() != 1:
        raise ValueError(
            "a sparse gradient must hold whole rows: one sparse dimension, got "
            f"{gradient.sparse_dim()}"
        )


def _check_matrix(param: Tensor) -> None:
    if param.dim() != 2:
        raise ValueError(
            f"a parameter that is updated by rows must be a matrix [rows, dim], got the shape "
            f"{list(param.shape)}"
        )


def _gradient_rows(param: Tensor, *, merged: bool) -> tuple[Tensor, Tensor]:
    """ids [n] and rows [n, d], on demand as of `merge_rows`; of a dense gradient all rows."""
    gradient = param.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return torch.arange(len(param), device=param.device), gradient
    ids, rows = gradient._indices()[0], gradient._values()
    if not merged:
        return ids, rows
    return (merged_ids(gradient), rows) if is_merged(gradient) else merge_rows(ids, rows)
