"""A step on several ranks as two operators, forward and backward, messages included.

They are opaque to `torch.compile`, so a graph may hold the whole step.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from unicom_ext import _core
from unicom_ext.distributed.failures import failures_of
from unicom_ext.distributed.shard import ClassShard
from unicom_ext.loss.functional import _REDUCTION
from unicom_ext.loss.sharded.batch import gather_batch
from unicom_ext.ops import library as devices
from unicom_ext.ops.row_sparse import row_sparse

_ops = torch.ops.unicom_ext
_IGNORED = -1  # kIgnoredSlot in csrc/core/sampler.h


# ---- the forward operator ----


class Options(NamedTuple):
    """What the operators take beside tensors, checked and resolved."""

    group_name: str
    size: int  # samples of the largest batch of a rank
    num_classes: int
    num_sampled: int  # classes to draw, of all ranks; num_classes for none
    num_features: int  # dimensions to draw; d for none
    seed: int
    ignore_index: int
    m1: float
    m2: float  # where the margin is not per sample
    m3: float
    scale: float
    filter: float  # inf: none
    exact_margin_grad: bool
    linear_beyond_pi: bool
    precision: int
    reduction: int
    workspace_bytes: int
    want_metrics: bool
    grad_embeddings: bool  # some rank needs the gradient of its embeddings
    grad_average: bool
    sparse_grad: bool


class Selected(NamedTuple):
    """This rank's sampled classes, and the dimensions."""

    class_index: Tensor | None  # [bound] rows of this rank's prototypes; None for all
    count: Tensor | None  # how many of them are valid; None for all
    feature_index: Tensor | None  # [d']; None for all


class Results(NamedTuple):
    """What forward returns; tensors that are not there are empty."""

    loss: Tensor  # a scalar, or [b]
    sample_loss: Tensor  # [b], of this rank's samples, as the next three
    target_cosine: Tensor
    largest_negative: Tensor
    top1: Tensor
    class_index: Tensor  # [bound] rows of this rank's prototypes
    count: Tensor
    feature_index: Tensor  # [d']
    slot: Tensor  # [B] each label's position in class_index; -1 ignored, -2 elsewhere
    x: Tensor  # [B, d] all embeddings; half precision is summed over ranks in float32
    state: Tensor  # [B, 6]
    packed: Tensor  # of the sampled prototypes; empty where there are none
    kept: Tensor


# Operators take them as a list of each type: torch looks at every argument of a Python operator at
# a cost that grows with the square of their number.
_TYPES = tuple(get_type_hints(Options).values())
_LISTED = "str group_name, SymInt[] ints, float[] floats, bool[] bools"


def as_lists(options: Options) -> tuple[str, list[int], list[float], list[bool]]:
    def of(kind: type) -> list:
        return [value for value, its in zip(options, _TYPES, strict=True) if its is kind]

    return options.group_name, of(int), of(float), of(bool)


def from_lists(group_name: str, ints: list[int], floats: list[float], bools: list[bool]) -> Options:
    values = {str: iter([group_name]), int: iter(ints), float: iter(floats), bool: iter(bools)}
    return Options(*(next(values[its]) for its in _TYPES))


def _of_loss(options: Options) -> tuple[list[float], list[int]]:
    """What the compiled operators take of them (csrc/bind/ops/options.h)."""
    o = options
    return (
        [o.m1, o.m2, o.m3, o.scale, o.filter],
        [
            o.exact_margin_grad,
            o.linear_beyond_pi,
            o.precision,
            o.reduction,
            o.workspace_bytes,
            o.sparse_grad,
        ],
    )


_FORWARD = (
    "(Tensor embeddings, Tensor labels, Tensor prototypes, Tensor? step, Tensor? class_index, "
    f"Tensor? feature_index, Tensor? m2_each, Tensor? m3_each, {_LISTED}) -> "
    f"({', '.join(['Tensor'] * len(Results._fields))})"
)


@torch.library.custom_op("unicom_ext::sharded_loss", mutates_args=(), schema=_FORWARD)
def forward(embeddings, labels, prototypes, step, class_index, feature_index, m2, m3, *options):
    options = from_lists(*options)
    shard = ClassShard.named(options.group_name, options.num_classes)
    failures = failures_of(shard.group)
    failures.raise_earlier()
    batch = gather_batch(shard, embeddings, labels, m2, m3, options.size, options.ignore_index)
    total = _total_sampled(options, len(batch.labels))
    selected = sums = None
    with failures.kept(prototypes.device):
        if failures.own is None:
            selected = _select(
                shard, batch.labels, prototypes, step, class_index, feature_index, options
            )
    batch.arrival.wait()
    x = _in_float(batch.embeddings)
    with failures.kept(prototypes.device):
        if selected is not None:
            sums = devices.run(
                _ops.loss_sums,
                x,
                selected.slot,
                prototypes,
                *selected[1:],
                total,
                *_of_loss(options),
            )
    if sums is None:
        selected, sums = _nothing(batch.labels, x)
    pairs, exponent, largest_negative, inverse_norm, packed, kept = sums

    if _core.constant_exponent(options.scale, total) is None:
        # Beyond the range of a constant shift, sums have exponents of their own.
        common = shard.max(exponent.clone())
        pairs[:, 0] *= torch.exp2(exponent - common).nan_to_num(0.0)  # no classes: -inf - -inf
        exponent = common
    # One row more says how many ranks have failed.
    flag = pairs.new_full((1, 2), float(failures.own is not None))
    pairs = shard.sum(torch.cat([pairs, flag]))
    pairs, failed = pairs[:-1], pairs[-1, 0]
    failures.settle(failed)
    slot = selected.slot.masked_fill(failed > 0, _IGNORED)  # for then there are no gradients

    sample_loss, state = _ops.loss_merge(
        pairs,
        exponent,
        inverse_norm,
        slot,
        batch.m2,
        batch.m3,
        *_of_loss(options),
    )
    first = shard.rank * options.size
    own = slice(first, first + len(embeddings))
    if options.reduction == _REDUCTION["none"]:
        loss = sample_loss[own]
    else:
        loss = sample_loss.sum()
        if options.reduction == _REDUCTION["mean"]:
            loss = loss / (slot != _IGNORED).sum().clamp(min=1)
    real = _real(x, prototypes)
    target_cosine = pairs[own, 1].to(real)
    if options.want_metrics:
        largest_negative = shard.max(largest_negative.to(real))[own].clone()
        top1 = (slot[own] != _IGNORED) & (target_cosine >= largest_negative)
    else:
        largest_negative, top1 = target_cosine.new_empty(0), slot.new_empty(0, dtype=torch.bool)
    _, class_index, count, feature_index = selected
    return Results(
        loss=loss.masked_fill(failed > 0, math.nan).to(real),
        sample_loss=sample_loss[own].to(real, copy=True),
        target_cosine=target_cosine,
        largest_negative=largest_negative,
        top1=top1,
        class_index=slot.new_empty(0) if class_index is None else class_index,
        count=slot.new_zeros(()) if count is None else count,
        feature_index=slot.new_empty(0) if feature_index is None else feature_index.clone(),
        slot=slot,
        x=x,
        state=state,
        packed=packed,
        kept=kept,
    )


class _Selection(NamedTuple):
    slot: Tensor  # [B]
    class_index: Tensor | None
    count: Tensor | None
    feature_index: Tensor | None


def _select(
    shard: ClassShard,
    labels: Tensor,
    prototypes: Tensor,
    step: Tensor | None,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    options: Options,
) -> _Selection:
    """This rank's classes that take part, as rows of its prototypes.  labels: of all ranks."""
    count = None
    try:
        if options.num_sampled < options.num_classes:
            class_index, count, slot = _ops.select_classes(
                labels,
                step,
                options.num_classes,
                options.num_sampled,
                options.seed,
                options.ignore_index,
                shard.start,
                shard.stop,
            )
        else:
            slot = _ops.label_slots(
                labels,
                class_index,
                options.num_classes,
                options.ignore_index,
                shard.start,
                shard.stop,
            )
    except ValueError as error:
        error.add_note("(positions count through the batches of all ranks, in rank order)")
        raise
    if class_index is not None:
        # What fills the list up behind the count need not lie in this shard.
        class_index = (class_index - shard.start).clamp_(min=0)
    if options.num_features < prototypes.shape[1]:
        feature_index = _ops.select_features(
            step, prototypes.shape[1], options.num_features, options.seed
        )
    return _Selection(slot, class_index, count, feature_index)


def _nothing(labels: Tensor, x: Tensor) -> tuple[_Selection, tuple[Tensor, ...]]:
    """What a rank that has failed contributes."""
    slot = torch.full_like(labels, _IGNORED)
    selected = _Selection(slot, slot.new_empty(0), slot.new_zeros(()), slot.new_empty(0))
    pairs = torch.zeros((len(labels), 2), dtype=torch.float64, device=x.device)
    exponent = pairs.new_full((len(labels),), -math.inf)
    saved = x.new_empty(0, dtype=torch.uint8)
    sums = pairs, exponent, exponent, pairs.new_zeros(len(labels)), saved, saved.clone()
    return selected, sums


def _total_sampled(options: Options, samples: int) -> int:
    """At least as many as the sampled classes of all ranks."""
    total = options.num_sampled + samples
    return options.num_classes if total > options.num_classes else total


def _in_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _real(x: Tensor, prototypes: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, prototypes.dtype), torch.float32)


@forward.register_fake
def _(embeddings, labels, prototypes, step, class_index, feature_index, m2, m3, *options):
    options = from_lists(*options)
    shard = ClassShard.named(options.group_name, options.num_classes)
    batch, samples = len(embeddings), shard.world_size * options.size
    selected = _select(
        shard,
        labels.new_empty(samples, dtype=torch.int64),
        prototypes,
        step,
        class_index,
        feature_index,
        options,
    )
    x = _in_float(embeddings.new_empty(samples, embeddings.shape[1]))
    pairs, *_, packed, kept = _ops.loss_sums(
        x,
        selected.slot,
        prototypes,
        *selected[1:],
        _total_sampled(options, samples),
        *_of_loss(options),
    )
    real, none = _real(x, prototypes), options.reduction == _REDUCTION["none"]
    each = x.new_empty(batch, dtype=real)
    with_metrics = batch if options.want_metrics else 0
    indices = [selected.slot.new_empty(0) if i is None else i for i in selected[1:]]
    if selected.count is None:
        indices[1] = selected.slot.new_empty(())
    return Results(
        each.clone() if none else x.new_empty((), dtype=real),
        each,
        each.clone(),
        x.new_empty(with_metrics, dtype=real),
        x.new_empty(with_metrics, dtype=torch.bool),
        *indices,
        selected.slot,
        x,
        pairs.new_empty(samples, 6),
        packed,
        kept,
    )


# ---- the backward operator ----

_BACKWARD = (
    "(Tensor grad_loss, Tensor x, Tensor slot, Tensor prototypes, Tensor? class_index, "
    "Tensor? count, Tensor? feature_index, Tensor state, Tensor packed, Tensor kept, "
    f"SymInt batch, bool grad_prototypes, {_LISTED}) -> (Tensor, Tensor)"
)


@torch.library.custom_op("unicom_ext::sharded_loss_backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    grad_loss, x, slot, prototypes, class_index, count, feature_index, state, packed, kept,
    batch, grad_prototypes, *options,
):  # fmt: skip
    options = from_lists(*options)
    shard = ClassShard.named(options.group_name, options.num_classes)
    if options.reduction == _REDUCTION["none"]:
        padding = grad_loss.new_zeros(options.size - batch)
        grad_loss = shard.gather(torch.cat([grad_loss, padding]))
    compact = options.sparse_grad and class_index is not None
    if len(packed) > 0:
        to_embeddings, to_prototypes = devices.run(
            _ops.loss_backward,
            grad_loss.contiguous(),
            x,
            slot,
            prototypes,
            class_index,
            count,
            feature_index,
            state,
            packed,
            kept,
            *_of_loss(options),
            options.grad_embeddings,
            grad_prototypes,
            compact,
        )
    else:  # no classes, or this rank has failed
        rows = class_index if compact else prototypes
        to_embeddings = torch.zeros_like(x)
        to_prototypes = prototypes.new_zeros(len(rows) * grad_prototypes, x.shape[1])
    if options.grad_embeddings:
        to_embeddings = shard.sum_scatter(to_embeddings)[:batch]
        if options.grad_average:
            to_embeddings *= shard.world_size
    return to_embeddings, to_prototypes


@_backward.register_fake
def _(grad_loss, x, slot, prototypes, class_index, count, feature_index, state, packed, kept,
      batch, grad_prototypes, *options):  # fmt: skip
    options = from_lists(*options)
    rows = class_index if options.sparse_grad and class_index is not None else prototypes
    return (
        x.new_empty((batch, x.shape[1]) if options.grad_embeddings else (0, 0)),
        prototypes.new_empty((len(rows), x.shape[1]) if grad_prototypes else (0, 0)),
    )


def _setup_context(ctx, inputs, output) -> None:
    embeddings, _, prototypes, _, class_index, feature_index, *rest = inputs
    ctx.options = from_lists(*rest[2:])
    results = Results(*output)
    ctx.save_for_backward(
        results.x,
        results.slot,
        prototypes,
        *took_part(ctx.options, class_index, feature_index, prototypes, results),
        results.state,
        results.packed,
        results.kept,
    )
    ctx.batch, ctx.dtype = len(embeddings), embeddings.dtype
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_loss, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each reading
    _, _, prototypes, class_index, count, *_ = saved
    options = ctx.options
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    to_embeddings, to_prototypes = _backward(
        grad_loss, *saved, ctx.batch, ctx.needs_input_grad[2], *as_lists(options)
    )
    if ctx.needs_input_grad[0]:
        grads[0] = to_embeddings.to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        if options.sparse_grad:
            to_prototypes = row_sparse(to_prototypes, class_index, count, prototypes.shape)
        grads[2] = to_prototypes
    return tuple(grads)


torch.library.register_autograd(
    "unicom_ext::sharded_loss", _differentiate, setup_context=_setup_context
)


def took_part(
    options: Options,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    prototypes: Tensor,
    results: Results,
) -> Selected:
    """What took part.  class_index, feature_index: what forward was given."""
    drawn = options.num_sampled < options.num_classes
    some = options.num_features < prototypes.shape[1] or feature_index is not None
    return Selected(
        results.class_index if drawn or class_index is not None else None,
        results.count if drawn else None,
        results.feature_index if some else None,
    )
