"""Updating prototypes inside backward, so that their gradient is never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor


class UpdateInBackward:
    """What backward calls for a parameter instead of making its gradient.

    Args:
        param: the parameter.
        update: a method of the optimizer. Takes the parameter, the upstream gradient of the loss
            and what the operator wants after it; updates, and returns the gradient of the
            embeddings.

    Attributes:
        pending: a backward has updated the parameter, and the optimizer's step has yet to come.
        nodes: of the graphs that are alive, those whose backward calls this.
    """

    def __init__(
        self,
        param: Tensor,
        update: Callable[[Tensor, Tensor, tuple[Any, ...]], tuple[Tensor, Tensor]],
    ) -> None:
        self.param = param
        # Weak, so that the update goes with its optimizer: what backward calls then is gone too.
        self._update = WeakMethod(update)
        self.pending = False
        self.nodes: WeakSet[Any] = WeakSet()

    def check_step(self) -> None:
        """Before the optimizer's step.

        Raises RuntimeError if the step would update the parameter once more.
        """
        if self.pending and self.param.grad is not None:
            raise RuntimeError(
                "the prototypes have been updated in backward, by the loss, and weight has another "
                "gradient besides (of a second term on the weight, or of a loss in eval() mode), "
                "which would be a second update of this step. Nothing more has been updated. Make "
                "an optimizer without update_in_backward for this"
            )

    def __call__(
        self, grad_loss: Tensor, operands: tuple[Any, ...], node: Any
    ) -> tuple[Tensor, Tensor]:
        self._refuse_all_but_plain_steps(grad_loss, node)
        update = self._update()
        assert update is not None  # the optimizer keeps this
        with torch.no_grad():
            rest = update(self.param, grad_loss, operands)
        self.pending = True
        return rest

    def _refuse_all_but_plain_steps(self, grad_loss: Tensor, node: Any) -> None:
        param, problem = self.param, None
        if self.pending:
            problem = (
                "a backward has passed since the last optimizer.step(), and gradients cannot be "
                "accumulated"
            )
        elif param.grad is not None:
            problem = "weight.grad is there already, and gradients cannot be accumulated"
        elif any(
            other is not node and torch._C._will_engine_execute_node(other)
            for other in list(self.nodes)
        ):
            problem = "this backward is of several calls of the loss"
        elif torch.is_grad_enabled():
            problem = "create_graph=True asks for gradients that can be differentiated"
        elif grad_loss.dim():
            problem = 'the loss has reduction="none"'
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
