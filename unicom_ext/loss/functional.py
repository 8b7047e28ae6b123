"""The partial margin softmax as a function: one autograd operator on CPU and CUDA tensors."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.loss.checks import check_call
from unicom_ext.loss.labels import Labels, dense
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.options import LossKwargs, LossOptions, refuse_unknown
from unicom_ext.loss.results import Metrics, is_top1
from unicom_ext.loss.selection import Sampling, Selected, select
from unicom_ext.ops import autograd, library
from unicom_ext.ops.transforms import in_forward_mode

__all__ = ["LossKwargs", "LossOptions", "Metrics", "partial_margin_softmax"]


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
    process_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
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
    process_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
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
    process_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
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
    process_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    return_metrics: bool = False,
    **keywords: Unpack[LossKwargs],
) -> Tensor | tuple[Tensor, Metrics]:
    """Softmax cross entropy over margin cosines, on some of the classes and feature dimensions.

    Let S be the classes of `class_index` and G the dimensions of `feature_index`, x_i and w_j the
    unit vectors of embedding i and prototype j cut to G, c_ij = x_i . w_j and s the scale::

        loss_i = log(sum over j in S of exp z_ij) - z_iy
        z_ij = s * c_ij  for j != y_i,    z_iy = s * psi(c_iy)  with psi the margin

    This is the loss of UNICOM (arXiv:2304.05884); with all dimensions that of PartialFC
    (arXiv:2203.15565); with all classes too that of ArcFace (arXiv:1801.07698). A sample may have
    several positives y; then `multi_label` says what its loss is. The B x ``|S|`` logits are
    never stored: memory is that of the packed prototypes (``|S| * |G|`` values) and a bounded
    workspace.

    Args:
        embeddings: [B, d], float32, bfloat16, float16 or float64; any strides. B may be 0.
        labels: int32 or int64, class ids in [0, C) or `ignore_index`: [B], or for several positives
            of each sample [B, P], rows filled up with `ignore_index`, or a pair (ids, offsets) in
            which sample i has ``ids[offsets[i]:offsets[i + 1]]``. A class that stands twice in a
            row counts once; a sample without a label that counts has no loss.
        prototypes: [C, d], floating point as above; with `num_centers` K > 1 [C * K, d], the K of a
            class beside each other. If either matrix is float64 all arithmetic is done in float64.
        margin: psi, such as ``ArcFace(0.3)`` (radians); m2 and m3 may be per-sample tensors [B]
            (or [B, P] like labels), which get a gradient where they require one.
        scale: s > 0, the inverse temperature: a number, or a tensor of one floating value, which
            gets a gradient where it requires one. The host reads it, so on CUDA it waits.
        class_index: int64, sorted unique class ids that contain every label, or None for all.
        feature_index: int64, sorted unique dimensions, at least one, or None for all.
        process_group: share the classes with the other ranks of this group, see below.
        num_classes: with a process group C, the classes of all ranks.
        return_metrics: also return the `Metrics` of each sample, which cost nothing.
        keywords: the other options of the loss, such as `interclass_filter`, `precision` and
            `reduction`; `LossOptions`, beside this function, describes them all.

    Returns:
        The loss, float64 if an input is, else float32; a scalar, or [B] for ``reduction="none"``
        (0 where ignored). With `return_metrics` a pair of it and `Metrics` (without gradient).
        Gradients have the dtype of their input.

    Corners: a zero row has unit vector 0 and gradient 0. Without another class in S, and when every
    label is ignored, loss and gradients are 0. Results do not depend on the number of threads.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was given and what
            is allowed. For a label it names the first bad value and its position. With a process
            group every rank raises, the others a RuntimeError that names the rank. On CUDA without
            `uneven_batches` it cannot be known at once that another rank has failed: there the
            step ends on every rank, with a loss of NaN and gradients of zero, and every rank raises
            when it calls the loss again or saves a checkpoint. (The arguments must tell how many
            samples there should have been: a rank where neither embeddings nor labels are tensors
            raises alone.)

    With a process group every rank calls this with a batch of its own, and the loss and its
    gradients are those of one process with the batches of all ranks: the mean (or sum) over all of
    them, the same number on every rank, or with ``"none"`` the loss of the rank's own samples.
    `prototypes` are the rank's own, the classes in ``sharding.class_range(C, world_size, rank)``;
    `class_index` its own sampled ids, which are global like the labels; `feature_index` is the same
    on every rank. In backward the upstream gradient of a mean or sum must be the same on every
    rank; with ``"none"`` what is derived is the sum over all ranks' samples of upstream times loss.
    All ranks must run backward. `Metrics.largest_negative` and `top1` cost one more message: they
    are there with `return_metrics`.
    """
    refuse_unknown("partial_margin_softmax", keywords)
    if process_group is not None:
        from unicom_ext.loss.sharded import step as sharded

        loss, metrics = sharded.partial_margin_softmax(
            embeddings,
            labels,
            prototypes,
            {"margin": margin, "scale": scale, **keywords},
            class_index,
            feature_index,
            process_group=process_group,
            num_classes=num_classes,
            want_metrics=return_metrics,
        )
    else:
        options = LossOptions(margin, scale, **keywords)
        labels = dense(labels, options.ignore_index)
        check_call(embeddings, labels, prototypes, options, class_index, feature_index)
        selected = select(
            labels,
            Sampling.nothing(len(prototypes) // options.num_centers, prototypes.shape[1]),
            options.ignore_index,
            class_index=class_index,
            feature_index=feature_index,
        )
        loss, metrics = call_loss(embeddings, prototypes, selected, options)
    return (loss, metrics) if return_metrics else loss


def call_loss(
    embeddings: Tensor, prototypes: Tensor, selected: Selected, options: LossOptions
) -> tuple[Tensor, Metrics]:
    """The operator in one process, its tensors already checked."""
    grad_enabled = torch.is_grad_enabled()
    wants_embeddings = grad_enabled and (embeddings.requires_grad or options.learns_scale)
    wants_pass = wants_embeddings or (grad_enabled and prototypes.requires_grad)
    wants_grad = wants_pass or (grad_enabled and options.margin.requires_grad)
    slot, *of_classes = selected
    loss, sample_loss, target_cosine, largest_negative, *_ = library.run(
        autograd.loss if wants_grad or in_forward_mode() else library.ops.loss,
        embeddings,
        slot,
        prototypes,
        *of_classes,
        *options.of_each(slot),
        options.scale_on(prototypes.device),
        *options.packed(prototypes.device, wants_pass, wants_embeddings),
    )
    top1 = is_top1(slot >= 0, target_cosine, largest_negative)
    return loss, Metrics(sample_loss, target_cosine, largest_negative, top1)
