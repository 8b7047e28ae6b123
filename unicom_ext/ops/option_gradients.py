"""The gradients of the loss with respect to margins and scale, as far as they are tensors.

They need no pass of their own over the classes: what forward saves of each sample is enough, and
for the scale what the gradient of the embeddings leaves out, its part along them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unicom_ext.ops.codes import REDUCTION, Codes, Reals

MARGINS = slice(6, 8)  # m2 and m3 among the inputs of the loss operators
SCALE = 8
_IGNORED, _INVALID = -1, -3  # slots, in csrc/core/sampler.h
# States in csrc/core/target.h: these of a sample, and then of each of its positives
_OF_SAMPLE, _OF_POSITIVE = 6, 3
_OF_SCALE = 5  # of a sample
_COSINE, _PULL = 0, 2  # of a positive


def learned_margins(
    needs_input_grad: Sequence[bool], m2: Tensor | None, m3: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Those of m2 and m3 that backward needs."""
    wants_m2, wants_m3 = needs_input_grad[MARGINS]
    return m2 if wants_m2 else None, m3 if wants_m3 else None


def margin_gradients(
    grad_loss: Tensor,
    slot: Tensor,
    state: Tensor,
    m2: Tensor | None,
    m3: Tensor | None,
    reals: Sequence[float],
    codes: Sequence[int],
    own: slice = slice(None),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of those of m2 and m3 that are given.

    A positive's logit is s psi and the loss falls by its pull for each unit of it, so the gradient
    of its margin m is -s pull dpsi/dm.

    Args:
        grad_loss: upstream, [b] for reduction "none", else a scalar.
        slot: [B] or [B, P] int64, of the samples that the loss is a mean of.
        state: [B, 6 + 3 P] float64, as forward left it.
        m2, m3: [b] or [b, P] float64.
        reals, codes: the options, as the operators take them.
        own: the b samples among them whose margins these are.

    Returns:
        float64 of the margins' shape each, exactly 0 for positives without part in the loss.
    """
    real, code = Reals(*reals), Codes(*codes)
    upstream = _upstream(grad_loss, slot, code)
    positive = state[own, _OF_SAMPLE:].unflatten(1, (-1, _OF_POSITIVE))  # [b, P, 3]
    shape = next(m.shape for m in (m2, m3) if m is not None)
    if len(shape) == 1:
        positive = positive[:, 0]
    else:  # where other ranks have more labels, P is theirs
        positive = positive[:, : shape[1]]
        upstream = upstream[:, None] if upstream.dim() == 1 else upstream
    pull = positive[..., _PULL]
    # A product would let through what such a sample's margin or upstream gradient holds, NaN too.
    silent = pull == 0
    to_m3 = (real.scale * pull * upstream).masked_fill(silent, 0.0)
    to_m2 = None
    if m2 is not None:
        falling = _falling(positive[..., _COSINE], real.m1, m2, bool(code.linear_beyond_pi))
        to_m2 = (to_m3 * falling).masked_fill(silent, 0.0)
    return to_m2, None if m3 is None else to_m3


def scale_gradient(
    grad_loss: Tensor,
    slot: Tensor,
    state: Tensor,
    radial: Tensor,
    codes: Sequence[int],
    own: slice = slice(None),
) -> Tensor:
    """The part of the scale's gradient, a float64 scalar, that comes from the samples `own`.

    Args:
        grad_loss, slot, state, codes: as above.
        radial: [b] float64, of these samples, as backward leaves it, of all shards.
    """
    each = radial + state[own, _OF_SCALE]
    each = each * _upstream(grad_loss, slot, Codes(*codes))
    return each.masked_fill(~counted(slot)[own], 0.0).sum()


def _upstream(grad_loss: Tensor, slot: Tensor, code: Codes) -> Tensor:
    """Of each sample's loss, float64: [b] for reduction "none", else a scalar."""
    upstream = grad_loss.to(torch.float64)
    if code.reduction == REDUCTION["mean"]:
        upstream = upstream / counted(slot).sum().clamp(min=1)
    return upstream


def counted(slot: Tensor) -> Tensor:
    """Which samples take part in the loss, [B] bool.  slot: [B] or [B, P]"""
    takes_part = (slot != _IGNORED) & (slot != _INVALID)
    if slot.dim() == 1:
        return takes_part
    return takes_part.any(dim=1) & (slot != _INVALID).all(dim=1)


def _falling(cosine: Tensor, m1: float, m2: Tensor, linear: bool) -> Tensor:
    """-dpsi/dm2: how fast psi falls as m2 grows.  `evaluate_margin` in csrc/core/margin.h."""
    theta = torch.acos(cosine.clamp(-1, 1))
    angle = m1 * theta + m2
    if not linear:
        return torch.sin(angle)
    falling = torch.sin(angle.clamp(min=0))  # 0 where psi stays at 1 - m3
    # Past the joint psi is c - drop(joint) - m3, and the joint moves with m2 where it can.
    free = (math.pi - m2) / m1
    joint = free.clamp(0, math.pi)
    rest, sine, cosine_there = math.pi - joint, torch.sin(joint), torch.cos(joint)
    slope = torch.where(rest * sine >= 1 + cosine_there, sine - rest * cosine_there, sine)
    moves = (free >= 0) & (free <= math.pi)
    return torch.where(theta > joint, torch.where(moves, slope / m1, 0.0), falling)
