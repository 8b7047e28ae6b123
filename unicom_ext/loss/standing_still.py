"""Notices prototypes that are in no optimizer: they have gradients, and stay where they are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

_CALLS = 50  # gradients may be accumulated over some batches, and a GradScaler skips some steps


@dataclass
class StandingStill:
    """Counts a loss's training calls in a row before which its prototypes did not change.

    A change is seen by torch's own count of the changes of each tensor. Some optimizers go around
    it (by ``param.data``), so the values have the last word.
    """

    calls: int = 0
    version: int = -1
    total: Tensor | None = None  # of the values, half-way
    done: bool = False

    def look(self, weight: Tensor) -> None:
        """Before each training call. One UserWarning, where they stand still."""
        if self.done or not weight.is_leaf or weight.grad is None:
            return
        if weight._version != self.version:
            self.calls, self.version = 0, weight._version
        self.calls += 1
        if self.calls == _CALLS // 2:
            self.total = _total(weight)
        elif self.calls > _CALLS:
            self.done = True
            if self.total is not None and torch.equal(_total(weight), self.total):
                warnings.warn(
                    f"the prototypes (the weight of the loss) had a gradient in {_CALLS} training "
                    "calls and have not changed: they seem to be in no optimizer. Add them to one, "
                    "as in torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1). "
                    "Prototypes that shall stay as they are need no gradient: "
                    "loss.requires_grad_(False)",
                    stacklevel=4,
                )


def _total(weight: Tensor) -> Tensor:
    return weight.detach().sum(dtype=torch.float64)
