"""The batch of all ranks: what they tell each other before a step, and the gathering of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from unicom_ext.distributed.failures import agree, check_same
from unicom_ext.distributed.shard import ClassShard
from unicom_ext.loss import checks
from unicom_ext.loss.labels import place, width_of
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.options import LossOptions
from unicom_ext.loss.selection import Sampling
from unicom_ext.loss.sharded.volume import HEADER
from unicom_ext.ops import library, transforms

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="with uneven batches ranks exchange sizes, which no graph can hold: with equal batches "
    "give the loss uneven_batches=False to compile it whole"
)
def exchange_sizes(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    device: torch.device,
    options: LossOptions,
    sampling: Sampling,
    want_metrics: bool,
    check: Callable[[], Tensor | None],
) -> tuple[Tensor | None, int, int, bool]:
    """The step, the largest batch and the most labels of a sample on any rank, and whether any
    needs its embeddings' gradient.

    Raises ValueError on every rank where they do not agree on the step, the embeddings' dtype, or
    anything else that is the loss's: what was given to its constructor may have been set since.

    check: looks at this rank's arguments and raises if they are wrong; then all ranks raise.
        Returns the step of the selections, which must be the same on every rank, or None.
    """
    failure: Exception | None = None
    step = None
    header = [0] * HEADER
    try:
        step = check()
        _check_labels(labels, shard.num_classes, options.ignore_index)
        header[1] = len(embeddings)
        header[2] = _DTYPES.index(embeddings.dtype)
        header[3] = embeddings.requires_grad
        header[4] = width_of(labels)
        # Hashes of text, unlike those of numbers, differ between processes.
        header[5] = hash((options.fingerprint, *sampling, want_metrics))
    except Exception as error:
        failure = error
        header[0] = 1
    with transforms.outside():
        message = torch.tensor(header).to(device)
        if step is not None:
            message[6] = transforms.innermost(step)
        reports = shard.gather(message).view(shard.world_size, -1).tolist()  # the host waits here
        if any(failed for failed, *_ in reports):
            agree({}, failure, shard.group)
        _, sizes, dtypes, grads, widths, settings, steps = zip(*reports, strict=True)
        if len(set(settings)) > 1:
            named = {**sampling._asdict(), "want_metrics": want_metrics}
            agree(named | options.same_on_every_rank(), None, shard.group)
    check_same("embeddings.dtype", [_DTYPES[d] for d in dtypes])
    check_same("step", list(steps))
    return step, max(sizes), max(widths), any(grads)


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """ValueError for a label that no rank owns, where looking does not wait for a device."""
    if labels.device.type != "cpu":
        return
    with transforms.outside():
        values = transforms.innermost(labels).detach().contiguous().flatten().numpy()
    bad = library.engine.find_bad_label(values, num_classes, ignore_index)
    if bad >= 0:
        raise ValueError(
            f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}), "
            f"got {values[bad]} at position {place(labels, bad)}"
        )


def stand_in(
    embeddings: object, labels: object, prototypes: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, LossOptions, bool] | None:
    """Ignored samples for a rank whose arguments are wrong, of the size that the others expect, and
    whether the gradient of their embeddings is wanted.

    All this is what the arguments say as far as it can be told; None if there are no samples.
    Autograd reaches the embeddings and margins that were given, with zeros.
    """
    sizes = [len(t) for t in (embeddings, labels) if checks.is_local(t) and t.dim() > 0]
    if not sizes:
        return None
    size, device = sizes[0], prototypes.device
    usable = embeddings if checks.is_local(embeddings) and embeddings.dtype in _DTYPES else None
    dtype = prototypes.dtype if usable is None else usable.dtype
    x = torch.zeros(size, prototypes.shape[1], dtype=dtype, device=device)
    if usable is not None:
        x = x + _nothing_of(usable).to(device)
    width = width_of(labels) if checks.is_local(labels) else 1
    y = torch.full((size, width), options.ignore_index, device=device)
    m2, m3 = (
        torch.zeros(size, width, device=device) + _nothing_of(m).to(device)
        if isinstance(m, Tensor)
        else 0.0
        for m in (options.margin.m2, options.margin.m3)
    )
    options = replace(options, margin=CombinedMargin(1.0, m2, m3))
    return x, y, options, x.requires_grad or usable is None


def _nothing_of(given: Tensor) -> Tensor:
    """Zero, through which autograd reaches what was given."""
    return given.flatten()[:0].sum()


class GlobalBatch(NamedTuple):
    """The ranks' batches one after the other, each filled up to the largest with ignored samples.

    B = world_size * size.
    """

    embeddings: Tensor  # [B, d], to be read only after `arrival.wait()`
    arrival: dist.Work
    labels: Tensor  # int64, [B] where every sample has one, else [B, P]
    m2: Tensor | None  # float64 like labels, where there is one for each
    m3: Tensor | None


def gather_batch(
    shard: ClassShard,
    embeddings: Tensor,
    labels: Tensor,
    m2: Tensor | None,
    m3: Tensor | None,
    size: int,
    width: int,
    ignore_index: int,
) -> GlobalBatch:
    """The global batch on every rank.

    labels, m2, m3: [b] or [b, p].
    size, width: samples of the largest batch of a rank, and the most labels of a sample.
    """
    missing = size - len(embeddings)
    # One message for labels and per-sample margins: whole numbers and the bits of float64.
    columns = [labels.to(torch.int64)]
    columns += [m.to(torch.float64).view(torch.int64) for m in (m2, m3) if m is not None]
    columns = [column if column.dim() == 2 else column[:, None] for column in columns]
    absent = width - columns[0].shape[1]
    if absent or missing:
        padding = 0, absent, 0, missing
        columns = [
            pad(column, padding, value=0 if i else ignore_index) for i, column in enumerate(columns)
        ]
    rows = torch.cat(columns, dim=1)
    if missing:
        embeddings = torch.cat([embeddings, embeddings.new_zeros(missing, embeddings.shape[1])])
    rows, rows_arrival = shard.start_gather(rows)
    x, arrival = shard.start_gather(embeddings)  # on its way while classes are selected
    rows_arrival.wait()
    columns = [column.contiguous() for column in rows.split(width, dim=1)]
    if width == 1:
        columns = [column[:, 0] for column in columns]
    values = iter([column.view(torch.float64) for column in columns[1:]])
    m2, m3 = (None if m is None else next(values) for m in (m2, m3))
    return GlobalBatch(x, arrival, columns[0], m2, m3)
