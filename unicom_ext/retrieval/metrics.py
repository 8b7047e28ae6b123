"""Retrieval metrics of embeddings, exact, in blocks.

A gallery item is relevant to a query if it has the query's label. P(i) is the share of relevant
items among a query's i nearest, rel(i) is 1 if the i-th is relevant, else 0, and R is the number of
items relevant to the query.

    Recall@K     share of the queries with a relevant item among their K nearest
    mAP@R        mean over the queries of 1/R sum_{i=1..R} P(i) rel(i) (Musgrave, Belongie, Lim: "A
                 Metric Learning Reality Check", ECCV 2020)
    R-precision  mean over the queries of P(R) (there too)
    mAP@K        mean over the queries of 1/min(K, R) sum_{i=1..K} P(i) rel(i) (Weyand, Araujo, Cao,
                 Sim: "Google Landmarks Dataset v2", CVPR 2020, there with K = 100)
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from operator import index as as_int
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.retrieval.search import check_block_bytes, check_gallery, check_rows
from unicom_ext.utils.search import (
    DEFAULT_BLOCK_BYTES,
    LAST_ROW,
    NOTHING,
    TieRank,
    best_keys,
    check_finite,
    id_of,
    score_of,
    unit_rows,
)

_WRONG = LAST_ROW + 1  # the bit of a key's low half that says that the item is not relevant
_SAME = 1e-6  # unit rows as near as this in each dimension are one row, but for rounding
_BLOCK = 1 << 16  # rows looked at together


class Result(NamedTuple):
    """Retrieval quality at `dim` leading dimensions, averaged over `num_queries` queries.

    The queries given are num_queries + num_excluded + num_unlabelled.
    """

    dim: int
    recall: dict[int, float]  # Recall@K by K
    map_at_r: float
    num_queries: int
    num_excluded: int  # queries with a label but without a relevant item; in no average
    r_precision: float
    map_at_k: dict[int, float]  # mAP@K by K
    num_unlabelled: int  # queries without a label; in no average
    num_distractors: int  # gallery items without a label, which are wrong for every query


@torch.no_grad()
def evaluate(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    query_groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    process_group: dist.ProcessGroup | None = None,
) -> list[Result]:
    """Recall@K, mAP@K, mAP@R and R-precision by cosine similarity, one Result per entry of `dims`.

    queries         [Nq, d] floating point, any norm; cosines are those of unit rows in fp32,
                    computed in double and rounded to fp32
    query_labels    [Nq] integers. A negative label, such as -1, is none, and matches nothing, nor
                    another -1: such a query is left out and counted (`num_unlabelled`), such a
                    gallery item is a distractor, found as any other and always wrong
                    (`num_distractors`)
    gallery         [Ng, d] and gallery_labels [Ng], on the same device. None: the queries are the
                    gallery. Each query is then left out of its own list by its index, never by its
                    score or position, so an exact copy of it counts like any other item.
    query_groups    [Nq] integers, and gallery_groups [Ng] where there is a gallery. Items of the
                    query's own group are neither right nor wrong: it is searched for as if they
                    were not there. A negative group is none. For "the same class by the same
                    camera", as person re-identification has it, number the pairs of class and
                    camera.
    dims            numbers of leading dimensions; rows are cut, then normalised again. None: [d]
    ks              K of Recall@K and mAP@K. One beyond the gallery takes all of it
    block_bytes     bound on the working memory. Queries are taken in order of R, in blocks whose
                    lists of R candidates fit; one query's own list of R (at most Ng) always fits.
    process_group   ranks that all call this with the same arguments: each searches for a part of
                    the queries, and all return the same

    Lists are as long as the larger of R and K, so nothing is cut off. Ties are broken against the
    model: at equal fp32 cosines the items of other classes come first. So the result does not
    depend on the order of the gallery, and a model that maps everything to one point scores 0. A
    zero row has cosine 0 to everything.

    Warns if nearest gallery items are the queries themselves (the same rows, but for scale and
    rounding to half precision).

    Raises ValueError if no query has a relevant item, on NaN or infinity, and on shapes, devices or
    values that do not fit; TypeError on wrong types.
    """
    ranks = Ranks(process_group)
    with ranks.together():
        check_rows("queries", queries)
        _check_integers("query_labels", query_labels, "queries", queries)
        _check_both("gallery", gallery, "gallery_labels", gallery_labels)
        exclude_self = gallery is None
        if gallery is None or gallery_labels is None:
            gallery, gallery_labels = queries, query_labels
        check_gallery(queries, gallery)
        _check_integers("gallery_labels", gallery_labels, "gallery", gallery)
        groups = _groups(queries, query_groups, gallery, gallery_groups, exclude_self)
        check_block_bytes(block_bytes)
        dims = _check_counts("dims", [queries.shape[1]] if dims is None else dims, queries.shape[1])
        ks = _check_counts("ks", ks, None)
        # All of them on every rank, which will meet some only: all raise, or none.
        for name, rows in (("queries", queries), ("gallery", gallery))[: 2 - exclude_self]:
            for start in range(0, len(rows), _BLOCK):
                check_finite(name, rows[start : start + _BLOCK, : max(dims)], start)
    _check_same_on_ranks(
        ranks,
        {
            "shapes": [list(queries.shape), list(gallery.shape)],
            "dims": dims,
            "ks": ks,
            "query_labels (CRC-32)": query_labels,
            "gallery_labels (CRC-32)": gallery_labels,
            "groups (CRC-32)": None if groups is None else torch.cat([g.long() for g in groups]),
        },
    )

    labelled = query_labels >= 0
    relevant = _num_relevant(query_labels, gallery_labels, groups, exclude_self)  # R, [Nq]
    counted = (labelled & (relevant > 0)).nonzero().flatten()
    if len(counted) == 0:
        outside = "" if groups is None else ", outside its own group"
        raise ValueError(
            f"query_labels: no query has another item with its label in the gallery{outside}"
        )
    # Largest R first: no query of a block needs a longer list than the one that starts it.
    counted = counted[relevant[counted].argsort(descending=True, stable=True)]
    n = len(counted)
    num_labelled = int(labelled.sum())
    num_distractors = int((gallery_labels < 0).sum())
    counted = counted[ranks.rank :: ranks.world_size]  # so that ranks have as much to do
    longest = relevant[counted].tolist()

    def rank_of(query: Tensor, item: Tensor) -> Tensor:
        wrong = query_labels[query] != gallery_labels[item]
        return wrong * _WRONG + (LAST_ROW - item)

    results, copies = [], 0.0
    for dim in dims:
        # Sums over queries: Recall@K, mAP@K, then mAP@R, R-precision, and queries found themselves.
        sums = torch.zeros(2 * len(ks) + 3, dtype=torch.float64, device=queries.device)
        for ids, keys in best_keys(
            queries,
            gallery,
            counted,
            lambda start: min(max(longest[start], *ks), len(gallery)),
            TieRank(rank_of, lambda begin: _WRONG + (LAST_ROW - begin)),
            exclude_self=exclude_self,
            groups=groups,
            block_bytes=block_bytes,
            dim=dim,
        ):
            r = relevant[ids]
            sums[:-1] += _sums(keys, r, ks)
            if not exclude_self and dim == max(dims):
                sums[-1] += _num_copies(queries, gallery, ids, keys[:, 0], block_bytes)
        means = (ranks.sum(sums) / n).tolist()
        recall, map_at_k = means[: len(ks)], means[len(ks) : 2 * len(ks)]
        map_at_r, r_precision, copied = means[2 * len(ks) :]
        copies = max(copies, copied * n)
        results.append(
            Result(
                dim=dim,
                recall=dict(zip(ks, recall, strict=True)),
                map_at_r=map_at_r,
                num_queries=n,
                num_excluded=num_labelled - n,
                r_precision=r_precision,
                map_at_k=dict(zip(ks, map_at_k, strict=True)),
                num_unlabelled=len(queries) - num_labelled,
                num_distractors=num_distractors,
            )
        )
    if copies and ranks.is_first:
        warnings.warn(
            f"gallery: {round(copies):,} of the {n:,} queries find a row in it that is their own. "
            "If these are the queries themselves, they say nothing about the model: leave the "
            "gallery out, or give a query and its copy one group",
            stacklevel=3,  # no_grad is in between
        )
    return results


def _check_same_on_ranks(ranks: Ranks, arguments: dict[str, Any]) -> None:
    """ValueError where they differ, which would make one figure of several questions. Embeddings
    may, as no device computes them twice alike."""
    if ranks.group is not None:
        compared = {
            name: zlib.crc32(value.cpu().contiguous().numpy().data)
            if isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        agree(compared, None, ranks.group)


def _sums(keys: Tensor, r: Tensor, ks: Sequence[int]) -> Tensor:
    """Sums over queries, float64: of Recall@K and mAP@K for each K, of mAP@R and R-precision.

    keys: int64 [q, width], best first; r: [q], R of each, at most width.
    """
    right = (keys & _WRONG == 0) & (keys != NOTHING)
    found = right.cumsum(1)
    rank = torch.arange(1, keys.shape[1] + 1, device=keys.device)
    precision = (found.double() / rank).mul_(right).cumsum(1)  # sum_{i <= rank} P(i) rel(i)
    ends = [min(k, keys.shape[1]) - 1 for k in ks]
    most = torch.stack([r.clamp(max=k) for k in ks], 1)  # min(K, R), [q, len(ks)]
    at_r = (r - 1)[:, None]
    return torch.cat(
        [
            (found[:, ends] > 0).sum(0),
            (precision[:, ends] / most).sum(0),
            (precision.gather(1, at_r)[:, 0] / r).sum(0, keepdim=True),
            (found.gather(1, at_r)[:, 0].double() / r).sum(0, keepdim=True),
        ]
    )


def _num_copies(
    queries: Tensor, gallery: Tensor, ids: Tensor, nearest: Tensor, block_bytes: int
) -> int:
    """How many of the queries `ids` [q] have their own row as nearest, key `nearest` [q]."""
    near = (score_of(nearest) > 1 - torch.finfo(torch.bfloat16).eps ** 2).nonzero().flatten()
    count = 0
    for part in near.split(max(1, block_bytes // (32 * queries.shape[1]))):
        own, other = ids[part], id_of(nearest[part])
        x = unit_rows("queries", queries[own], own).float()
        y = unit_rows("gallery", gallery[other], other).float()
        # What one of them has lost where it was stored in fewer bits.
        rounding = torch.maximum(_rounding(queries[own]), _rounding(gallery[other]))
        far = (x - y).abs() > _SAME + rounding[:, None] * torch.maximum(x.abs(), y.abs())
        count += int((~far.any(1)).sum())
    return count


def _rounding(rows: Tensor) -> Tensor:
    """Relative error, fp32 [n], of rows that are or were stored in half precision; else 0."""
    error = torch.zeros(len(rows), device=rows.device)
    for dtype in (torch.float16, torch.bfloat16):
        error[(rows.to(dtype).to(rows.dtype) == rows).all(1)] = torch.finfo(dtype).eps
    return error


def _num_relevant(
    query_labels: Tensor,
    gallery_labels: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    exclude_self: bool,
) -> Tensor:
    """How many items of each query's label it may meet, int64 [Nq]."""
    count = _num_equal(query_labels, gallery_labels)
    if groups is None:
        return count - int(exclude_self)
    # As many of them as have its group too are not met; itself is one of these if it has a group.
    label, group = (
        torch.cat([a.long(), b.long()]).unique(return_inverse=True)[1]
        for a, b in ((query_labels, gallery_labels), groups)
    )
    pair = label * (group.max() + 1) + group
    own = _num_equal(*pair.split([len(query_labels), len(gallery_labels)]))
    return count - torch.where(groups[0] >= 0, own, int(exclude_self))


def _num_equal(these: Tensor, those: Tensor) -> Tensor:
    """How often each of `these` occurs among `those`, int64."""
    ordered = those.long().sort().values
    wanted = these.long().contiguous()
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)


def _groups(
    queries: Tensor,
    query_groups: Tensor | None,
    gallery: Tensor,
    gallery_groups: Tensor | None,
    exclude_self: bool,
) -> tuple[Tensor, Tensor] | None:
    """Groups of queries and gallery, checked; None where none were given."""
    if exclude_self:
        if gallery_groups is not None:
            raise ValueError("gallery_groups: was given without a gallery, must be None")
        gallery_groups = query_groups
    _check_both("query_groups", query_groups, "gallery_groups", gallery_groups)
    if query_groups is None or gallery_groups is None:
        return None
    _check_integers("query_groups", query_groups, "queries", queries)
    _check_integers("gallery_groups", gallery_groups, "gallery", gallery)
    return query_groups, gallery_groups


def _check_both(name: str, value: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (value is None) != (other is None):
        raise ValueError(f"{name} and {other_name}: give both or neither")


def _check_integers(name: str, values: Tensor, rows_name: str, rows: Tensor) -> None:
    """One integer for each row."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, must be an integer torch.Tensor")
    if values.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: got dtype {values.dtype}, must be an integer type")
    if values.shape != rows.shape[:1]:
        raise ValueError(
            f"{name}: got shape {list(values.shape)}, must be [{len(rows)}], one per row of "
            f"{rows_name}"
        )
    if values.device != rows.device:
        raise ValueError(f"{name}: is on {values.device}, {rows_name} on {rows.device}")


def _check_counts(name: str, values: Sequence[int], largest: int | None) -> list[int]:
    """A non-empty list of ints from 1 to `largest`."""
    try:
        values = [as_int(v) for v in values]
    except TypeError:
        raise TypeError(f"{name}: got {values!r}, must be a list of ints") from None
    if not values or min(values) < 1 or (largest is not None and max(values) > largest):
        limit = "at least 1" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"{name}: got {values}, must be a non-empty list of ints, each {limit}")
    return values
