"""The loss on several ranks, as `unicom_ext.loss` and `unicom_ext.functional` call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import failures_of
from unicom_ext.distributed.shard import ClassShard
from unicom_ext.loss.functional import _PRECISION, _REDUCTION, _resolve_precision
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.reference import Metrics
from unicom_ext.loss.sharded.batch import exchange_sizes, stand_in
from unicom_ext.loss.sharded.operators import (
    Options,
    Results,
    Selected,
    as_lists,
    forward,
    took_part,
)


def call_loss(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    check: Callable[[], Tensor | None],
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    num_sampled: int | None = None,
    num_features: int | None = None,
    seed: int = 0,
    margin: CombinedMargin,
    scale: float,
    interclass_filter: float | None,
    margin_grad: str,
    beyond_pi: str,
    precision: str,
    sparse_grad: bool,
    reduction: str,
    ignore_index: int,
    grad_average: bool,
    uneven_batches: bool | None,
    workspace_bytes: int,
    want_metrics: bool,
) -> tuple[Tensor, Metrics, Selected]:
    """The loss of the batches of all ranks, which all call this together.

    embeddings: [b, d], labels: [b] of this rank.  prototypes: [stop - start, d] of this rank.
    check: looks at this rank's arguments and raises if they are wrong; then all ranks raise.
        Returns the step to draw selections for, or None.
    class_index: int64, sorted global ids of the classes of this rank that take part.
    feature_index: int64, sorted dimensions.
    num_sampled, num_features: or how many classes (of all ranks) and dimensions are drawn for the
        step and `seed`. None: all.
    The other options are those of `unicom_ext.functional.partial_margin_softmax`.

    Returns the loss (for ``reduction="none"`` of this rank's samples), the metrics of this rank's
    samples, and what took part.
    """
    if uneven_batches is None:
        uneven_batches = prototypes.device.type == "cpu"
    if not torch.compiler.is_compiling():
        shard.check_alive()
    if uneven_batches:
        step, size, grad_embeddings = exchange_sizes(
            shard, embeddings, labels, margin, prototypes.device, ignore_index, check
        )
    elif torch.compiler.is_compiling():  # all ranks find the same
        step = check()
        size, grad_embeddings = len(embeddings), embeddings.requires_grad
    else:
        step = None
        try:
            step, grad_embeddings = check(), embeddings.requires_grad
        except Exception as error:
            found = stand_in(embeddings, labels, margin, prototypes, ignore_index)
            if found is None:
                raise
            failures = failures_of(shard.group)
            failures.raise_earlier()
            failures.keep(error, prototypes.device)
            embeddings, labels, margin, grad_embeddings = found
        size = len(embeddings)

    grad_enabled = torch.is_grad_enabled()
    grad_embeddings = grad_enabled and grad_embeddings
    wants_grad = grad_embeddings or (grad_enabled and prototypes.requires_grad)
    m2, m3 = (m.detach() if isinstance(m, Tensor) else None for m in (margin.m2, margin.m3))
    options = Options(
        group_name=shard.group_name,
        size=size,
        num_classes=shard.num_classes,
        num_sampled=shard.num_classes if num_sampled is None else num_sampled,
        num_features=prototypes.shape[1] if num_features is None else num_features,
        seed=seed,
        ignore_index=ignore_index,
        m1=float(margin.m1),
        m2=0.0 if m2 is not None else float(margin.m2),
        m3=0.0 if m3 is not None else float(margin.m3),
        scale=float(scale),
        filter=math.inf if interclass_filter is None else float(interclass_filter),
        exact_margin_grad=margin_grad == "exact",
        linear_beyond_pi=beyond_pi == "linear",
        precision=_PRECISION[_resolve_precision(precision, prototypes.device.type)],
        reduction=_REDUCTION[reduction],
        workspace_bytes=workspace_bytes if wants_grad else 0,
        want_metrics=want_metrics,
        grad_embeddings=grad_embeddings,
        grad_average=grad_average,
        sparse_grad=sparse_grad,
    )
    results = Results(
        *forward(
            embeddings,
            labels,
            prototypes,
            step,
            class_index,
            feature_index,
            m2,
            m3,
            *as_lists(options),
        )
    )
    metrics = Metrics(
        results.sample_loss.detach(),
        results.target_cosine.detach(),
        results.largest_negative.detach() if want_metrics else None,
        results.top1 if want_metrics else None,
    )
    selected = took_part(options, class_index, feature_index, prototypes, results)
    return results.loss, metrics, selected


def partial_margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    *,
    process_group: dist.ProcessGroup,
    num_classes: int | None,
    check: Callable[[], None],
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """`unicom_ext.functional.partial_margin_softmax` with a process group."""
    good = isinstance(num_classes, int) and not isinstance(num_classes, bool) and num_classes >= 1
    shard = ClassShard(process_group, num_classes if good else 1)

    def check_all() -> None:
        if not good:
            raise ValueError(
                "num_classes must be the number of classes of all ranks, an int >= 1, with a "
                f"process_group; got {num_classes!r}"
            )
        check()
        if len(prototypes) != len(shard):
            raise ValueError(
                f"prototypes must be [{len(shard)}, d] on rank {shard.rank} of {shard.world_size}, "
                f"the classes from {shard.start} to {shard.stop} of {num_classes}, "
                f"got {list(prototypes.shape)}"
            )

    loss, metrics, _ = call_loss(
        shard,
        embeddings,
        labels,
        prototypes,
        check=check_all,
        class_index=class_index,
        feature_index=feature_index,
        **options,
    )
    return loss, metrics
