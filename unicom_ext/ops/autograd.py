"""Gradients of the loss operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unicom_ext.ops import library
from unicom_ext.ops.codes import Codes
from unicom_ext.ops.option_gradients import (
    MARGINS,
    SCALE,
    learned_margins,
    margin_gradients,
    scale_gradient,
)
from unicom_ext.ops.row_sparse import row_sparse, updater_of
from unicom_ext.ops.transforms import in_forward_mode, is_batched, transformable, transforming

_PROTOTYPES = 2  # among the operator's inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, m2, m3, _scale, reals, codes = inputs
    _loss, *metrics, state, packed, kept = output
    ctx.mark_non_differentiable(*metrics, state)
    learned = learned_margins(ctx.needs_input_grad, m2, m3)
    ctx.save_for_backward(*tensors, state, packed, kept, *learned)
    ctx.options = reals, codes
    ctx.sparse = bool(Codes(*codes).sparse_grad)
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    # Once: activation checkpointing recomputes at each reading.
    *saved, m2, m3 = ctx.saved_tensors
    _embeddings, slot, prototypes, class_index, count, _features, state, *_rest = saved
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    if m2 is not None or m3 is not None:
        operands = (grad_loss, slot, state, m2, m3, *ctx.options)
        grads[MARGINS] = once(margin_gradients, *operands)
    wants_embeddings, _, wants_prototypes, *_rest = ctx.needs_input_grad
    wants_scale = ctx.needs_input_grad[SCALE]
    if not (wants_embeddings or wants_prototypes or wants_scale):
        return tuple(grads)
    wanted = wants_embeddings, wants_scale
    sparse = ctx.sparse and wants_prototypes and not is_batched(grad_loss)
    updater = updater_of(prototypes) if sparse else None
    if updater is not None and _is_accumulated(ctx):
        grad_embeddings, radial = updater(grad_loss, (*saved, *ctx.options, *wanted), ctx)
    else:
        grad_embeddings, grad_prototypes, radial = library.run(
            once,
            library.ops.loss_backward,
            grad_loss,
            *saved,
            *ctx.options,
            *wanted,
            wants_prototypes,
            sparse and class_index is not None,
        )
        if sparse:
            centers = Codes(*ctx.options[1]).num_centers
            grad_prototypes = row_sparse(
                grad_prototypes, class_index, count, prototypes.shape, centers
            )
        grads[_PROTOTYPES] = grad_prototypes if wants_prototypes else None
    grads[0] = grad_embeddings if wants_embeddings else None
    if wants_scale:
        codes = ctx.options[1]
        grads[SCALE] = once(scale_gradient, grad_loss, slot, state, radial, codes)
    return tuple(grads)


def _is_accumulated(ctx: Any) -> bool:
    """Whether this backward is to add to the prototypes' ``.grad``.

    It is not where it only asks for gradients, of whatever: ``torch.autograd.grad``, or
    ``backward(inputs=...)`` without the prototypes.
    """
    accumulation, _ = ctx.next_functions[_PROTOTYPES]
    try:
        executed: bool = torch._C._will_engine_execute_node(accumulation)
    except RuntimeError:  # torch's answer where `grad` asks for the gradient of a leaf
        return False
    return executed


def register(namespace: str) -> None:
    """Give the loss operator of a namespace its gradients."""
    torch.library.register_autograd(f"{namespace}::loss", _backward, setup_context=_setup_context)


register("unicom_ext")


def loss(*inputs: Any) -> tuple[Tensor, ...]:
    """`library.ops.loss`, where a gradient is wanted."""
    if torch.compiler.is_compiling():
        apply = library.ops.loss
    elif transforming() or in_forward_mode():
        apply = _transformed
    else:
        apply = _Loss.apply
    outputs: tuple[Tensor, ...] = apply(*inputs)
    return outputs


class _Loss(torch.autograd.Function):
    """The operator with the autograd registered above, without torch's walk over its schema.

    That walk takes 34 us, a sixth of a tiny step.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = library.ops.loss(*inputs)
        _setup_context(ctx, inputs, output)
        updater = updater_of(inputs[_PROTOTYPES]) if ctx.sparse else None
        if updater is not None:
            updater.nodes.add(ctx)
        return output

    backward = staticmethod(_backward)


_transformed = transformable(lambda *inputs: library.ops.loss(*inputs), _setup_context, _backward)


def once(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs) in a backward pass; to differentiate its results again raises.

    Torch itself would warn at best, and take their gradient for zero.
    """
    if torch.is_grad_enabled():
        return _Once.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return function(*inputs)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("the partial margin softmax can be differentiated only once")
