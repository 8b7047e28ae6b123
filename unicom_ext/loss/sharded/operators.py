"""A step on several ranks as two operators, forward and backward, messages included.

They are opaque to `torch.compile`, so a graph may hold the whole step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unicom_ext.distributed.failures import failures_of
from unicom_ext.distributed.shard import ClassShard
from unicom_ext.loss.labels import width_of
from unicom_ext.loss.results import is_top1
from unicom_ext.loss.selection import Selected, select
from unicom_ext.loss.sharded.batch import gather_batch
from unicom_ext.loss.sharded.call import SCHEMA, Call, Results, took_part
from unicom_ext.ops import library
from unicom_ext.ops.autograd import once
from unicom_ext.ops.codes import REDUCTION
from unicom_ext.ops.option_gradients import (
    MARGINS,
    SCALE,
    counted,
    learned_margins,
    margin_gradients,
    scale_gradient,
)
from unicom_ext.ops.row_sparse import row_sparse
from unicom_ext.ops.shapes import state_size, sums_size
from unicom_ext.ops.transforms import in_forward_mode, transformable, transforming

_MANY = 1 << 20
_ODD = 7919  # so that multiples of it fill all that is below _MANY
_OPTIMIZER_STEPS = (
    "the number of steps that optimizers have made with the prototypes (where gradients overflow "
    "on one rank, GradScaler lets it leave out a step alone; ShardedGradScaler with an optimizer "
    "that is not fused does not)"
)
_IGNORED = -1  # kIgnoredSlot in csrc/core/sampler.h


# ---- the forward operator ----

_FORWARD = (
    "(Tensor embeddings, Tensor labels, Tensor prototypes, Tensor? step, Tensor? class_index, "
    f"Tensor? feature_index, Tensor? m2_each, Tensor? m3_each, Tensor? scale, {SCHEMA}) -> "
    f"({', '.join(['Tensor'] * len(Results._fields))})"
)


@torch.library.custom_op("unicom_ext::sharded_loss", mutates_args=(), schema=_FORWARD)
def forward(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    step: Tensor | None,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    scale: Tensor | None,
    *lists: Any,
) -> Results:
    call = Call.of(*lists)
    sizes, codes = call.sizes, call.codes
    shard = ClassShard.named(call.group_name, sizes.num_classes)
    failures = failures_of(shard.group)
    failures.raise_earlier()
    batch = gather_batch(
        shard, embeddings, labels, m2, m3, sizes.batch, sizes.width, sizes.ignore_index
    )
    total = sizes.most_sampled(batch.labels.numel())
    selected = sums = None  # of a rank that has failed
    with failures.kept(prototypes.device):
        if failures.own is None:
            selected = _select(shard, batch.labels, step, class_index, feature_index, call)
    batch.arrival.wait()
    x = _in_float(batch.embeddings)
    with failures.kept(prototypes.device):
        if selected is not None:
            sums = library.run(
                library.ops.loss_sums,
                x,
                selected.slot,
                prototypes,
                *selected[1:],
                total,
                call.reals,
                call.codes,
            )
    if selected is None or sums is None:
        selected, sums = _nothing(batch.labels, x)
    rows, exponent, largest_negative, inverse_norm, packed, kept = sums

    if library.engine.constant_exponent(call.reals.scale, total) is None:
        # Beyond the range of a constant shift, sums have exponents of their own.
        common = shard.max(exponent.clone())
        rows[:, 0] *= torch.exp2(exponent - common).nan_to_num(0.0)  # no classes: -inf - -inf
        exponent = common
    # Some rows more say how many ranks have failed, and whether all are of one mind.
    step = None if step is None else step.clone()  # which will have gone on when it is told
    steps = failures.optimizer_steps
    words = _words(call, step, steps, rows)
    flag = torch.full_like(words[:1], float(failures.own is not None))
    rows = shard.sum(torch.cat([rows, flag, words]))
    rows, flag, summed = rows.split([len(rows) - 3, 1, 2])
    failed = flag[0, 0] + (summed != shard.world_size * words).sum()

    def settings() -> dict[str, float | None]:
        numbers = {"step": None if step is None else int(step), _OPTIMIZER_STEPS: int(steps)}
        return {**call.settings(), **numbers}

    failures.settle(failed, settings)
    slot = selected.slot.masked_fill(failed > 0, _IGNORED)  # for then there are no gradients

    sample_loss, state = library.ops.loss_merge(
        rows, exponent, inverse_norm, slot, batch.m2, batch.m3, call.reals, call.codes
    )
    first = shard.rank * sizes.batch
    own = slice(first, first + len(embeddings))
    if codes.reduction == REDUCTION["none"]:
        loss = sample_loss[own]
    else:
        loss = sample_loss.sum()
        if codes.reduction == REDUCTION["mean"]:
            loss = loss / counted(slot).sum().clamp(min=1)
    real = _real(x, prototypes)
    target_cosine = _like_labels(rows[own, 1 : 1 + width_of(slot)].to(real), labels)
    if call.flags.want_metrics:
        largest_negative = shard.max(largest_negative.to(real))[own].clone()
        counts = _like_labels((slot != _IGNORED).view(len(slot), -1)[own], labels)
        top1 = is_top1(counts, target_cosine, largest_negative)
    else:
        largest_negative, top1 = target_cosine.new_empty(0), slot.new_empty(0, dtype=torch.bool)
    _, class_index, num_valid, feature_index = selected
    return Results(
        loss=loss.masked_fill(failed > 0, math.nan).to(real),
        sample_loss=sample_loss[own].to(real, copy=True),
        target_cosine=target_cosine,
        largest_negative=largest_negative,
        top1=top1,
        class_index=slot.new_empty(0) if class_index is None else class_index,
        num_valid=slot.new_zeros(()) if num_valid is None else num_valid,
        feature_index=slot.new_empty(0) if feature_index is None else feature_index.clone(),
        slot=slot,
        x=x,
        state=state,
        packed=packed,
        kept=kept,
    )


def _select(
    shard: ClassShard,
    labels: Tensor,
    step: Tensor | None,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    call: Call,
) -> Selected:
    """This rank's classes that take part, as rows of its prototypes.  labels: of all ranks."""
    try:
        selected = select(
            labels,
            call.sizes.sampling,
            call.sizes.ignore_index,
            step=step,
            class_index=class_index,
            feature_index=feature_index,
            start=shard.start,
            stop=shard.stop,
        )
    except ValueError as error:
        error.add_note("(positions count through the batches of all ranks, in rank order)")
        raise
    if selected.class_index is None:
        return selected
    # What fills the list up behind those that are valid need not lie in this shard.
    return selected._replace(class_index=(selected.class_index - shard.start).clamp_(min=0))


def _words(call: Call, step: Tensor | None, optimizer_steps: int | Tensor, like: Tensor) -> Tensor:
    """What must be the same on every rank, float64 [2, columns of `like`]: two numbers and their
    squares, one of the call, and one of the step and of how many optimizer steps were before it.
    The sums over n ranks are n times these only where all have the same. They are below 2^20, so
    that all this is exact."""
    words = like.new_full((2,), float(hash(tuple(call.settings().values())) % _MANY))
    words[1] = ((0 if step is None else step) + _ODD * optimizer_steps) % _MANY
    return pad(torch.stack([words, words * words], dim=1), (0, like.shape[1] - 2))


def _like_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Of values [b, P] those of a rank that has labels [b] or [b, p]."""
    return values[:, 0].clone() if labels.dim() == 1 else values[:, : labels.shape[1]].clone()


def _nothing(labels: Tensor, x: Tensor) -> tuple[Selected, tuple[Tensor, ...]]:
    """What a rank that has failed contributes."""
    slot = torch.full_like(labels, _IGNORED)
    selected = Selected(slot, slot.new_empty(0), slot.new_zeros(()), slot.new_empty(0))
    batch = len(labels)
    rows = x.new_zeros(batch, sums_size(labels), dtype=torch.float64)
    exponent = rows.new_full((batch,), -math.inf)
    saved = x.new_empty(0, dtype=torch.uint8)
    sums = rows, exponent, exponent, rows.new_zeros(batch), saved, saved.clone()
    return selected, sums


def _in_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _real(x: Tensor, prototypes: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, prototypes.dtype), torch.float32)


@forward.register_fake
def _(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    step: Tensor | None,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    scale: Tensor | None,
    *lists: Any,
) -> Results:
    call = Call.of(*lists)
    shard = ClassShard.named(call.group_name, call.sizes.num_classes)
    batch, samples = len(embeddings), shard.world_size * call.sizes.batch
    shape = (samples, call.sizes.width) if call.sizes.width > 1 else (samples,)
    all_labels = labels.new_empty(shape, dtype=torch.int64)
    selected = _select(shard, all_labels, step, class_index, feature_index, call)
    x = _in_float(embeddings.new_empty(samples, embeddings.shape[1]))
    rows, *_, packed, kept = library.ops.loss_sums(
        x,
        selected.slot,
        prototypes,
        *selected[1:],
        call.sizes.most_sampled(all_labels.numel()),
        call.reals,
        call.codes,
    )
    real, none = _real(x, prototypes), call.codes.reduction == REDUCTION["none"]
    each = x.new_empty(batch, dtype=real)
    with_metrics = batch if call.flags.want_metrics else 0
    slot, class_index, num_valid, feature_index = selected
    return Results(
        loss=each.clone() if none else x.new_empty((), dtype=real),
        sample_loss=each,
        target_cosine=x.new_empty(labels.shape, dtype=real),
        largest_negative=x.new_empty(with_metrics, dtype=real),
        top1=x.new_empty(with_metrics, dtype=torch.bool),
        class_index=slot.new_empty(0) if class_index is None else class_index,
        num_valid=slot.new_empty(()) if num_valid is None else num_valid,
        feature_index=slot.new_empty(0) if feature_index is None else feature_index.clone(),
        slot=slot,
        x=x,
        state=rows.new_empty(samples, state_size(slot)),
        packed=packed,
        kept=kept,
    )


# ---- the backward operator ----

_BACKWARD = (
    "(Tensor grad_loss, Tensor x, Tensor slot, Tensor prototypes, Tensor? class_index, "
    "Tensor? num_valid, Tensor? feature_index, Tensor state, Tensor packed, Tensor kept, "
    f"SymInt batch, bool grad_prototypes, {SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("unicom_ext::sharded_loss_backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    grad_loss: Tensor,
    x: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    num_valid: Tensor | None,
    feature_index: Tensor | None,
    state: Tensor,
    packed: Tensor,
    kept: Tensor,
    batch: int,
    grad_prototypes: bool,
    *lists: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(*lists)
    codes, flags = call.codes, call.flags
    shard = ClassShard.named(call.group_name, call.sizes.num_classes)
    if codes.reduction == REDUCTION["none"]:
        padding = grad_loss.new_zeros(call.sizes.batch - batch)
        grad_loss = shard.gather(torch.cat([grad_loss, padding]))
    sampled = class_index if codes.sparse_grad else None
    if len(packed) > 0:
        to_embeddings, to_prototypes, radial = library.run(
            library.ops.loss_backward,
            grad_loss.contiguous(),
            x,
            slot,
            prototypes,
            class_index,
            num_valid,
            feature_index,
            state,
            packed,
            kept,
            call.reals,
            call.codes,
            flags.grad_embeddings,
            flags.grad_scale,
            grad_prototypes,
            sampled is not None,
        )
    else:  # no classes, or this rank has failed
        rows = len(prototypes) if sampled is None else len(sampled) * codes.num_centers
        to_embeddings = torch.zeros_like(x)
        to_prototypes = prototypes.new_zeros(rows * grad_prototypes, x.shape[1])
        radial = state.new_zeros(len(x) * flags.grad_scale)
    if flags.grad_embeddings:
        to_embeddings = shard.sum_scatter(to_embeddings)[:batch]
        if flags.grad_average:
            to_embeddings *= shard.world_size
    if flags.grad_scale:
        radial = shard.sum_scatter(radial)[:batch]
    return to_embeddings, to_prototypes, radial


@_backward.register_fake
def _(
    grad_loss: Tensor,
    x: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    num_valid: Tensor | None,
    feature_index: Tensor | None,
    state: Tensor,
    packed: Tensor,
    kept: Tensor,
    batch: int,
    grad_prototypes: bool,
    *lists: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(*lists)
    rows = len(prototypes)
    if call.codes.sparse_grad and class_index is not None:
        rows = len(class_index) * call.codes.num_centers
    return (
        x.new_empty((batch, x.shape[1]) if call.flags.grad_embeddings else (0, 0)),
        prototypes.new_empty((rows, x.shape[1]) if grad_prototypes else (0, 0)),
        state.new_empty(batch if call.flags.grad_scale else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, prototypes, _, class_index, feature_index, m2, m3, _, *lists = inputs
    ctx.call = Call.of(*lists)
    results = Results(*output)
    slot, *of_classes = took_part(ctx.call, class_index, feature_index, results)
    ctx.save_for_backward(
        results.x,
        slot,
        prototypes,
        *of_classes,
        results.state,
        results.packed,
        results.kept,
        *learned_margins(ctx.needs_input_grad, m2, m3),
    )
    ctx.batch, ctx.dtype = len(embeddings), embeddings.dtype
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    # Once: activation checkpointing recomputes at each reading.
    *saved, m2, m3 = ctx.saved_tensors
    _x, slot, prototypes, class_index, num_valid, _features, state, *_rest = saved
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    if m2 is not None or m3 is not None:
        operands = (grad_loss, slot, state, m2, m3)
        grads[MARGINS] = once(_margin_gradients, ctx.call, ctx.batch, *operands)
        flags = ctx.call.flags
        if not (flags.grad_embeddings or flags.grad_scale or ctx.needs_input_grad[2]):
            return tuple(grads)  # no rank has anything else to derive
    to_embeddings, to_prototypes, radial = once(
        _backward, grad_loss, *saved, ctx.batch, ctx.needs_input_grad[2], *ctx.call
    )
    if ctx.needs_input_grad[0]:
        grads[0] = to_embeddings.to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        if ctx.call.codes.sparse_grad:
            centers = ctx.call.codes.num_centers
            to_prototypes = row_sparse(
                to_prototypes, class_index, num_valid, prototypes.shape, centers
            )
        grads[2] = to_prototypes
    if ctx.needs_input_grad[SCALE]:
        grads[SCALE] = once(_scale_gradient, ctx.call, ctx.batch, grad_loss, slot, state, radial)
    return tuple(grads)


def _margin_gradients(
    call: Call,
    batch: int,
    grad_loss: Tensor,
    slot: Tensor,
    state: Tensor,
    m2: Tensor | None,
    m3: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of this rank's samples, which needs no message."""
    grad_loss, own = _own_part(call, batch, grad_loss)
    return margin_gradients(grad_loss, slot, state, m2, m3, call.reals, call.codes, own)


def _scale_gradient(
    call: Call, batch: int, grad_loss: Tensor, slot: Tensor, state: Tensor, radial: Tensor
) -> Tensor:
    """Of this rank's samples; what trains the scale adds up the ranks'."""
    grad_loss, own = _own_part(call, batch, grad_loss)
    return scale_gradient(grad_loss, slot, state, radial, call.codes, own)


def _own_part(call: Call, batch: int, grad_loss: Tensor) -> tuple[Tensor, slice]:
    """What this rank's samples are among all, and the upstream gradient of what made their options,
    which may be wrapped as what made the embeddings is."""
    shard = ClassShard.named(call.group_name, call.sizes.num_classes)
    if call.flags.grad_average:
        grad_loss = grad_loss * shard.world_size
    first = shard.rank * call.sizes.batch
    return grad_loss, slice(first, first + batch)


torch.library.register_autograd(
    "unicom_ext::sharded_loss", _differentiate, setup_context=_setup_context
)
_transformed = transformable(forward, _setup_context, _differentiate)


def loss(*inputs: Any) -> Results:
    """The forward operator, also under the transforms of `torch.func`."""
    return Results(*(_transformed if transforming() or in_forward_mode() else forward)(*inputs))
