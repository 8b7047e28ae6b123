"""The loss on several ranks, as `unicom_ext.loss` and `unicom_ext.functional` call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import failures_of
from unicom_ext.distributed.shard import ClassShard
from unicom_ext.loss.checks import check_call
from unicom_ext.loss.labels import Labels, dense, width_of
from unicom_ext.loss.options import LossOptions
from unicom_ext.loss.results import Metrics
from unicom_ext.loss.selection import Sampling, Selected
from unicom_ext.loss.sharded.batch import exchange_sizes, stand_in
from unicom_ext.loss.sharded.call import Call, Flags, Sizes, took_part
from unicom_ext.loss.sharded.operators import loss as sharded_loss


def call_loss(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    options: LossOptions,
    *,
    check: Callable[[], Tensor | None],
    sampling: Sampling | None = None,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    want_metrics: bool,
) -> tuple[Tensor, Metrics, Selected]:
    """The loss of the batches of all ranks, which all call this together.

    Args:
        embeddings: [b, d], of this rank.
        labels: [b] or [b, p] of this rank.
        prototypes: [(stop - start) * K, d] of this rank.
        check: looks at this rank's arguments and raises if they are wrong; then all ranks raise.
            Returns the step to draw selections for, or None.
        sampling: what is drawn for the step; None for nothing.
        class_index: int64, sorted global ids of the classes of this rank that take part.
        feature_index: int64, sorted dimensions.

    Returns:
        The loss (for ``reduction="none"`` of this rank's samples), the metrics of this rank's
        samples, and what took part.
    """
    uneven_batches = options.uneven_batches
    if uneven_batches is None:
        uneven_batches = prototypes.device.type == "cpu"
    if not torch.compiler.is_compiling():
        shard.check_alive()
    if sampling is None:
        sampling = Sampling.nothing(shard.num_classes, prototypes.shape[1])
    if uneven_batches:
        step, size, width, grad_embeddings = exchange_sizes(
            shard, embeddings, labels, prototypes.device, options, sampling, want_metrics, check
        )
    elif torch.compiler.is_compiling():  # all ranks find the same
        step = check()
        size, grad_embeddings = len(embeddings), embeddings.requires_grad
        width = width_of(labels)
    else:
        step = None
        try:
            step, grad_embeddings = check(), embeddings.requires_grad
        except Exception as error:
            found = stand_in(embeddings, labels, prototypes, options)
            if found is None:
                raise
            failures = failures_of(shard.group)
            failures.raise_earlier()
            failures.keep(error, prototypes.device)
            embeddings, labels, options, grad_embeddings = found
        size, width = len(embeddings), width_of(labels)

    if sampling.nested and sampling.draws_features and step is not None:
        # Before the operator, whose shapes must not depend on what is drawn.
        feature_index = sampling.draw_features(step)
    grad_enabled = torch.is_grad_enabled()
    grad_embeddings = grad_enabled and grad_embeddings
    wants_embeddings = grad_embeddings or (grad_enabled and options.learns_scale)
    wants_grad = wants_embeddings or (grad_enabled and prototypes.requires_grad)
    call = Call.of(
        shard.group_name,
        Sizes(size, width, options.ignore_index, *sampling),
        *options.packed(prototypes.device, wants_grad, wants_embeddings),
        Flags(
            want_metrics,
            grad_embeddings,
            options.grad_average,
            grad_enabled and options.learns_scale,
        ),
    )
    results = sharded_loss(
        embeddings,
        labels,
        prototypes,
        step,
        class_index,
        feature_index,
        *options.of_each(labels),
        options.scale_on(prototypes.device),
        *call,
    )
    metrics = Metrics(
        results.sample_loss.detach(),
        results.target_cosine.detach(),
        results.largest_negative.detach() if want_metrics else None,  # type: ignore[arg-type]
        results.top1 if want_metrics else None,  # type: ignore[arg-type]
    )
    selected = took_part(call, class_index, feature_index, results)
    return results.loss, metrics, selected


def partial_margin_softmax(
    embeddings: Tensor,
    labels: Labels,
    prototypes: Tensor,
    given: Mapping[str, Any],
    class_index: Tensor | None,
    feature_index: Tensor | None,
    *,
    process_group: dist.ProcessGroup,
    num_classes: Any,
    want_metrics: bool,
) -> tuple[Tensor, Metrics]:
    """`unicom_ext.functional.partial_margin_softmax` with a process group.

    given, num_classes: the options and the number of classes of all ranks, which may be bad.
    """
    options, failure = LossOptions.for_ranks(given)
    targets: Any = labels  # a tensor, unless a pair of tensors is bad
    try:
        targets = dense(labels, options.ignore_index)
    except (TypeError, ValueError) as error:
        failure = failure or error
    is_number = isinstance(num_classes, int) and not isinstance(num_classes, bool)
    total = num_classes if is_number and num_classes >= 1 else None
    shard = ClassShard(process_group, total or 1)

    def check() -> None:
        if total is None:
            raise ValueError(
                "num_classes must be the number of classes of all ranks, an int >= 1, with a "
                f"process_group; got {num_classes!r}"
            )
        if failure is not None:
            raise failure
        check_call(
            embeddings,
            targets,
            prototypes,
            options,
            class_index,
            feature_index,
            num_classes=total,
        )
        rows = len(shard) * options.num_centers
        if len(prototypes) != rows:
            raise ValueError(
                f"prototypes must be [{rows}, d] on rank {shard.rank} of {shard.world_size}, "
                f"the classes from {shard.start} to {shard.stop} of {num_classes}, "
                f"got {list(prototypes.shape)}"
            )

    loss, metrics, _ = call_loss(
        shard,
        embeddings,
        targets,
        prototypes,
        options,
        check=check,
        class_index=class_index,
        feature_index=feature_index,
        want_metrics=want_metrics,
    )
    return loss, metrics
