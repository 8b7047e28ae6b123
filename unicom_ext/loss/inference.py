"""What trained prototypes say of embeddings: the nearest classes, and logits without a margin.

Plain PyTorch on every device. Cosines are computed in double and rounded once, so that they depend
neither on the number of ranks nor on which other classes are in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unicom_ext.distributed.failures import check_same, words_of_all
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.loss import checks
from unicom_ext.loss.owner import PrototypeOwner
from unicom_ext.loss.results import NearestClasses
from unicom_ext.utils.search import (
    DEFAULT_BLOCK_BYTES,
    LAST_ROW,
    NOTHING,
    VALUE_BYTES,
    best_keys,
    check_finite,
    first_of_equals,
    id_of,
    key_of,
    score_of,
    unit_rows,
)

_LOGIT_BYTES = 16  # of a logit of a block, until it is in the result


class InferenceCalls(PrototypeOwner):
    """An owner of prototypes that also answers without labels. Nothing of it is changed."""

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> NearestClasses:
        """The k classes whose prototypes have the largest cosine with each embedding; of several
        centres of a class the nearest counts.

        All classes and all dimensions take part, in training mode too; margin and scale do not.
        The matrix of all cosines is never in memory: beyond inputs and outputs there are at most 64
        MiB (or what one embedding takes with its k classes). With a process group every rank calls
        this with embeddings of its own, of which there may be any number, and finds the nearest
        among the classes of all ranks; it then also holds the embeddings of all ranks in float64,
        each rank's filled up to the largest batch, and k numbers of 8 bytes for each, twice.

        Args:
            embeddings: [b, d] floating point, of any norm, on the device of the prototypes.
            k: in [1, C]; with a process group the same on every rank.

        Returns:
            cosine [b, k] float32, falling, and class_index [b, k] int64. The cosine is computed in
            double and rounded to float32, whatever the dtypes, and under autocast too; classes with
            equal ones are sorted by id. With a zero row every cosine is 0. No gradient. On CUDA
            the host waits for the device.

        Raises:
            TypeError, ValueError: an argument is wrong, or a row is not finite in float32. With a
                process group every rank raises, the others a RuntimeError that names the rank.
        """
        ranks, weight = self._ranks(), self.weight.detach()
        centers = self.options.num_centers

        def check() -> tuple[int, int]:
            if self.num_classes * centers > LAST_ROW + 1:
                raise ValueError(
                    f"topk takes at most 2^31 prototypes, got {self.num_classes * centers}"
                )
            number = checks.integer("k", k, 1, self.num_classes)
            self._check_embeddings(embeddings, weight)
            return len(embeddings), number

        sizes, numbers = zip(*agreed(check, ranks), strict=True)
        check_same("k", list(numbers))
        k, size = numbers[0], max(sizes)
        x = embeddings if ranks.group is None else gathered(embeddings.double(), size, ranks)
        filled = torch.tensor(sizes, device=x.device)[:, None] > torch.arange(size, device=x.device)
        order = filled.flatten().nonzero().flatten()
        keys = torch.full((len(x), k), NOTHING, dtype=torch.int64, device=x.device)
        found = min(k, len(weight) // centers)
        # The k-th class is at best behind all centres of k - 1 others.
        rows = (found - 1) * centers + 1 if found else 0
        with ranks.together():
            for ids, of_block in best_keys(
                x,
                weight,
                order[: len(order) if found else 0],
                lambda _: rows,
                first_of_equals(self._start * centers),
                exclude_self=False,
                block_bytes=DEFAULT_BLOCK_BYTES,
                names=("embeddings", "prototypes"),
            ):
                keys[ids, :found] = _best_classes(of_block, centers, found)
        # Each rank gets the keys of its own samples: k of each rank, of which the best k stay.
        keys = ranks.swap(keys).transpose(0, 1).flatten(1)[: sizes[ranks.rank]]
        keys = keys.topk(k, dim=1).values
        return NearestClasses(score_of(keys), id_of(keys))

    @torch.no_grad()
    def logits(
        self,
        embeddings: Tensor,
        class_index: Tensor | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """scale * cosine of each embedding with some classes, or with all: no margin, no filter.

        All dimensions take part, in training mode too. With a process group every rank calls this
        with embeddings and classes of its own, and gets what one process would compute; a rank then
        holds the embeddings and ids of all ranks, and one rank's logits at a time.

        Args:
            embeddings: [b, d] floating point, of any norm, on the device of the prototypes.
            class_index: [n] int32 or int64, ids in [0, C), in any order, repeated or not. None: all
                classes in their order, which makes a matrix [b, C] of what may be millions; `topk`
                does not.
            scale: instead of the module's, for one that is learned; a number or a tensor of one
                floating value. With a process group the same on every rank.

        Returns:
            [b, n], or [b, C], float64 if embeddings or prototypes are, else float32. Computed in
            double and rounded once, under autocast too. With a zero row logits are 0. For inference
            alone: no gradient. On CUDA the host waits for the device.

        Raises:
            TypeError, ValueError: an argument is wrong, or a row is not finite in float32; a bad id
                is named with its position. With a process group every rank raises, the others a
                RuntimeError that names the rank.
        """
        ranks, weight = self._ranks(), self.weight.detach()
        centers = self.options.num_centers

        def check() -> tuple[int, int | None, bool, float]:
            options = self.options if scale is None else replace(self.options, scale=scale)
            self._check_embeddings(embeddings, weight)
            if class_index is not None:
                _check_ids(class_index, self.num_classes, weight.device)
            wide = torch.float64 in (embeddings.dtype, weight.dtype)
            count = None if class_index is None else len(class_index)
            return len(embeddings), count, wide, float(options.scale)

        sizes, counts, wide, scales = zip(*agreed(check, ranks), strict=True)
        check_same("scale", list(scales))
        x = unit_rows("embeddings", embeddings, 0)
        x = gathered(x, max(sizes), ranks).view(ranks.world_size, max(sizes), x.shape[1])
        most = max(count or 0 for count in counts)
        ids = weight.new_empty(0, dtype=torch.int64) if class_index is None else class_index.long()
        ids = gathered(ids, most, ranks).view(ranks.world_size, most)
        result = weight.new_empty(0)
        for rank, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if count is None:
                wanted = torch.arange(self.num_classes, device=weight.device)
            else:
                wanted = ids[rank, :count]
            with ranks.together():
                part = _own_cosines(
                    x[rank, :size], weight, self._start, wanted, scales[0], wide[rank], centers
                )
            if part.numel():
                ranks.sum(part)  # of which all but one are 0
            if rank == ranks.rank:
                result = part
        return result

    def _ranks(self) -> Ranks:
        ranks = Ranks(None) if self.shard is None else self.shard
        ranks.check_alive()
        return ranks

    def _check_embeddings(self, embeddings: Tensor, weight: Tensor) -> None:
        if self._was_meta:
            self._check_written()
        checks.check_rows(embeddings, weight, min_classes=0)
        if embeddings.device != weight.device:
            raise ValueError(
                f"embeddings must be on {weight.device} like the prototypes, got "
                f"{embeddings.device}"
            )
        check_finite("embeddings", embeddings)


def _best_classes(keys: Tensor, centers: int, count: int) -> Tensor:
    """Keys [q, count] of the best classes, from [q, n] of the best prototypes, both falling."""
    if centers == 1:
        return keys
    class_ids = id_of(keys) // centers
    _, order = class_ids.sort(dim=1, stable=True)  # the best prototype of each class comes first
    ordered = class_ids.gather(1, order)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    again = torch.empty_like(again).scatter_(1, order, again)
    keys = key_of(score_of(keys), LAST_ROW - class_ids).masked_fill(again, NOTHING)
    return keys.topk(count, dim=1).values


def agreed(check: Callable[[], Any], ranks: Ranks) -> list[Any]:
    """What `check` returns on each rank; if it raises on one, every rank does."""
    found = failure = None
    try:
        found = check()
    except Exception as error:
        failure = error
    return words_of_all(found, failure, ranks.group)


def gathered(rows: Tensor, size: int, ranks: Ranks) -> Tensor:
    """The rows of all ranks, each rank's filled up to `size` with zeros."""
    padding = rows.new_zeros(size - len(rows), *rows.shape[1:])
    return ranks.gather(torch.cat([rows, padding]) if len(padding) else rows)


def _check_ids(class_index: Tensor, num_classes: int, device: torch.device) -> None:
    if not isinstance(class_index, Tensor) or class_index.dtype not in (torch.int32, torch.int64):
        kind = class_index.dtype if isinstance(class_index, Tensor) else type(class_index).__name__
        raise TypeError(f"class_index must be None or an int32 or int64 tensor, got {kind}")
    if class_index.dim() != 1:
        raise ValueError(f"class_index must be a vector, got the shape {list(class_index.shape)}")
    if class_index.device != device:
        raise ValueError(
            f"class_index must be on {device} like the prototypes, got {class_index.device}"
        )
    bad = ((class_index < 0) | (class_index >= num_classes)).nonzero().flatten()
    if len(bad):
        position = int(bad[0])
        raise ValueError(
            f"class_index must be in [0, {num_classes}), got {int(class_index[position])} at "
            f"position {position}"
        )


def _own_cosines(
    x: Tensor,
    weight: Tensor,
    start: int,
    class_index: Tensor,
    scale: float,
    wide: bool,
    centers: int,
) -> Tensor:
    """scale * cosine [b, n] with the classes in `weight`, of which the first is `start`; 0 with
    others.

    x: [b, d] unit rows.  class_index: [n] of all classes.  wide: in float64, else float32.
    """
    size, dim = x.shape
    dtype = torch.float64 if wide else torch.float32
    result = x.new_zeros(size, len(class_index), dtype=dtype)
    stop = start + len(weight) // centers
    own = ((class_index >= start) & (class_index < stop)).nonzero().flatten()
    center = torch.arange(centers, device=weight.device)
    for columns in own.split(
        max(1, DEFAULT_BLOCK_BYTES // (VALUE_BYTES * dim + _LOGIT_BYTES * size) // centers)
    ):
        rows = ((class_index[columns, None] - start) * centers + center).flatten()
        y = unit_rows("prototypes", weight[rows], rows + start * centers)
        cosine = (x @ y.T).unflatten(1, (len(columns), centers)).amax(2)
        result[:, columns] = (scale * cosine).to(dtype)
    return result
