"""The partial margin softmax in plain PyTorch: what the fused operator is tested against.

It is written to be read and to be right, not to be quick: it holds the whole B x |S| matrix of
cosines and leaves the gradient to autograd. It shares no code with the engine.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.loss import checks
from unicom_ext.loss.labels import Labels, dense, place
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.options import LossKwargs, LossOptions, refuse_unknown
from unicom_ext.loss.results import Metrics

__all__ = ["Metrics", "partial_margin_softmax"]


@overload
def partial_margin_softmax(
    embeddings: Tensor,
    labels: Labels,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float | Tensor,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    process_group: object | None = None,
    return_metrics: Literal[False] = False,
    **keywords: Unpack[LossKwargs],
) -> Tensor: ...


@overload
def partial_margin_softmax(
    embeddings: Tensor,
    labels: Labels,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float | Tensor,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    process_group: object | None = None,
    return_metrics: Literal[True],
    **keywords: Unpack[LossKwargs],
) -> tuple[Tensor, Metrics]: ...


@overload
def partial_margin_softmax(
    embeddings: Tensor,
    labels: Labels,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float | Tensor,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    process_group: object | None = None,
    return_metrics: bool,
    **keywords: Unpack[LossKwargs],
) -> Tensor | tuple[Tensor, Metrics]: ...


def partial_margin_softmax(
    embeddings: Tensor,
    labels: Labels,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float | Tensor,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    process_group: object | None = None,
    return_metrics: bool = False,
    **keywords: Unpack[LossKwargs],
) -> Tensor | tuple[Tensor, Metrics]:
    """Softmax cross entropy over margin cosines, on some of the classes and feature dimensions.

    Let S be the classes of ``class_index`` and G the dimensions of ``feature_index``, x_i and w_j
    the unit vectors of embedding i and prototype j cut to G, c_ij = x_i . w_j and s the scale::

        loss_i = log(sum over j in S of exp z_ij) - z_iy
        z_ij = s * c_ij  for j != y_i,    z_iy = s * psi(c_iy)  with psi the margin

    With label smoothing epsilon, ``epsilon * (z_iy - mean over j in S of z_ij)`` is added.
    With several positives P_i of a sample, and its negatives N_i the other classes of S::

        loss_i = mean over p of log(exp z_ip + sum over j in N_i of exp z_ij) - z_ip      "average"
        loss_i = log(1 + sum over N_i of exp z_ij) + log(1 + sum over P_i of exp -z_ip)  "separate"

    The arithmetic is done in the promoted dtype of embeddings and prototypes, float32 at least
    (float64 makes an oracle), and the loss has that dtype. ``precision``, ``grad_average``,
    ``workspace_bytes`` and autocast change nothing here.

    Corners: a zero row has unit vector 0 and gradient 0. Without another class in S, loss and
    gradient are 0. Ignored samples have loss 0 and gradient 0, whatever their rows hold, and
    ``reduction="mean"`` is over the others (0 if there are none).

    Args:
        embeddings: [B, d] floating point.
        labels: int32 or int64, class ids in [0, C) or ``ignore_index``: [B], [B, P], or a pair
            (ids, offsets).
        prototypes: [C, d] floating point, or with K centers of each class [C * K, d], of which the
            largest cosine counts.
        margin: psi (radians); m2 and m3 may be per-sample tensors like labels.
        scale: s > 0, a number or a tensor of one value.
        class_index: int64, sorted unique class ids that contain every label, or None for all.
        feature_index: int64, sorted unique dimensions, or None for all.
        process_group: must be None.
        return_metrics: also return the `Metrics` of each sample.
        keywords: the other options, those of `unicom_ext.functional.LossOptions`.

    Returns:
        The loss, a scalar, or [B] for ``reduction="none"``; with `return_metrics` a pair of it and
        `Metrics`.

    Raises:
        TypeError, ValueError: an argument is wrong.
        NotImplementedError: there is a process group.
    """
    if process_group is not None:
        raise NotImplementedError("process_group must be None: the reference runs in one process")
    refuse_unknown("partial_margin_softmax", keywords)
    options = LossOptions(margin, scale, **keywords)
    labels = dense(labels, options.ignore_index)
    centers = options.num_centers
    checks.check_tensors(
        embeddings, labels, prototypes, margin, class_index, feature_index, num_centers=centers
    )
    if options.check_inputs:
        checks.check_finite(embeddings)
    num_classes = len(prototypes) // centers
    _check_values(labels, num_classes, class_index, options.ignore_index)
    if feature_index is not None:
        _check_index("feature_index", feature_index, embeddings.shape[1])
        if len(feature_index) == 0:
            raise ValueError("feature_index must hold at least one dimension, got none")

    shape, positives = labels.shape, _matrix(labels).long()  # [B, P]
    counts = positives != options.ignore_index
    for p in range(1, positives.shape[1]):  # a class that stands in its row before counts there
        counts[:, p] &= (positives[:, :p] != positives[:, p : p + 1]).all(dim=1)
    # [B']: what an ignored row holds, NaN included, must not reach the others.
    kept = counts.any(dim=1)
    dtype = torch.promote_types(embeddings.dtype, prototypes.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if class_index is None:
        class_index = torch.arange(num_classes, device=prototypes.device)
    if len(class_index) == 0:  # then no sample counts: any class will do
        class_index = class_index.new_zeros(1)

    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings[kept].to(dtype)  # [B', d]
        rows = class_index[:, None] * centers + torch.arange(centers, device=class_index.device)
        w = F.embedding(rows.flatten(), prototypes, sparse=options.sparse_grad).to(dtype)
        if feature_index is not None:
            x, w = x[:, feature_index], w[:, feature_index]
        cosine = (_unit(x) @ _unit(w).T).unflatten(1, (-1, centers))  # [B', |S|, K]
        cosine = cosine.gather(2, cosine.detach().argmax(2, keepdim=True))[..., 0]  # [B', |S|]

        # Labels that do not count stand for any class here, and are left out of all sums.
        labels, counts = positives.where(counts, class_index[0])[kept], counts[kept]  # [B', P]
        column = torch.searchsorted(class_index, labels)
        target_cosine = cosine.gather(1, column)
        m2, m3 = (_of_each(m, kept, counts, target_cosine) for m in (margin.m2, margin.m3))
        target_logit = scale * _margin(target_cosine, m2, m3, options)

        is_positive = torch.zeros_like(cosine, dtype=torch.bool)  # [B', |S|]
        row, position = counts.nonzero(as_tuple=True)
        is_positive[row, column[row, position]] = True
        has_negatives = ~is_positive.all(dim=1)
        negative = cosine.masked_fill(is_positive, 0.0)
        largest_negative = negative.detach().masked_fill(is_positive, -math.inf).amax(dim=1)
        if options.interclass_filter is not None:
            negative = torch.where(negative > options.interclass_filter, 0.0, negative)
        negative = (scale * negative).masked_fill(is_positive, -math.inf)
        # Rows without negatives go another way, as their logsumexp has no gradient.
        negative = torch.where(has_negatives[:, None], negative, 0.0)
        log_negatives = torch.logsumexp(negative, dim=1)

        def log1p_exp(x: Tensor) -> Tensor:
            # Above the threshold softplus(t) is t; at 40 that is exact in float64 too.
            return F.softplus(x, threshold=40)

        if options.multi_label == "average":
            # log(exp a + exp z) - z without forming the sum, which would lose z - a >> 0.
            each = log1p_exp(log_negatives[:, None] - target_logit)
            if options.label_smoothing > 0:
                number = (~is_positive).sum(dim=1, keepdim=True)
                mean = scale * cosine.masked_fill(is_positive, 0.0).sum(dim=1, keepdim=True)
                mean = (target_logit + mean) / (1 + number)
                each = each + options.label_smoothing * (target_logit - mean)
            each = torch.where(counts & has_negatives[:, None], each, 0.0)
            kept_loss = each.sum(dim=1) / counts.sum(dim=1)
        else:
            missed = torch.logsumexp(torch.where(counts, -target_logit, -math.inf), dim=1)
            pushed = torch.where(has_negatives, log1p_exp(log_negatives), 0.0)
            kept_loss = pushed + log1p_exp(missed)

    loss = _spread(kept_loss, kept, 0.0)
    result = {
        "none": loss,
        "sum": loss.sum(),
        "mean": loss.sum() / kept.sum().clamp(min=1),
    }[options.reduction]
    if not return_metrics:
        return result
    target_cosine = target_cosine.detach()
    top1 = (counts & (target_cosine >= largest_negative[:, None])).any(dim=1)
    cosines = target_cosine.new_zeros(positives.shape)
    cosines[kept] = target_cosine.masked_fill(~counts, 0.0)
    return result, Metrics(
        loss=loss.detach(),
        target_cosine=cosines.reshape(shape),
        largest_negative=_spread(largest_negative, kept, -math.inf),
        top1=_spread(top1, kept, False),
    )


def _unit(rows: Tensor) -> Tensor:
    """Rows [n, d] divided by their length; zero rows stay zero and get the gradient 0."""
    # The direction does not depend on the length, so neither value nor gradient change when rows
    # are first divided by a constant; squares then neither overflow nor vanish.
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    is_zero = largest == 0
    rows = rows / largest.masked_fill(is_zero, 1.0)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(is_zero, 0.0, rows / length.masked_fill(is_zero, 1.0))


def _margin(cosine: Tensor, m2: Tensor, m3: Tensor, options: LossOptions) -> Tensor:
    """psi(cosine) [B', P], with the chosen derivative."""
    m1 = options.margin.m1
    c = cosine.detach().clamp(-1, 1)
    theta = torch.arccos(c)
    angle = m1 * theta + m2
    if options.beyond_pi == "linear":
        angle = angle.clamp(min=0)  # psi stays at 1 - m3
    psi = torch.cos(angle) - m3
    slope = m1 * torch.sin(angle) / torch.sin(theta).clamp(min=1e-6)
    if options.beyond_pi == "linear":
        # Past the angle where the argument of the cosine reaches pi, psi goes on with slope 1. The
        # drop makes it at least as low as psi at that angle, and is m2 * sin(m2) when m1 is 1.
        last = ((math.pi - m2) / m1).clamp(0, math.pi)
        drop = torch.maximum((math.pi - last) * torch.sin(last), 1 + torch.cos(last))
        psi = torch.where(theta > last, c - drop - m3, psi)
        slope = torch.where(theta > last, 1.0, slope)
    if options.margin_grad == "straight_through":
        slope = torch.ones_like(slope)
    # The difference is 0; it is there for its gradient.
    return psi + slope * (cosine - cosine.detach())


def _of_each(m: float | Tensor, kept: Tensor, counts: Tensor, like: Tensor) -> Tensor:
    """m2 or m3 of the kept samples, [B', P] or a scalar, of the arithmetic's dtype."""
    if not isinstance(m, Tensor):
        return like.new_tensor(m)
    return torch.where(counts, _matrix(m)[kept].to(like), 0.0)


def _matrix(each: Tensor) -> Tensor:
    """[B, P] of what is [B, P], or [B]."""
    return each if each.dim() == 2 else each[:, None]


def _spread(values: Tensor, kept: Tensor, fill: float | bool) -> Tensor:
    """Per-sample values [B'] at their places among all samples [B]."""
    return values.new_full(kept.shape, fill).masked_scatter(kept, values)


def _check_values(
    labels: Tensor, num_classes: int, class_index: Tensor | None, ignore_index: int
) -> None:
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= num_classes))
    _check_labels(labels, outside, f"in [0, {num_classes}) or ignore_index ({ignore_index})")
    if class_index is not None:
        _check_index("class_index", class_index, num_classes)
        _check_labels(labels, kept & ~torch.isin(labels, class_index), "in class_index")


def _check_labels(labels: Tensor, bad: Tensor, allowed: str) -> None:
    if bad.any():
        position = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"labels must be {allowed}, got {int(labels.flatten()[position])} at position "
            f"{place(labels, position)}"
        )


def _check_index(name: str, index: Tensor, stop: int) -> None:
    if ((index < 0) | (index >= stop)).any() or (index[1:] <= index[:-1]).any():
        raise ValueError(f"{name} must hold sorted unique ids in [0, {stop}), got {index.tolist()}")
