"""Clipping where some gradients are sparse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from unicom_ext.ops.row_sparse import is_merged, merged_gradient, updater_of
from unicom_ext.optim.rows import merge_rows


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of which some have sparse gradients.

    The gradients are scaled in place so that their norm, as if they were one vector, is at most
    `max_norm`. Rows that micro-batches have in common are added up first, as the norm needs their
    sums.

    Args:
        parameters: a parameter, or several; those without a gradient are passed over.
        max_norm: of all gradients together.
        norm_type: which norm, ``float("inf")`` too.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set, or prototypes have
            been updated in backward already; nothing has been scaled then.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    refuse_updated(parameters)
    values = [stored_values(p, p.grad) for p in parameters if p.grad is not None]
    norm = get_total_norm(values, norm_type, error_if_nonfinite)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm


def refuse_updated(parameters: Iterable[Tensor]) -> None:
    """RuntimeError where backward has updated one of them and kept no gradient."""
    if any(updater.pending for p in parameters if (updater := updater_of(p)) is not None):
        raise RuntimeError(
            "gradients cannot be clipped where prototypes are updated in backward: they have been "
            "updated already. Make an optimizer without update_in_backward for this"
        )


def stored_values(param: Tensor, gradient: Tensor) -> Tensor:
    """What of its gradient is stored: all of a dense one, the rows of a sparse one."""
    if not gradient.is_sparse:
        return gradient
    if not is_merged(gradient):
        ids, rows = merge_rows(gradient._indices()[0], gradient._values())
        param.grad = gradient = merged_gradient(ids, rows, gradient.shape)
    return gradient._values()
