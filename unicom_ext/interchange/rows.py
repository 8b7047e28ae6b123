"""What ranks hold for each of their classes, put together without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from unicom_ext.checkpoint.pieces import Pieces


@dataclass(frozen=True)
class Rows:
    """One rank's matrix [C_r, d].

    whole: of all its classes.
    index: int64 [k], classes whose rows are newer than there; newer: these rows [k, d].
    """

    whole: Tensor
    index: Tensor | None = None
    newer: Tensor | None = None

    def between(self, start: int, stop: int) -> Tensor:
        rows = self.whole[start:stop]
        if self.index is None or self.newer is None:
            return rows
        here = (self.index >= start) & (self.index < stop)
        rows = rows.clone()
        rows[self.index[here] - start] = self.newer[here].to(rows)
        return rows


def in_rank_order(parts: Sequence[Rows]) -> Pieces:
    """The matrix [C, d] of all ranks' classes."""
    ends = list(accumulate((len(part.whole) for part in parts), initial=0))

    def rows(start: int, stop: int) -> Tensor:
        found = [
            part.between(max(start, begin) - begin, min(stop, end) - begin)
            for part, (begin, end) in zip(parts, pairwise(ends), strict=True)
            if begin < stop and start < end
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    first = parts[0].whole
    return Pieces((ends[-1], first.shape[1]), first.dtype, rows)


def of_columns(matrix: Tensor, num_centers: int) -> Pieces:
    """Prototypes [C, d], or of K > 1 centres [C, K, d], of a matrix [d, C * K] of columns."""
    dim, columns = matrix.shape
    shape = (columns, dim) if num_centers == 1 else (columns // num_centers, num_centers, dim)

    def rows(start: int, stop: int) -> Tensor:
        return matrix[:, start * num_centers : stop * num_centers].T.reshape(-1, *shape[1:])

    return Pieces(shape, matrix.dtype, rows)


def class_counts(num_classes: int, ranks: int) -> list[int]:
    """How many classes each rank of PartialFC owns: C // n, the first C % n ranks one more."""
    each, more = divmod(num_classes, ranks)
    return [each + (rank < more) for rank in range(ranks)]


def counted(counts: Sequence[int]) -> str:
    """Such as "1 rank with 21, 2 with 20"."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    number, size = runs[0]
    words = [f"{number} rank{'s' * (number > 1)} with {size:,}"]
    return ", ".join(words + [f"{number} with {size:,}" for number, size in runs[1:]])
