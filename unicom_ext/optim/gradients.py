"""The norm of gradients of which each rank holds a part: for clipping, and to skip a step together.

To scale losses under autocast use torch's `ShardedGradScaler(process_group=...)`: it shares what it
finds, while with `torch.amp.GradScaler`, and with either where an optimizer is fused, a rank whose
prototypes overflow would skip a step alone; every rank raises at the next call of the loss then.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.optim.clip import refuse_updated, stored_values


@torch.no_grad()
def global_grad_norm(parameters: Iterable[Tensor], loss: PartialMarginSoftmax) -> Tensor:
    """Euclidean norm of all gradients, those of other ranks' prototypes included.

    Args:
        parameters: those with the same gradient on every rank, such as a DDP encoder's, or
            `DTensor`s such as FSDP's; and `loss.weight`, or not: it is counted once.
        loss: whose prototypes are shared. Every rank of its group calls this.

    Returns:
        A scalar, the same on every rank. It is not finite if any gradient on any rank is not, so
        ``if norm.isfinite(): optimizer.step()`` is decided alike everywhere.

    Raises:
        RuntimeError: the prototypes have been updated in backward already.
    """
    refuse_updated([loss.weight])
    gradients = [p.grad for p in parameters if p.grad is not None and p is not loss.weight]
    common = get_total_norm(gradients)
    if isinstance(common, DTensor):
        common = common.full_tensor()
    weight = loss.weight
    own = get_total_norm([] if weight.grad is None else [stored_values(weight, weight.grad)])
    if loss.shard is not None:
        own = torch.linalg.vector_norm(loss.shard.gather(own.reshape(1).to(weight.device)))
    return torch.linalg.vector_norm(torch.stack([common.to(own), own]))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    loss: PartialMarginSoftmax,
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients in place so that their `global_grad_norm` is at most `max_norm`.

    Args:
        parameters: as for `global_grad_norm`.
        loss: as there. Every rank of its group calls this.
        max_norm: Euclidean norm of all gradients together.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Returns:
        The norm before, a scalar, on every rank the same.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set, or the prototypes have
            been updated in backward already; on every rank, and nothing has been scaled then.
    """
    parameters = list(parameters)
    norm = global_grad_norm(parameters, loss)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the norm of the gradients must be finite to clip them, got {norm}")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for param in parameters:
        if param.grad is not None and param is not loss.weight:
            param.grad.mul_(factor.to(param.grad.device))
    if loss.weight.grad is not None:
        stored_values(loss.weight, loss.weight.grad).mul_(factor)
    return norm
