"""Labels with several positives for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Labels = Tensor | tuple[Tensor, Tensor]  # as the loss takes them


def dense(labels: Any, ignore_index: int) -> Tensor:
    """Labels as a tensor: a pair (ids, offsets) becomes [B, P], filled up with `ignore_index`.

    Sample i of a pair has the positives ``ids[offsets[i]:offsets[i + 1]]``. P is the largest count
    of a sample, which only the values tell: on CUDA the host waits for them.

    Raises:
        TypeError, ValueError: the pair does not fit together.
    """
    is_pair = isinstance(labels, tuple | list) and len(labels) == 2
    if not is_pair or not all(isinstance(part, Tensor) for part in labels):
        return labels  # checked with the other tensors
    ids, offsets = labels
    for name, part in (("ids", ids), ("offsets", offsets)):
        if part.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"labels: {name} must be int32 or int64, got {part.dtype}")
        if part.dim() != 1:
            raise ValueError(f"labels: {name} must be a vector, got the shape {list(part.shape)}")
    if offsets.device != ids.device:
        raise ValueError(
            f"labels: offsets must be on {ids.device} like the ids, got {offsets.device}"
        )
    if len(offsets) < 1:
        raise ValueError("labels: offsets must hold B + 1 numbers, got none")
    counts = offsets.diff()
    first, last, falling = torch.stack(
        [offsets[0].long(), offsets[-1].long(), (counts < 0).sum()]
    ).tolist()
    if first != 0 or last != len(ids) or falling:
        raise ValueError(
            f"labels: offsets must rise from 0 to the number of ids, {len(ids)}; they go from "
            f"{first} to {last}" + (f" and fall {falling} times" if falling else "")
        )
    width = max(int(counts.max()), 1) if len(counts) else 1
    row = torch.repeat_interleave(counts)
    column = torch.arange(len(ids), device=ids.device) - offsets[:-1].long()[row]
    ids = _with_room(ids, ignore_index)
    matrix = ids.new_full((len(counts), width), ignore_index)
    matrix[row, column] = ids
    return matrix


def once_each(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels [B, P] with `ignore_index` where a class stands in its row for a second time."""
    if labels.shape[1] == 1:
        return labels
    labels = _with_room(labels, ignore_index)
    ordered, order = labels.sort(dim=1, stable=True)
    repeats = torch.zeros_like(labels, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return labels.masked_fill(torch.zeros_like(repeats).scatter(1, order, repeats), ignore_index)


def _with_room(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of a type that can hold `ignore_index`."""
    return labels if -(2**31) <= ignore_index < 2**31 else labels.long()


def width_of(labels: Tensor) -> int:
    """P of labels [B, P], 1 of labels [B]."""
    return max(labels.shape[1], 1) if labels.dim() == 2 else 1


def place(labels: Tensor, flat: int) -> str:
    """Where a label stands, for messages.  flat: its position when rows follow one another."""
    if labels.dim() == 1:
        return str(flat)
    return str(list(divmod(flat, labels.shape[1])))
