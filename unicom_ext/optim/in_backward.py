"""Updating prototypes inside backward, so that their gradient is never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from unicom_ext.ops.library import run

if TYPE_CHECKING:
    from unicom_ext.optim.rows import RowOptimizer


class UpdateInBackward:
    """What backward calls for a parameter instead of making its gradient.

    pending: a backward has updated the parameter, and the optimizer's step has yet to come.
    """

    def __init__(
        self, optimizer: RowOptimizer, group: dict[str, Any], operator: Callable[..., Tensor]
    ) -> None:
        self.optimizer, self.group, self.operator = optimizer, group, operator
        self.pending = False

    @torch.no_grad()
    def __call__(self, param: Tensor, grad_loss: Tensor, operands: tuple[Any, ...]) -> Tensor:
        """Update, and return the gradient of the embeddings.

        operands: what the operator takes after grad_loss and before the optimizer's state.
        """
        self._refuse_all_but_plain_steps(param, grad_loss)
        self.optimizer._check_group(self.group)
        self.optimizer._init_row_state(self.group, param)
        tensors, numbers = self.optimizer._row_operands(self.group, param)
        grad_embeddings = run(self.operator, grad_loss, *operands, *tensors, *numbers)
        increment_version(param)
        self.optimizer._finish_row_step(self.group, param, numbers)
        self.pending = True
        return grad_embeddings

    def _refuse_all_but_plain_steps(self, param: Tensor, grad_loss: Tensor) -> None:
        problem = None
        if self.pending:
            problem = (
                "a backward has passed since the last optimizer.step(), and gradients cannot be "
                "accumulated"
            )
        elif param.grad is not None:
            problem = "weight.grad is there already, and gradients cannot be accumulated"
        elif grad_loss.device.type == "cpu" and float(grad_loss) != 1:
            problem = (
                f"the loss was multiplied by {float(grad_loss):g} before backward (GradScaler, "
                "accumulation, or a weight)"
            )
        elif param._backward_hooks or param._post_accumulate_grad_hooks:
            problem = "weight has gradient hooks"
        if problem is not None:
            raise RuntimeError(
                f"update_in_backward takes plain steps only: {problem}. The prototypes have not "
                "been updated. Make an optimizer without update_in_backward for this"
            )
