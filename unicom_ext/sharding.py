"""Prototypes sharded over the ranks of a process group: class ranges and collectives.

`torch.distributed` is the engine. A step costs one gather of the ranks' embeddings and labels, one
sum of two numbers per sample between the shards of the classes, and in backward one sum of the
embedding gradients that leaves each rank its own rows; `communication_volume` counts the bytes.

Every rank makes the same calls in the same order, so a rank that fails must not leave the others
waiting. Where the host can look without waiting for a device (on CPUs, or with
``uneven_batches=True``) ranks first tell each other whether they can go on, and all raise if one
cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext import _core, devices
from unicom_ext.functional import _PRECISION, _REDUCTION, _resolve_precision
from unicom_ext.margins import CombinedMargin
from unicom_ext.reference import Metrics
from unicom_ext.row_sparse import refuse_dense_optimizers, row_sparse

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_ops = torch.ops.unicom_ext
_IGNORED = -1  # kIgnoredSlot in csrc/core/selection.h

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def class_range(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """First class of a rank and the one after its last: chunks of ceil(C / world_size) classes.

    These are the chunks of `torch.distributed.tensor.Shard`. The last ranks may own fewer classes
    than the others, or none.
    """
    chunk = -(-num_classes // world_size)
    start = min(rank * chunk, num_classes)
    return start, min(start + chunk, num_classes)


class ClassShard:
    """One rank's part of the classes, and the group it shares them with.

    group: the process group.  rank, world_size: this process in it and its size.
    num_classes: C, of all ranks.  start, stop: this rank owns the classes in [start, stop).
    """

    def __init__(self, group: dist.ProcessGroup, num_classes: int) -> None:
        self.group = group
        self.check_alive()
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.num_classes = num_classes
        self.start, self.stop = class_range(num_classes, self.world_size, self.rank)
        self._meshes: dict[str, DeviceMesh] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __deepcopy__(self, memo: dict) -> ClassShard:
        return self  # the copy is on the same rank of the same group

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loss with a process_group cannot be pickled: save its state_dict instead, with "
            "unicom_ext.checkpoint or torch.distributed.checkpoint"
        )

    def check_alive(self) -> None:
        """ValueError unless the group is one of this process and was not destroyed."""
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, "
                f"got {self.group!r}"
            )
        try:
            dist.get_process_group_ranks(self.group)
        except (KeyError, ValueError):
            raise ValueError("process_group was destroyed") from None

    def gather(self, rows: Tensor, *, wait: bool = True) -> Tensor | tuple[Tensor, dist.Work]:
        """[n, ...] of each rank -> [world_size * n, ...], in rank order; n is the same everywhere.

        With ``wait=False`` also what must be waited for before the result is read.
        """
        result = rows.new_empty((self.world_size * len(rows), *rows.shape[1:]))
        work = _all_gather(result, rows.contiguous(), group=self.group, async_op=not wait)
        return result if wait else (result, work)

    def sum_scatter(self, rows: Tensor) -> Tensor:
        """[world_size * n, ...] on each rank, summed over ranks -> this rank's [n, ...]."""
        shape = (self.world_size, len(rows) // self.world_size, *rows.shape[1:])
        if dist.get_backend(self.group) == "gloo":
            # Its reduce-scatter is an all-reduce of everything: twice the bytes of this.
            parts = torch.empty_like(rows, memory_format=torch.contiguous_format)
            dist.all_to_all_single(parts, rows.contiguous(), group=self.group)
            return parts.view(shape).sum(dim=0)
        result = rows.new_empty(shape[1:])
        _reduce_scatter(result, rows.contiguous(), group=self.group)
        return result

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def mesh(self, device_type: str) -> DeviceMesh:
        """The group as the one-dimensional mesh that global tensors lie on."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        return self._meshes[device_type]

    def as_global(self, rows: Tensor) -> DTensor:
        """This rank's rows [stop - start, ...] as a part of the tensor of all classes [C, ...].

        They share memory.
        """
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size([self.num_classes, *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows.detach(),
            self.mesh(rows.device.type),
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=stride,
        )

    def own_rows(self, value: Tensor) -> Tensor:
        """This rank's rows of a tensor of all classes: a `DTensor`, or a plain tensor."""
        from torch.distributed.tensor import DTensor, Shard

        if isinstance(value, DTensor):
            mesh = self.mesh(value.device_mesh.device_type)
            if value.device_mesh == mesh and value.placements == (Shard(0),):
                return value.to_local()
            value = value.full_tensor()
        return value[self.start : self.stop]


def agree(
    settings: Mapping[str, object], failure: Exception | None, group: dist.ProcessGroup | None
) -> None:
    """Raise on every rank if one has failed, or if the settings differ between ranks.

    Slow (it sends Python objects): for construction, checkpoints, and to say what went wrong.
    group: None for one process alone.
    """
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    reports: list[Any] = [(reason, dict(settings))]
    if group is not None:
        reports *= dist.get_world_size(group)
        dist.all_gather_object(reports, reports[0], group=group)
    if failure is not None:
        raise failure
    for rank, (reason, _) in enumerate(reports):
        if reason is not None:
            raise RuntimeError(f"rank {rank} of the process group raised {reason}")
    for name in settings:
        values = [theirs.get(name) for _, theirs in reports]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on every rank, got {_listed(values)}")


def _listed(values: list[object]) -> str:
    """Such as: 3 on rank 0, 4 on ranks 1, 2."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return ", ".join(
        f"{value} on rank{'s' if len(of) > 1 else ''} {', '.join(of)}"
        for value, of in ranks.items()
    )


# ---- the batch of all ranks ----


class GlobalBatch(NamedTuple):
    """The ranks' batches one after the other, each filled up to the largest with ignored samples.

    B = world_size * size.
    """

    embeddings: Tensor  # [B, d], to be read only after `arrival.wait()`
    arrival: dist.Work
    labels: Tensor  # [B] int64
    m2: Tensor | None  # [B] float64, where the margin is per sample
    m3: Tensor | None
    size: int  # of the largest batch of a rank
    wants_grad: bool  # some rank needs the gradient of its embeddings
    first: int  # where this rank's samples begin


_HEADER = 7  # numbers that ranks exchange about their batches
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gather_batch(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    margin: CombinedMargin,
    *,
    device: torch.device,
    ignore_index: int,
    uneven: bool,
    check: Callable[[], Tensor | None],
) -> GlobalBatch:
    """The global batch on every rank.

    check: looks at this rank's arguments and raises if they are wrong; then all ranks raise.
        Returns the step of the selections, which must be the same on every rank, or None.
    uneven: first exchange sizes, so that they may differ. Otherwise every rank must have as many
        samples, of the same dtype, and a rank whose check raises is alone with it.
    """
    shard.check_alive()
    if uneven:
        size, wants_grad = _exchange_sizes(
            shard, embeddings, labels, margin, device, ignore_index, check
        )
    else:
        check()
        size = len(embeddings)
        wants_grad = embeddings.requires_grad
    missing = size - len(embeddings)

    # One message for labels and per-sample margins: whole numbers and the bits of float64.
    columns = [labels.to(torch.int64)]
    per_sample = [m for m in (margin.m2, margin.m3) if isinstance(m, Tensor)]
    columns += [m.detach().to(torch.float64).view(torch.int64) for m in per_sample]
    rows = torch.stack(columns, dim=1)
    x = embeddings.detach()
    if missing:
        padding = rows.new_zeros(missing, rows.shape[1])
        padding[:, 0] = ignore_index
        rows = torch.cat([rows, padding])
        x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
    rows, rows_arrival = shard.gather(rows, wait=False)
    x, arrival = shard.gather(x, wait=False)  # on its way while classes are selected
    rows_arrival.wait()
    columns = [column.contiguous() for column in rows.unbind(dim=1)]
    values = iter([column.view(torch.float64) for column in columns[1:]])
    m2, m3 = (next(values) if isinstance(m, Tensor) else None for m in (margin.m2, margin.m3))
    return GlobalBatch(x, arrival, columns[0], m2, m3, size, wants_grad, shard.rank * size)


def _exchange_sizes(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    margin: CombinedMargin,
    device: torch.device,
    ignore_index: int,
    check: Callable[[], Tensor | None],
) -> tuple[int, bool]:
    """The largest batch of a rank, and whether any needs the gradient of its embeddings."""
    failure = step = None
    header = torch.zeros(_HEADER, dtype=torch.int64)
    try:
        step = check()
        check_labels(labels, shard.num_classes, ignore_index)
        kinds = [isinstance(m, Tensor) for m in (margin.m2, margin.m3)]
        header[1] = len(embeddings)
        header[2] = _DTYPES.index(embeddings.dtype)
        header[3] = kinds[0] + 2 * kinds[1]
        header[4] = embeddings.requires_grad
        header[5] = shard.num_classes
    except Exception as error:
        failure = error
        header[0] = 1
    header = header.to(device)
    if step is not None:
        header[6] = step
    reports = shard.gather(header).view(shard.world_size, -1).tolist()  # the host waits here
    if any(failed for failed, *_ in reports):
        agree({}, failure, shard.group)
    _, sizes, dtypes, kinds, grads, classes, steps = zip(*reports, strict=True)
    margins = ("numbers", "m2 per sample", "m3 per sample", "m2 and m3 per sample")
    for name, values in (
        ("num_classes", list(classes)),
        ("embeddings.dtype", [_DTYPES[d] for d in dtypes]),
        ("margin", [margins[k] for k in kinds]),
        ("step", list(steps)),
    ):
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on every rank, got {_listed(values)}")
    return max(sizes), any(grads)


# ---- the loss ----


class Options(NamedTuple):
    """The options of the operators, checked and resolved."""

    m1: float
    m2: float  # where the margin is not per sample
    m3: float
    scale: float
    filter: float  # inf: none
    exact_margin_grad: bool
    linear_beyond_pi: bool
    precision: int
    reduction: str
    workspace_bytes: int
    sparse_grad: bool
    grad_average: bool
    total_sampled: int  # at least the sampled classes of all ranks together
    want_metrics: bool


class Selected(NamedTuple):
    """This rank's sampled classes, and the dimensions."""

    class_index: Tensor | None  # [bound] rows of this rank's prototypes; None for all
    count: Tensor | None  # how many of them are valid; None for all
    slot: Tensor  # [B] int64, each label's position in class_index; -1 ignored, -2 elsewhere
    feature_index: Tensor | None  # [d']; None for all


def call_loss(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    select: Callable[[Tensor], Selected],
    *,
    check: Callable[[], Tensor | None],
    total_sampled: Callable[[int], int],
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
    select: maps the labels of all ranks to this rank's sampled classes; it may raise.
    check: see `gather_batch`.
    total_sampled: given the number of samples of all ranks, how many classes all may have sampled.
    The other options are those of `unicom_ext.functional.partial_margin_softmax`.

    Returns the loss (for ``reduction="none"`` of this rank's samples), the metrics of this rank's
    samples, and what `select` returned.
    """
    if sparse_grad:
        refuse_dense_optimizers()
    if uneven_batches is None:
        uneven_batches = prototypes.device.type == "cpu"
    batch = gather_batch(
        shard,
        embeddings,
        labels,
        margin,
        device=prototypes.device,
        ignore_index=ignore_index,
        uneven=uneven_batches,
        check=check,
    )
    options = Options(
        m1=margin.m1,
        m2=0.0 if isinstance(margin.m2, Tensor) else float(margin.m2),
        m3=0.0 if isinstance(margin.m3, Tensor) else float(margin.m3),
        scale=float(scale),
        filter=math.inf if interclass_filter is None else float(interclass_filter),
        exact_margin_grad=margin_grad == "exact",
        linear_beyond_pi=beyond_pi == "linear",
        precision=_PRECISION[_resolve_precision(precision, embeddings.device.type)],
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        sparse_grad=sparse_grad,
        grad_average=grad_average,
        total_sampled=total_sampled(len(batch.labels)),
        want_metrics=want_metrics,
    )
    return _global_loss(shard, embeddings, prototypes, batch, select, options)


def _global_loss(
    shard: ClassShard,
    embeddings: Tensor,
    prototypes: Tensor,
    batch: GlobalBatch,
    select: Callable[[Tensor], Selected],
    options: Options,
) -> tuple[Tensor, Metrics, Selected]:
    grad_embeddings = torch.is_grad_enabled() and batch.wants_grad
    grad_prototypes = torch.is_grad_enabled() and prototypes.requires_grad
    kept_bytes = options.workspace_bytes if grad_embeddings or grad_prototypes else 0
    with torch.no_grad():
        sums, x, selected, saved = _shard_sums(
            shard, prototypes, batch, select, options, kept_bytes
        )
        sample_loss, state = _ops.loss_merge(
            sums.pairs,
            sums.exponent,
            sums.inverse_norm,
            selected.slot,
            batch.m2,
            batch.m3,
            options.m1,
            options.m2,
            options.m3,
            options.scale,
            options.exact_margin_grad,
            options.linear_beyond_pi,
        )
        own = slice(batch.first, batch.first + len(embeddings))
        real = torch.promote_types(torch.promote_types(x.dtype, prototypes.dtype), torch.float32)
        if options.reduction == "none":
            loss = sample_loss[own].to(real)
        else:
            loss = sample_loss.sum()
            if options.reduction == "mean":
                loss = loss / (selected.slot != _IGNORED).sum().clamp(min=1)
            loss = loss.to(real)

        target_cosine = sums.pairs[own, 1].to(real)
        largest_negative = top1 = None
        if options.want_metrics:
            largest_negative = shard.max(sums.largest_negative.to(real))[own]
            top1 = (selected.slot[own] != _IGNORED) & (target_cosine >= largest_negative)
        metrics = Metrics(sample_loss[own].to(real), target_cosine, largest_negative, top1)

    if grad_embeddings or grad_prototypes:
        loss = _Attach.apply(
            embeddings,
            prototypes,
            loss,
            (x, *selected, state, *saved),
            _Backward(shard, options, batch.size, kept_bytes, grad_embeddings, grad_prototypes),
        )
    return loss, metrics, selected


def partial_margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    feature_index: Tensor | None,
    *,
    process_group: dist.ProcessGroup,
    num_classes: int | None,
    ignore_index: int,
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

    def select(labels: Tensor) -> Selected:
        slot = _ops.label_slots(
            labels, class_index, num_classes, ignore_index, shard.start, shard.stop
        )
        rows = None if class_index is None else class_index - shard.start
        return Selected(rows, None, slot, feature_index)

    loss, metrics, _ = call_loss(
        shard,
        embeddings,
        labels,
        prototypes,
        select,
        check=check_all,
        total_sampled=lambda samples: num_classes,
        ignore_index=ignore_index,
        **options,
    )
    return loss, metrics


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """ValueError for a label that no rank owns, where looking does not wait for a device."""
    if labels.device.type != "cpu":
        return
    values = labels.detach().contiguous().numpy()
    bad = _core.find_bad_label(values, num_classes, ignore_index)
    if bad >= 0:
        raise ValueError(
            f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}), "
            f"got {values[bad]} at position {bad}"
        )


class _Sums(NamedTuple):
    pairs: Tensor  # [B, 2] float64: sum over the other classes, target cosine
    exponent: Tensor  # [B]
    largest_negative: Tensor  # [B], among this rank's classes
    inverse_norm: Tensor  # [B]


def _shard_sums(
    shard: ClassShard,
    prototypes: Tensor,
    batch: GlobalBatch,
    select: Callable[[Tensor], Selected],
    options: Options,
    kept_bytes: int,
) -> tuple[_Sums, Tensor, Selected, tuple[Tensor, Tensor]]:
    """This rank's part of every sample's softmax, and the sum of all ranks' parts.

    A rank that fails on the way still takes part in the sum, with NaN: no other rank waits for it.
    On CPUs all ranks raise then; on other devices the others go on with NaN, and end when it does.
    """
    failure = None
    labels = batch.labels
    running = _core.constant_exponent(options.scale, options.total_sampled) is None
    batch.arrival.wait()
    x = batch.embeddings
    try:
        try:
            selected = select(labels)
        except ValueError as error:
            error.add_note("(positions count through the batches of all ranks, in rank order)")
            raise
        # Gradients of half-precision embeddings are summed over ranks in float32.
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        pairs, exponent, largest_negative, inverse_norm, *saved = devices.run(
            _ops.loss_sums,
            x,
            selected.slot,
            prototypes,
            selected.class_index,
            selected.count,
            selected.feature_index,
            options.scale,
            options.filter,
            options.total_sampled,
            options.precision,
            kept_bytes,
        )
    except Exception as error:
        failure = error
        pairs = torch.full((len(labels), 2), math.nan, dtype=torch.float64, device=x.device)
        exponent = pairs.new_full((len(labels),), -math.inf)

    if running:  # beyond the range of a constant shift, sums have exponents of their own
        common = shard.max(exponent.clone())
        pairs[:, 0] *= torch.exp2(exponent - common).nan_to_num(0.0)  # no classes: -inf - -inf
        exponent = common
    # One row more says how many ranks have failed.
    flag = pairs.new_full((1, 2), float(failure is not None))
    pairs = shard.sum(torch.cat([pairs, flag]))
    if failure is not None or (pairs.device.type == "cpu" and pairs[-1, 0] > 0):
        if pairs.device.type == "cpu":
            agree({}, failure, shard.group)
        raise failure
    sums = _Sums(pairs[:-1], exponent, largest_negative, inverse_norm)
    return sums, x, selected, tuple(saved)


class _Backward(NamedTuple):
    """What backward needs beside tensors."""

    shard: ClassShard
    options: Options
    size: int  # samples per rank, those that were filled up included
    kept_bytes: int
    grad_embeddings: bool
    grad_prototypes: bool


class _Attach(torch.autograd.Function):
    """Gives a loss that is already computed its gradient."""

    @staticmethod
    def forward(ctx, embeddings, prototypes, loss, saved, backward):
        ctx.save_for_backward(prototypes, *saved)
        ctx.backward = backward
        ctx.local = len(embeddings), embeddings.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        prototypes, x, class_index, count, slot, feature_index, *saved = ctx.saved_tensors
        shard, options, size, kept_bytes, want_embeddings, want_prototypes = ctx.backward
        local, dtype = ctx.local
        if options.reduction == "none":
            padding = grad_loss.new_zeros(size - local)
            grad_loss = shard.gather(torch.cat([grad_loss, padding]))
        compact = options.sparse_grad and class_index is not None
        grad_embeddings, grad_prototypes = devices.run(
            _ops.loss_backward,
            grad_loss.contiguous(),
            x,
            slot,
            prototypes,
            class_index,
            count,
            feature_index,
            *saved,
            options.scale,
            options.filter,
            options.precision,
            _REDUCTION[options.reduction],
            kept_bytes,
            want_embeddings,
            want_prototypes,
            compact,
        )
        if want_embeddings:
            grad_embeddings = shard.sum_scatter(grad_embeddings)[:local]
            if options.grad_average:
                grad_embeddings *= shard.world_size
            grad_embeddings = grad_embeddings.to(dtype)
        if want_prototypes and options.sparse_grad:
            grad_prototypes = row_sparse(grad_prototypes, class_index, count, prototypes.shape)
        return (
            grad_embeddings if ctx.needs_input_grad[0] else None,
            grad_prototypes if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


# ---- what a step sends ----


class Volume(NamedTuple):
    """Bytes that one rank sends in one step; it receives as many."""

    sizes: int  # the exchange of sizes: only where batches may be uneven
    embeddings: int  # gathered in forward
    labels: int  # gathered, with per-sample margins
    sums: int  # summed over ranks
    grad_embeddings: int  # summed over ranks and scattered in backward

    @property
    def total(self) -> int:
        return sum(self)


def communication_volume(
    batch_size: int,
    embedding_size: int,
    world_size: int,
    *,
    uneven_batches: bool = False,
    embedding_bytes: int = 4,
    grad_bytes: int = 4,
    per_sample_margins: int = 0,
    reduction: str = "mean",
) -> Volume:
    """Bytes that one rank sends in one training step of the loss, backward included.

    The collectives' own minimum, which ring algorithms reach: n - 1 times its part in a gather or a
    reduce-scatter, and 2 (n - 1) / n times the whole in an all-reduce. It depends neither on the
    number of classes nor on the rates. Beyond the range of a constant shift (scale above about 79)
    and with `return_metrics`, one more all-reduce of B numbers comes to `sums`.

    Args:
        batch_size: b, samples of one rank.
        embedding_size: d.
        world_size: n.
        uneven_batches: whether sizes are exchanged first.
        embedding_bytes: per value of the embeddings, 2 for half precision.
        grad_bytes: per value of their gradient while it is summed: 8 for float64, else 4.
        per_sample_margins: how many of m2 and m3 are per-sample tensors.
        reduction: of the loss; ``"none"`` gathers the upstream gradients too.
    """
    others = world_size - 1
    all_batches = world_size * batch_size
    labels = others * batch_size * 8 * (1 + per_sample_margins)
    if reduction == "none":
        labels += others * batch_size * 4
    return Volume(
        sizes=others * _HEADER * 8 if uneven_batches else 0,
        embeddings=others * batch_size * embedding_size * embedding_bytes,
        labels=labels,
        sums=round(2 * others / world_size * (all_batches + 1) * 16),
        grad_embeddings=others * batch_size * embedding_size * grad_bytes,
    )
