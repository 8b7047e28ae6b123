"""What the loss has to mind under the transforms of `torch.func` and in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

_BATCHED: Any = torch._C._parse_dispatch_key(
    "Batched"
)  # no member of DispatchKey, and as a name slow


def transforming() -> bool:
    """Whether a transform such as `torch.func.grad` is under way; not while a graph is compiled."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def is_batched(grad: Tensor) -> bool:
    """Whether it stands for many gradients (`torch.autograd.grad(is_grads_batched=True)`), by a
    transform older than those of torch.func, which has no sparse tensors either."""
    return torch._C._dispatch_keys(grad).has(_BATCHED)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def transformable(
    operator: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """An operator with its gradient, for transforms and forward mode, which raises.

    What `torch.library.register_autograd` makes has no part in transforms, and the form that has
    takes longer at each call, so it is not the only one.
    """
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(operator),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_refuse_tangents),
    }
    function = type("Transformable", (torch.autograd.Function,), members)
    apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]
    return apply


def _refuse_tangents(*_: object) -> None:
    """Without a rule they would be lost in silence."""
    raise RuntimeError(
        "the partial margin softmax has no derivative in forward mode (torch.func.jvp, jacfwd, "
        "hessian, torch.autograd.forward_ad): use reverse mode, such as torch.func.grad"
    )


def outside() -> AbstractContextManager[object]:
    """A context in which no transform is under way: for counters, and messages between ranks."""
    return temporarily_clear_interpreter_stack() if transforming() else nullcontext()


def kept(tensors: tuple[Tensor | None, ...]) -> Any:
    """Tensors as they can be kept when transforms are over: what is inside."""
    return tuple(None if t is None else innermost(t) for t in tensors)


def innermost(tensor: Tensor) -> Tensor:
    """The values of a tensor that transforms may have wrapped."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
