"""Gradients of the loss operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unicom_ext.ops import library
from unicom_ext.ops.codes import Codes
from unicom_ext.ops.row_sparse import row_sparse, updater_of


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _m2, _m3, reals, codes = inputs
    _loss, *metrics, state, packed, kept = output
    ctx.mark_non_differentiable(*metrics, state)
    ctx.save_for_backward(*tensors, state, packed, kept)
    ctx.options = reals, codes
    ctx.sparse = bool(Codes(*codes).sparse_grad)
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each reading
    _embeddings, _slot, prototypes, class_index, count, *_rest = saved
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    updater = updater_of(prototypes) if ctx.sparse and ctx.needs_input_grad[2] else None
    if updater is not None:
        operands = (*saved, *ctx.options, ctx.needs_input_grad[0])
        grad_embeddings = updater(prototypes, grad_loss, operands)
        grads[0] = grad_embeddings if ctx.needs_input_grad[0] else None
        return tuple(grads)
    compact = ctx.sparse and class_index is not None
    grad_embeddings, grad_prototypes = library.run(
        _LossBackward.apply if torch.is_grad_enabled() else library.ops.loss_backward,
        grad_loss,
        *saved,
        *ctx.options,
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[2],
        compact,
    )
    if ctx.needs_input_grad[0]:
        grads[0] = grad_embeddings
    if ctx.needs_input_grad[2]:
        grads[2] = grad_prototypes
        if ctx.sparse:
            grads[2] = row_sparse(grad_prototypes, class_index, count, prototypes.shape)
    return tuple(grads)


def register(namespace: str) -> None:
    """Give the loss operator of a namespace its gradients."""
    torch.library.register_autograd(f"{namespace}::loss", _backward, setup_context=_setup_context)


register("unicom_ext")


def loss(*inputs: Any) -> tuple[Tensor, ...]:
    """`library.ops.loss`, where a gradient is wanted."""
    apply = library.ops.loss if torch.compiler.is_compiling() else _Loss.apply
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
        return output

    backward = staticmethod(_backward)


class _LossBackward(torch.autograd.Function):
    """The operator where its results may be differentiated (``create_graph=True``), which fails.

    Torch itself would warn and take their gradient for zero.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = library.ops.loss_backward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("the partial margin softmax can be differentiated only once")
