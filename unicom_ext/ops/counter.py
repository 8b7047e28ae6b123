"""The counter of steps: selections are drawn by it, and each call that draws advances it once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch

from unicom_ext.ops import library
from unicom_ext.ops.transforms import outside, transforming

MUST_DRAW_AGAIN = (
    "the loss is called in backward, as activation checkpointing does, and must draw what it drew "
    "at first"
)

# A compiled graph cannot ask whether backward runs it; an operator in it can.
_LIBRARY = torch.library.Library("unicom_ext", "FRAGMENT")
_LIBRARY.define("first_draw(Tensor step) -> Tensor")
_LIBRARY.define("next_step(Tensor step) -> Tensor")


def in_backward() -> bool:
    """Whether a backward pass calls, as it does what it repeats."""
    return torch._C._current_graph_task_id() != -1


def first_draw(step: Tensor) -> Tensor:
    """The step to draw by in a compiled graph, which raises a RuntimeError where it is repeated:
    what it drew at first is not known any more."""
    return library.ops.first_draw(step)


def advance(step: Tensor) -> None:
    """Add 1 in place, once for a call, also where backward repeats a compiled one.

    Transforms refuse changes to tensors that are not arguments of the function. This one is no part
    of what is differentiated.
    """
    if torch.compiler.is_compiling():
        step.copy_(library.ops.next_step(step))
    elif transforming() and not _functorch.is_functorch_wrapped_tensor(step):
        with outside():
            step.add_(1)
    else:
        step.add_(1)


@torch.library.impl(_LIBRARY, "first_draw", "CompositeExplicitAutograd")
def _first_draw(step: Tensor) -> Tensor:
    if in_backward():
        raise RuntimeError(
            f"{MUST_DRAW_AGAIN}, which a compiled loss cannot. Compile a function that calls "
            "checkpoint instead, give step= to the call, another number each time, or leave the "
            "loss out of what is checkpointed, it keeps no logits"
        )
    return step.clone()


@torch.library.impl(_LIBRARY, "next_step", "CompositeExplicitAutograd")
def _next_step(step: Tensor) -> Tensor:
    return step.clone() if in_backward() else step + 1


torch.library.register_fake("unicom_ext::first_draw", torch.empty_like, lib=_LIBRARY)
torch.library.register_fake("unicom_ext::next_step", torch.empty_like, lib=_LIBRARY)
