"""The counter of steps: selections are drawn by it, and each call that draws advances it once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils.weak import WeakTensorKeyDictionary

from unicom_ext.ops import library
from unicom_ext.ops.transforms import innermost, outside, transforming

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


# Of steps on devices: what the host knows their value to be, as long as nobody else writes them.
_on_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # -> (value, version)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason='feature_selection="nested" draws how many dimensions take part on the host, and no '
    'graph can hold that: to compile the loss whole use feature_selection="random"'
)
def on_host(step: Tensor) -> int:
    """The value of a step. Waits for the device only where the host cannot know it: at first, and
    when somebody else has written it.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would draw the same at each replay.
    """
    if transforming():
        step = innermost(step)
    if step.device.type == "cpu":
        return int(step)
    if step.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'feature_selection="nested" draws how many dimensions take part on the host, and a '
            'CUDA graph would replay the first draw: use feature_selection="random" in graphs'
        )
    value, version = _on_host.get(step, (0, None))
    if version != step._version:
        value = int(step)
        known_on_host(step, value)
    return value


def known_on_host(step: Tensor, value: int) -> None:
    """So that nobody needs to wait for it."""
    if step.device.type != "cpu" and not torch.compiler.is_compiling():
        _on_host[step] = value, step._version


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
        value, version = _on_host.get(step, (0, None)) if _on_host else (0, None)
        is_known = version == step._version
        step.add_(1)
        if is_known:
            known_on_host(step, value + 1)


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
