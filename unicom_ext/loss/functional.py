"""The partial margin softmax as a function: one autograd operator on CPU and CUDA tensors.

Layers: argument checks here, the operators `torch.ops.unicom_ext.*` (csrc/bind) below, and
the engine (csrc/engine) below them. Gradients and the shapes that `torch.compile` needs are
registered here.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext import _core
from unicom_ext.loss import checks
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.reference import Metrics
from unicom_ext.ops import library as devices
from unicom_ext.ops.row_sparse import row_sparse, updater_of

__all__ = ["Metrics", "partial_margin_softmax"]

_ops = torch.ops.unicom_ext

_REDUCTION = {"none": 0, "mean": 1, "sum": 2}
_PRECISION = {"fp32": 0, "fp16": 1, "bf16": 2}
# Enough for the cosines of 4096 samples with 16,000 classes.
DEFAULT_WORKSPACE_BYTES = 256 << 20
_FAST_BF16 = "avx512_bf16" in _core.cpu_capabilities()


def partial_margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    interclass_filter: float | None = None,
    margin_grad: str = "straight_through",
    beyond_pi: str = "keep",
    precision: str = "auto",
    sparse_grad: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    process_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    grad_average: bool = True,
    uneven_batches: bool | None = None,
    check_inputs: bool = False,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, Metrics]:
    """Softmax cross entropy over margin cosines, on some of the classes and feature dimensions.

    Let S be the classes of `class_index` and G the dimensions of `feature_index`, x_i and w_j the
    unit vectors of embedding i and prototype j cut to G, c_ij = x_i . w_j and s the scale::

        loss_i = log(sum over j in S of exp z_ij) - z_iy
        z_ij = s * c_ij  for j != y_i,    z_iy = s * psi(c_iy)  with psi the margin

    This is the loss of UNICOM (arXiv:2304.05884); with all dimensions that of PartialFC
    (arXiv:2203.15565); with all classes too that of ArcFace (arXiv:1801.07698). The B x |S| logits
    are never stored: memory is that of the packed prototypes (|S| * |G| values) and a bounded
    workspace.

    Args:
        embeddings: [B, d], float32, bfloat16, float16 or float64; any strides. B may be 0.
        labels: [B] int32 or int64, class ids in [0, C) or `ignore_index`.
        prototypes: [C, d], floating point as above. If either matrix is float64 all arithmetic is
            done in float64.
        margin: psi, such as ``ArcFace(0.3)`` (radians); m2 and m3 may be per-sample tensors [B].
        scale: s > 0, the inverse temperature.
        class_index: int64, sorted unique class ids that contain every label, or None for all.
        feature_index: int64, sorted unique dimensions, at least one, or None for all.
        interclass_filter: a negative cosine above this counts as 0 and gets no gradient (UNICOM's
            and PartialFC's filter for conflicting classes); None for no filter.
        margin_grad: ``"straight_through"`` takes psi' as 1, as the published recipes do;
            ``"exact"`` is the true derivative, bounded near |c| = 1.
        beyond_pi: ``"keep"`` the formula where m1 * theta + m2 > pi, or ``"linear"``, ArcFace's
            continuation, so that psi stays monotone.
        precision: type of the unit vectors that are multiplied: ``"fp32"``, ``"fp16"``,
            ``"bf16"``. Sums, exponentials and the target's logit are float32 or better always.
            On CPUs ``"fp16"`` is computed as fp32.
            ``"auto"`` is fp32; under autocast it is fp16 on CUDA (unit vectors need no range, and
            fp16 has three more bits than bf16), and bf16 on CPUs that have bf16 instructions.
        sparse_grad: the gradient of `prototypes` becomes a sparse COO tensor holding the rows of S.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        ignore_index: the label of samples without loss and gradient.
        process_group: share the classes with the other ranks of this group, see below.
        num_classes: with a process group C, the classes of all ranks.
        grad_average: multiply the gradient of `embeddings` by the number of ranks, because
            data-parallel wrappers (DDP, FSDP) average over ranks. False for wrappers that sum.
        uneven_batches: whether ranks first tell each other their batch sizes (and whether their
            arguments are good), so that these may differ or be 0. None: on CPUs, where it costs
            one small message; elsewhere the host would wait for the device. To compile a step whole
            (``torch.compile(fullgraph=True)``) it must be False.
        check_inputs: look at the values first: raise if an embedding is NaN or infinite, or, on
            CUDA, if a label is no class. Otherwise the loss of such an embedding is NaN. Labels are
            always looked at on the CPU; on CUDA that would wait for the device, so there the loss
            of a sample with a bad label is NaN too, and the sample has no part in gradients.
        workspace_bytes: up to this much memory keeps cosines from forward to backward, which then
            multiplies three times instead of four; the rest it computes again. The result is the
            same bit for bit. Nothing is kept where no gradient is wanted, nor on CUDA in fp16 and
            bf16, where multiplying again is as fast as reading.
        return_metrics: also return the `Metrics` of each sample, which cost nothing.

    Returns:
        The loss, float64 if an input is, else float32: a scalar, or [B] for ``reduction="none"``
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

    def check() -> None:
        checks.check_options(
            margin,
            scale,
            interclass_filter,
            margin_grad,
            beyond_pi,
            precision,
            reduction,
            ignore_index,
            workspace_bytes,
        )
        checks.check_tensors(
            embeddings,
            labels,
            prototypes,
            margin,
            class_index,
            feature_index,
            min_classes=1 if process_group is None else 0,
        )
        devices.check_device(embeddings.device)
        if check_inputs:
            total = len(prototypes) if process_group is None else num_classes
            checks.check_values(embeddings, labels, total, ignore_index)

    options = {
        "margin": margin,
        "scale": scale,
        "interclass_filter": interclass_filter,
        "margin_grad": margin_grad,
        "beyond_pi": beyond_pi,
        "precision": precision,
        "sparse_grad": sparse_grad,
        "reduction": reduction,
        "workspace_bytes": workspace_bytes,
    }
    if process_group is not None:
        from unicom_ext.loss.sharded import step as sharding

        loss, metrics = sharding.partial_margin_softmax(
            embeddings,
            labels,
            prototypes,
            class_index,
            feature_index,
            process_group=process_group,
            num_classes=num_classes,
            check=check,
            ignore_index=ignore_index,
            grad_average=grad_average,
            uneven_batches=uneven_batches,
            want_metrics=return_metrics,
            **options,
        )
    else:
        check()
        rows = prototypes.shape[0]
        slot = _ops.label_slots(labels, class_index, rows, ignore_index, 0, rows)
        loss, metrics = call_loss(
            embeddings, slot, prototypes, class_index, None, feature_index, **options
        )
    return (loss, metrics) if return_metrics else loss


def call_loss(
    embeddings: Tensor,
    slot: Tensor,
    prototypes: Tensor,
    class_index: Tensor | None,
    count: Tensor | None,
    feature_index: Tensor | None,
    *,
    margin: CombinedMargin,
    scale: float,
    interclass_filter: float | None,
    margin_grad: str,
    beyond_pi: str,
    precision: str,
    sparse_grad: bool,
    reduction: str,
    workspace_bytes: int,
) -> tuple[Tensor, Metrics]:
    """The operator with the options of `partial_margin_softmax`, already checked.

    slot: [B] int64, each label's position in class_index, -1 where ignored.
    count: how many entries of class_index are valid, int64 scalar tensor; None for all.
    """
    m2, m3 = margin.m2, margin.m3
    wants_grad = torch.is_grad_enabled() and (embeddings.requires_grad or prototypes.requires_grad)
    eager = wants_grad and not torch.compiler.is_compiling()
    loss, sample_loss, target_cosine, largest_negative, *_ = devices.run(
        _Loss.apply if eager else _ops.loss,
        embeddings,
        slot,
        prototypes,
        class_index,
        count,
        feature_index,
        _per_sample(m2),
        _per_sample(m3),
        [
            margin.m1,
            0.0 if isinstance(m2, Tensor) else float(m2),
            0.0 if isinstance(m3, Tensor) else float(m3),
            float(scale),
            math.inf if interclass_filter is None else float(interclass_filter),
        ],
        [
            margin_grad == "exact",
            beyond_pi == "linear",
            _PRECISION[_resolve_precision(precision, embeddings.device.type)],
            _REDUCTION[reduction],
            workspace_bytes if wants_grad else 0,
            sparse_grad,
        ],
    )
    target_cosine, largest_negative = target_cosine.detach(), largest_negative.detach()
    top1 = (slot >= 0) & (target_cosine >= largest_negative)
    return loss, Metrics(sample_loss.detach(), target_cosine, largest_negative, top1)


def _per_sample(m: float | Tensor) -> Tensor | None:
    return m.detach().to(torch.float64).contiguous() if isinstance(m, Tensor) else None


def _resolve_precision(precision: str, device_type: str) -> str:
    if precision != "auto":
        return precision
    if not torch.is_autocast_enabled(device_type):
        return "fp32"
    if device_type == "cuda":
        return "fp16"
    return "bf16" if _FAST_BF16 else "fp32"


# ---- autograd ----


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output[4:])  # and state, packed, kept
    ctx.options = inputs[8:]  # reals, codes
    ctx.sparse = bool(inputs[9][-1])
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at each reading
    _embeddings, _slot, prototypes, class_index, count, *_rest = saved
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(grads)
    updater = updater_of(prototypes) if ctx.sparse and ctx.needs_input_grad[2] else None
    if updater is not None:
        operands = (*saved, *ctx.options, ctx.needs_input_grad[0])
        grad_embeddings = updater(prototypes, grad_loss, operands)
        grads[0] = grad_embeddings if ctx.needs_input_grad[0] else None
        return tuple(grads)
    compact = ctx.sparse and class_index is not None
    grad_embeddings, grad_prototypes = devices.run(
        _LossBackward.apply if torch.is_grad_enabled() else _ops.loss_backward,
        grad_loss,
        *saved,
        *ctx.options,
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[2],
        compact,
    )
    if ctx.needs_input_grad[0]:
        grads[0] = grad_embeddings
    if ctx.needs_input_grad[2]:
        grads[2] = grad_prototypes
        if ctx.sparse:
            grads[2] = row_sparse(grad_prototypes, class_index, count, prototypes.shape)
    return tuple(grads)


torch.library.register_autograd("unicom_ext::loss", _backward, setup_context=_setup_context)


class _Loss(torch.autograd.Function):
    """The operator with the autograd registered above, without torch's walk over its schema.

    That walk takes the square of the number of arguments: 0.2 ms, a quarter of a tiny step.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.loss(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _LossBackward(torch.autograd.Function):
    """The operator where its results may be differentiated (``create_graph=True``), which fails.

    Torch itself would warn and take their gradient for zero.
    """

    @staticmethod
    def forward(ctx, *inputs):
        return _ops.loss_backward(*inputs)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the partial margin softmax can be differentiated only once")


# ---- shapes, for torch.compile ----

_LANES, _TILE = 16, 6  # csrc/cpu/kernels/layout.h
_CUDA_ROWS, _CUDA_CLASSES, _CUDA_DEPTH = 128, 256, 64  # csrc/cuda/kernels/logits.h


def _round_up(a, b):
    return (a + b - 1) // b * b


def _packed_bytes(num_sampled, dim, bytes_per_value, device_type):
    cuda = device_type == "cuda"
    classes = _round_up(num_sampled, _CUDA_CLASSES if cuda else _LANES)
    height = _round_up(dim, _CUDA_DEPTH if cuda else _TILE)
    return classes * height * bytes_per_value + classes * 8


def _kept_bytes(num_sampled, batch, real_bytes, value_bytes, workspace_bytes, device_type):
    if device_type == "cuda":  # kept_classes in csrc/cuda/host/loss.h
        class_bytes = _round_up(batch, _CUDA_ROWS) * real_bytes
        if value_bytes == 2 or class_bytes == 0:
            return 0
        fit = workspace_bytes // (class_bytes * _CUDA_CLASSES) * _CUDA_CLASSES
        return torch.sym_min(fit, _round_up(num_sampled, _CUDA_CLASSES)) * class_bytes
    panels = (num_sampled + _LANES - 1) // _LANES
    panel_bytes = _round_up(batch, _TILE) * _LANES * real_bytes
    if workspace_bytes == 0 or panel_bytes == 0:
        return 0
    fit = workspace_bytes // panel_bytes
    return (panels if fit >= panels else fit // 4 * 4) * panel_bytes


@torch.library.register_fake("unicom_ext::select_classes")
def _(labels, step, num_classes, num_sampled, seed, ignore_index, start, stop):
    batch = labels.shape[0]
    # selection_bound in csrc/core/sampler.h
    covered = min((stop + 255) // 256 * 256, num_classes) - start // 256 * 256
    whole = covered == num_classes
    quota = num_sampled if whole else num_sampled * covered // num_classes + 1
    bound = torch.sym_min(stop - start, quota + torch.sym_min(batch, covered))
    new = labels.new_empty
    return (
        new((bound,), dtype=torch.int64),
        new((), dtype=torch.int64),
        new((batch,), dtype=torch.int64),
    )


@torch.library.register_fake("unicom_ext::select_features")
def _(step, dim, num_selected, seed):
    return step.new_empty((num_selected,))


@torch.library.register_fake("unicom_ext::label_slots")
def _(labels, class_index, num_classes, ignore_index, start, stop):
    return labels.new_empty(labels.shape, dtype=torch.int64)


def _saved_sizes(embeddings, prototypes, class_index, feature_index, codes):
    """Bytes of `packed` and `kept`."""
    _, _, precision, _, workspace_bytes, _ = codes
    batch, dim = embeddings.shape
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    device_type = embeddings.device.type
    halves = (_PRECISION["bf16"], _PRECISION["fp16"] if device_type == "cuda" else None)
    value_bytes = 8 if double else 2 if precision in halves else 4
    num_sampled = prototypes.shape[0] if class_index is None else class_index.shape[0]
    num_features = dim if feature_index is None else feature_index.shape[0]
    return (
        _packed_bytes(num_sampled, num_features, value_bytes, device_type),
        _kept_bytes(
            num_sampled, batch, 8 if double else 4, value_bytes, workspace_bytes, device_type
        ),
    )


@torch.library.register_fake("unicom_ext::loss")
def _(embeddings, slot, prototypes, class_index, count, feature_index, m2, m3, reals, codes):
    batch = embeddings.shape[0]
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    real = torch.float64 if double else torch.float32
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, codes)
    _, _, _, reduction, _, _ = codes
    new = embeddings.new_empty
    return (
        new((batch,) if reduction == _REDUCTION["none"] else (), dtype=real),
        new((batch,), dtype=real),
        new((batch,), dtype=real),
        new((batch,), dtype=real),
        new((batch, 6), dtype=torch.float64),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@torch.library.register_fake("unicom_ext::loss_sums")
def _(embeddings, slot, prototypes, class_index, count, feature_index, total_sampled, reals, codes):
    batch = embeddings.shape[0]
    packed, kept = _saved_sizes(embeddings, prototypes, class_index, feature_index, codes)
    new = embeddings.new_empty
    return (
        new((batch, 2), dtype=torch.float64),
        *(new((batch,), dtype=torch.float64) for _ in range(3)),
        new((packed,), dtype=torch.uint8),
        new((kept,), dtype=torch.uint8),
    )


@torch.library.register_fake("unicom_ext::loss_merge")
def _(sums, exponent, inverse_norm, slot, m2, m3, reals, codes):
    batch = slot.shape[0]
    return sums.new_empty((batch,)), sums.new_empty((batch, 6))


@torch.library.register_fake("unicom_ext::loss_backward")
def _(grad_loss, embeddings, slot, prototypes, class_index, count, feature_index, state, packed,
      kept, reals, codes, want_embeddings, want_prototypes, compact):  # fmt: skip
    num_rows = class_index.shape[0] if compact else prototypes.shape[0]
    dim = embeddings.shape[1]
    return (
        embeddings.new_empty(embeddings.shape if want_embeddings else (0, 0)),
        prototypes.new_empty((num_rows, dim) if want_prototypes else (0, 0)),
    )
