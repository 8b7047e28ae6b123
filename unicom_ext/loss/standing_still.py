"""Notices prototypes that are in no optimizer: they have gradients, and stay where they are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch
from torch import Tensor

_STEPS = 50  # of any optimizer: a model may have several, and a GradScaler skips some steps


@dataclass
class StandingStill:
    """Counts the steps of optimizers at which prototypes had a new gradient and did not change.

    A change is seen by torch's own count of the changes of each tensor. Some optimizers go around
    it (by ``param.data``), so the values have the last word.
    """

    steps: int = 0
    version: int = -1
    total: Tensor | None = None  # of the values, half-way
    done: bool = False
    grad: tuple[ReferenceType[Tensor], int] | None = field(default=None, repr=False)  # the last

    def look(self, param: Tensor) -> None:
        """After each step of an optimizer. One UserWarning, where they stand still."""
        if param._version != self.version:
            self.steps, self.version = 0, param._version
        if param.grad is None or self.done:
            return
        seen, self.grad = self.grad, (ref(param.grad), param.grad._version)
        if seen is not None and seen[0]() is param.grad and seen[1] == param.grad._version:
            return
        self.steps += 1
        if self.steps == _STEPS // 2:
            self.total = _total(param)
        elif self.steps > _STEPS:
            self.done = True
            if self.total is not None and torch.equal(_total(param), self.total):
                warnings.warn(
                    f"the prototypes (the weight of the loss) had a gradient at {_STEPS} steps of "
                    "an optimizer and have not changed: they seem to be in no optimizer. Add them "
                    "to one, as in torch.optim.SGD([*model.parameters(), *loss.parameters()], "
                    "lr=0.1). Prototypes that shall stay as they are need no gradient: "
                    "loss.requires_grad_(False)",
                    stacklevel=4,
                )

    def __reduce__(self) -> tuple[type[StandingStill], tuple[()]]:
        return StandingStill, ()  # a copy may be in no optimizer though the original is


def _total(param: Tensor) -> Tensor:
    return param.detach().sum(dtype=torch.float64)
