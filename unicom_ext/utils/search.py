"""Exact cosine search in blocks: the memory it needs does not depend on gallery x queries.

A block of queries meets one block of the gallery after the other. The few scores of a block that
can still enter a query's best k are merged into a running [q, k] list.

A candidate is one int64 key: the cosine rounded to fp32, as an integer of the same order, in the
high half, and a number that decides ties, the rank, in the low half. Keys are totally ordered, so
the result depends neither on which of two equal scores a top-k routine happens to return nor on the
order of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DEFAULT_BLOCK_BYTES = 64 << 20
# Bytes in flight at most, temporaries included; tests/retrieval counts them.
PAIR_BYTES = 64  # per (query, gallery row) of a block of scores
BEST_BYTES = 64  # per entry of the running lists
VALUE_BYTES = 16  # per number of a block of rows, while it is normalised

LOW_HALF = 0xFFFFFFFF
LAST_ROW = 0x7FFFFFFF  # the largest index of a gallery row: one bit of the low half is left
NOTHING = torch.iinfo(torch.int64).min  # the key of an entry that is still free: below every other


class Matrix(Protocol):
    """Rows [n, d] of which the search reads some at a time: a tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: tuple[slice | Tensor, slice], /) -> Tensor:
        """Rows [first, last), or those of the given ids, and their leading columns."""


class TieRank(NamedTuple):
    """Decides between equal scores: the higher rank, an integer in [0, 2^32), comes first."""

    of: Callable[[Tensor, Tensor], Tensor]  # (query ids [m], gallery ids [m]) -> int64 [m]
    most: Callable[[int], int]  # gallery id -> no rank from this id on is higher


def best_keys(
    queries: Matrix,
    gallery: Matrix,
    order: Tensor,
    list_length: Callable[[int], int],
    tie: TieRank,
    *,
    exclude_self: bool,
    groups: tuple[Tensor, Tensor] | None = None,
    block_bytes: int,
    dim: int | None = None,
    names: tuple[str, str] = ("queries", "gallery"),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (query ids [q], keys int64 [q, k], largest first) until all of `order` is done.

    order        int64 [n], ids of queries, taken a block at a time
    list_length  position in `order` -> k of the block that starts there
    groups       integers [Nq] and [Ng]: a query does not meet the items of its own group; a
                 negative one is none
    dim          number of leading dimensions to use; rows are normalised over these alone

    Rows of integers, such as codes, have products without rounding, which are divided by the norms:
    pairs of equal products and norms are equal.
    names        of queries and gallery, for the error where a row is not finite
    """
    dim = dim or queries.shape[1]
    start = 0
    while start < len(order):
        k = list_length(start)
        q, g = block_shape(len(order) - start, len(gallery), k, dim, block_bytes)
        ids = order[start : start + q]
        yield ids, _search(queries, gallery, ids, k, g, dim, tie, exclude_self, groups, names)
        start += q


def block_shape(
    num_queries: int, num_items: int, k: int, dim: int, block_bytes: int
) -> tuple[int, int]:
    """Rows (q, g) of a block of queries and of the gallery: at least 1, and as long as q > 1

    q g PAIR_BYTES + q k BEST_BYTES + (q + g) dim VALUE_BYTES <= block_bytes
    """
    row = dim * VALUE_BYTES
    pairs = block_bytes // (2 * PAIR_BYTES)
    g = max(int(pairs**0.5), pairs // max(num_queries, 1))  # few queries meet more rows at once
    g = max(1, min(g, block_bytes // (4 * row), num_items))
    q = (block_bytes - g * row) // (g * PAIR_BYTES + k * BEST_BYTES + row)
    return max(1, min(q, num_queries)), g


def first_of_equals(start: int = 0) -> TieRank:
    """Of equal scores the lower id first, of a gallery whose first row has the id `start`."""
    last = LAST_ROW - start
    return TieRank(lambda query, item: last - item, lambda begin: last - begin)


def id_of(key: Tensor) -> Tensor:
    """The ids that `first_of_equals` ranked by; of a `NOTHING` it means nothing."""
    return LAST_ROW - (key & LAST_ROW)


def _search(
    queries: Matrix,
    gallery: Matrix,
    ids: Tensor,
    k: int,
    block: int,
    dim: int,
    tie: TieRank,
    exclude_self: bool,
    groups: tuple[Tensor, Tensor] | None,
    names: tuple[str, str],
) -> Tensor:
    """Keys int64 [q, k] of the best gallery rows for the queries `ids` [q], largest first."""
    x, x_norm = _directions(names[0], queries[ids, :dim], ids)
    best = torch.full((len(ids), k), NOTHING, dtype=torch.int64, device=x.device)
    for begin in range(0, len(gallery), block):
        end = min(begin + block, len(gallery))
        y, y_norm = _directions(names[1], gallery[begin:end, :dim], begin)
        with torch.autocast(x.device.type, enabled=False):
            # In double: products of fp32 round otherwise in a column at the edge than in one inside
            # a block, and equal rows must have equal cosines.
            product = x @ y.T  # [q, g]
            if x_norm is not None and y_norm is not None:
                product.div_(x_norm).div_(y_norm.T)
            score = product.float()
            del product
        if exclude_self:
            own = ((ids >= begin) & (ids < begin + len(y))).nonzero().flatten()
            score[own, ids[own] - begin] = -torch.inf
        if groups is not None:
            mine, theirs = groups[0][ids, None], groups[1][begin : begin + len(y)]
            score.masked_fill_((mine == theirs) & (mine >= 0), -torch.inf)
        best = _merge(best, score, ids, begin, tie)
    return best


def _directions(name: str, rows: Tensor, ids: Tensor | int) -> tuple[Tensor, Tensor | None]:
    """Rows in double, and what products with them are to be divided by [n, 1]: unit rows by
    nothing."""
    if rows.is_floating_point():
        return unit_rows(name, rows, ids), None
    values = rows.double()
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values, norm.masked_fill_(norm == 0, 1)


def _merge(best: Tensor, score: Tensor, ids: Tensor, begin: int, tie: TieRank) -> Tensor:
    """The k largest of `best` [q, k] and of the keys of `score` [q, g], largest first."""
    q, k = best.shape
    # Only scores above the k-th best matter, or equal to it if they can win the tie: few, once the
    # first blocks have passed. The rest of the work is on these alone.
    last = best[:, -1]
    floor = score_of(last)
    below = torch.nextafter(floor, torch.full_like(floor, -torch.inf))
    floor = torch.where((last & LOW_HALF) < tie.most(begin), below, floor)
    floor = torch.where(last == NOTHING, -2.0, floor)  # takes all that the query may meet
    above = score > floor[:, None]
    if k < score.shape[1] and int(above.sum()) > 2 * q * k:
        # At first all are above, and so they are where each block beats the one before: of these
        # only the k best of the block matter, and what equals the last of them.
        own = score.topk(k, dim=1).values[:, -1:]
        above &= score >= own
    row, column = above.nonzero(as_tuple=True)  # sorted by row
    if len(row) == 0:
        return best
    key = key_of(score[row, column], tie.of(ids[row], column + begin))
    # Beside each best list, its row's survivors: the i-th of a row goes to column k + i.
    count = torch.bincount(row, minlength=q)
    first = count.cumsum(0) - count
    slot = torch.arange(k, k + len(row), device=row.device) - first[row]
    table = best.new_full((q, k + int(count.max())), NOTHING)
    table[:, :k] = best
    table[row, slot] = key
    return table.topk(k, dim=1).values


def key_of(score: Tensor, rank: Tensor) -> Tensor:
    """int64 keys that sort by score (fp32; rounding beyond [-1, 1] cut off), then by rank."""
    bits = (score.clamp(-1, 1) + 0.0).view(torch.int32)  # + 0.0 turns minus zero into zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    return (ordered.to(torch.int64) << 32) | rank


def score_of(key: Tensor) -> Tensor:
    ordered = (key >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def unit_rows(name: str, x: Tensor, ids: Tensor | int) -> Tensor:
    """x [n, d] in double with rows of norm 1; a zero row stays zero.

    name, ids: for the error message; ids [n] of the rows, or the id of the first.
    """
    unit = x.to(torch.float64, copy=True)
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    # Else no square has overflowed or vanished, and all values are finite in fp32.
    extreme = ~((norm > 1e-140) & (norm < 1e38))
    if extreme.any():
        check_finite(name, x, ids)
        largest = torch.linalg.vector_norm(unit, ord=torch.inf, dim=1, keepdim=True)
        unit /= largest.masked_fill_(~extreme | (largest == 0), 1)  # others keep their bits
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        norm.masked_fill_(norm == 0, 1)
    return unit.div_(norm)


def check_finite(name: str, x: Tensor, ids: Tensor | int = 0) -> None:
    """Raises ValueError unless all rows x [n, d] are finite in fp32; ids as for `unit_rows`."""
    finite = torch.isfinite(x.float().abs().amax(dim=1))
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        bad = int(ids[bad]) if isinstance(ids, Tensor) else ids + bad
        raise ValueError(f"{name}: row {bad} holds NaN or a value outside fp32, it has no cosine")
