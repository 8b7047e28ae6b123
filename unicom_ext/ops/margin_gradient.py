"""The gradient of the loss with respect to margins that differ from sample to sample.

It needs no pass over the classes: what forward saves of each sample is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unicom_ext.ops.codes import REDUCTION, Codes, Reals

MARGINS = slice(6, 8)  # m2 and m3 among the inputs of the loss operators
_IGNORED, _INVALID = -1, -3  # slots, in csrc/core/sampler.h
_COSINE, _MISS = 1, 3  # columns of SampleState in csrc/core/target.h


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

    The target's logit is s psi and the loss falls by 1 - p for each unit of it, so the gradient of
    a margin m is -s (1 - p) dpsi/dm.

    Args:
        grad_loss: upstream, [b] for reduction "none", else a scalar.
        slot: [B] int64, of the samples that the loss is a mean of.
        state: [B, 6] float64, as forward left it.
        m2, m3: [b] float64.
        reals, codes: the options, as the operators take them.
        own: the b samples among them whose margins these are.

    Returns:
        [b] float64 each, exactly 0 for samples without part in the loss.
    """
    real, code = Reals(*reals), Codes(*codes)
    upstream = grad_loss.to(torch.float64)
    if code.reduction == REDUCTION["mean"]:
        counted = (slot != _IGNORED) & (slot != _INVALID)
        upstream = upstream / counted.sum().clamp(min=1)
    miss = state[own, _MISS]
    # A product would let through what such a sample's margin or upstream gradient holds, NaN too.
    silent = miss == 0
    to_m3 = (real.scale * miss * upstream).masked_fill(silent, 0.0)
    to_m2 = None
    if m2 is not None:
        falling = _falling(state[own, _COSINE], real.m1, m2, bool(code.linear_beyond_pi))
        to_m2 = (to_m3 * falling).masked_fill(silent, 0.0)
    return to_m2, None if m3 is None else to_m3


def _falling(cosine: Tensor, m1: float, m2: Tensor, linear: bool) -> Tensor:
    """-dpsi/dm2 [b]: how fast psi falls as m2 grows.  `evaluate_margin` in csrc/core/margin.h."""
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
