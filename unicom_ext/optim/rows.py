"""What the row optimizers share: gradients by rows, and the loop over parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from unicom_ext.loss.checks import is_local
from unicom_ext.loss.owner import loss_of
from unicom_ext.ops import library
from unicom_ext.ops.row_sparse import attach, is_merged, merged_ids
from unicom_ext.optim import plain, states
from unicom_ext.optim.in_backward import UpdateInBackward
from unicom_ext.optim.state_dict import RowStateOptimizer

if TYPE_CHECKING:
    from unicom_ext.loss.module import PartialMarginSoftmax


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
    return _has_kernel_on(operator, device.type)


@cache
def _has_kernel_on(operator: str, device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"unicom_ext::{operator}", key
    )


class RowOptimizer(RowStateOptimizer):
    """The loop over parameters of the row optimizers.

    A parameter is updated by rows once it has had a sparse gradient; all others go through torch's
    own implementation, with torch's own state.
    """

    _operator: str  # of the fused pass, and the name of its reference
    _backward_operator: str  # of the backward pass that updates
    # The tensor in `_dense_state` by whose dtype and device that of the parameter is known.
    _moment: str
    # Of this optimizer, not of its copies: it is no part of what is copied or pickled.
    _updaters: Mapping[Tensor, UpdateInBackward] = MappingProxyType({})

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
        """Make it, also of the state that dense gradients left, or make it follow its parameter."""
        raise NotImplementedError

    def _is_elsewhere(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether its parameter was cast or moved since the state of rows was made."""
        raise NotImplementedError

    def _init_dense_state(self, group: dict[str, Any], param: Tensor) -> None:
        raise NotImplementedError

    def _catch_up(self, param: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss again, with its gradients; called first.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or an option cannot be used; nothing has changed then.
            RuntimeError: prototypes that were updated in backward have a gradient besides; nothing
                has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for updater in self._updaters.values():
            updater.check_step()
        for group in self.param_groups:
            self._check_group(group)
            for param in group["params"]:
                _check_gradient(param)
        if not self.state:
            self._expect_rows()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            dense = [p for p in with_gradient if not self._by_rows(p)]
            # FSDP2 makes DTensors of all but the prototypes; torch's fused passes take no mixture.
            for local in (True, False):
                alike = [p for p in dense if is_local(p) == local]
                if alike:
                    self._follow_dense(alike)
                    self._dense_step(group, alike)
                    increment_version(alike)  # which torch's fused passes leave out
            for param in with_gradient:
                if self._by_rows(param):
                    self._row_step(group, param)
        for updater in self._updaters.values():
            updater.pending = False
        return loss

    def _follow_dense(self, params: list[Tensor]) -> None:
        """Let the state follow parameters that were cast, moved or laid out anew."""
        state, name = self.state, self._moment
        for param in params:
            moment = state[param].get(name)
            if moment is not None and states.layout(moment) != states.layout(param):
                state[param] = states.dense(param, state[param])

    def _follow_by_rows(self, param: Tensor) -> None:
        if self._is_elsewhere(param, self.state[param]):
            self.state[param] = self._following(param, self.state[param])

    def _expect_rows(self) -> None:
        """Before the first step: know by their loss what will have sparse gradients.

        Code that wants state before there are gradients, such as torch's `get_state_dict`, makes a
        step with zeros, which are dense.
        """
        for group in self.param_groups:
            for param in group["params"]:
                loss = None if param.grad is None else loss_of(param)
                if loss is not None and loss.options.sparse_grad:
                    self._init_row_state(group, param)

    def _row_step(self, group: dict[str, Any], param: Tensor) -> None:
        self._init_row_state(group, param)
        tensors, numbers = self._row_operands(group, param)
        fused = self._fused(group, param) and _contiguous_rows(param)
        update = getattr(library.ops if fused else plain, self._operator)
        update(param.detach(), *tensors, *_gradient_rows(param, merged=fused), *numbers)
        increment_version(param)
        self._finish_row_step(group, param, numbers)

    def update_in_backward(self, loss_fn: PartialMarginSoftmax) -> None:
        """From now on update the prototypes of this loss inside `loss.backward()`.

        Their gradient is then never stored, which saves memory and a pass over it. `step` goes on
        to update everything else, and must follow each backward.

        The prototypes must have contiguous rows.

        For plain steps: one backward of the loss itself per step. Backward raises RuntimeError,
        before anything has changed, where the loss was scaled first (GradScaler, accumulation, a
        weight), where a backward has passed since the last step, where it is of several calls of
        the loss, where the prototypes have a gradient or hooks, and with ``create_graph=True``;
        `clip_grad_norm_` refuses prototypes that have been updated already. Under `torch.compile`
        gradients are stored as ever, and `step` updates.

        A second term on the weight, such as ``weight.square().sum()``, is seen only when the loss
        has updated the prototypes already. If it was made after the loss, `step` raises
        RuntimeError and updates nothing more. If it was made before, torch raises inside backward
        that its tensor was modified by an inplace operation. Either way the prototypes have had
        the update of the loss alone.

        What only asks for gradients updates nothing: `torch.autograd.grad`, `torch.func`,
        ``backward(inputs=...)`` without the weight, and a loss that was made in `eval()` mode,
        whose backward stores the gradient. Copies of the loss and the optimizer, pickled ones too,
        train the usual way until this is called for them, and so does the loss once this optimizer
        is gone.

        On CUDA the host would have to wait to see that a loss was scaled, so there is no error at
        once: the prototypes are left as they are, the gradients of the embeddings are NaN, and so
        is whatever is made of them. (A GradScaler skips such steps and lowers its factor, and the
        next backward raises as no step has been made.)

        Args:
            loss_fn: with ``sparse_grad=True``; its `weight` is one of this optimizer's parameters.

        Raises:
            ValueError: the loss cannot be updated so.
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
        if not _contiguous_rows(param):
            raise ValueError(
                "update_in_backward needs prototypes with contiguous rows, got the strides "
                f"{list(param.stride())}: give the loss weight.detach().contiguous() first"
            )
        updater = self._updaters.get(param) or UpdateInBackward(param, self._update_in_backward)
        self._updaters = {**self._updaters, param: updater}  # as long as the optimizer
        attach(param, updater)

    def _update_in_backward(
        self, param: Tensor, grad_loss: Tensor, operands: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        group = self._group_of("the weight of the loss", param)
        self._check_group(group)
        self._init_row_state(group, param)
        tensors, numbers = self._row_operands(group, param)
        operator = getattr(library.ops, self._backward_operator)
        rest: tuple[Tensor, Tensor] = library.run(
            operator, grad_loss, *operands, *tensors, *numbers
        )
        increment_version(param)
        self._finish_row_step(group, param, numbers)
        return rest

    def _group_of(self, name: str, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is param for p in group["params"]):
                return group
        raise ValueError(f"{name} must be among the optimizer's parameters")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # as after loading
        for updater in self._updaters.values():
            updater.pending = False  # of an update that was taken back

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring the rows that were not sampled lately up to date with what they missed.

        A row is brought up to date by itself when it is sampled again. This does it for all rows,
        which costs a pass over all of them: before prototypes are compared with those of a dense
        optimizer, say. It changes no later result but by rounding.
        """
        for param, state in list(self.state.items()):
            if self._row_marker in state:
                self._follow_by_rows(param)
                self._catch_up(param)
                increment_version(param)

    def init_row_state(self, params: Iterable[Tensor]) -> None:
        """Make all state now: of these matrices as it will be once they have a sparse gradient, of
        the other parameters as dense gradients would.

        For code that needs the state tensors before the first step, such as
        `torch.distributed.checkpoint`. Prototypes of a loss with ``sparse_grad=True`` are known,
        and need no call; embeddings with ``sparse=True`` do.

        Args:
            params: matrices [C, d] of this optimizer.

        Raises:
            ValueError: one is no matrix, or not this optimizer's.
        """
        found = [(self._group_of("params", param), param) for param in params]
        for _, param in found:
            _check_matrix(param)
        for group, param in found:
            self._init_row_state(group, param)
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self._init_dense_state(group, param)

    def _by_rows(self, param: Tensor) -> bool:
        return self._row_marker in self.state.get(param, ()) or (
            param.grad is not None and param.grad.is_sparse
        )

    def _fused(self, group: dict[str, Any], param: Tensor) -> bool:
        fused = group["fused"]
        return _has_kernel(self._operator, param.device) if fused is None else fused

    def _fused_dense(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Whether torch's fused passes are right for these parameters, which have gradients.

        They take no notice of strides: a gradient laid out otherwise would go to other elements.
        """
        device = None
        for param in params:
            gradient = param.grad
            if gradient is None or gradient.stride() != param.stride():
                return False
            if param.device != device and not self._fused(group, param):
                return False
            device = param.device
        return True


def _contiguous_rows(param: Tensor) -> bool:
    return param.stride(1) == 1 or param.shape[1] <= 1


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
