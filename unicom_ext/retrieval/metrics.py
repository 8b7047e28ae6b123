"""Recall@K and mAP@R of embeddings, exact, in blocks.

A gallery item is relevant to a query if it has the query's label (and is not the query itself).

    Recall@K  share of the queries with a relevant item among their K nearest
    mAP@R     mean over the queries of 1/R sum_{i=1..R} [item i is relevant] precision@i, where R is
              that query's number of relevant items (Musgrave, Belongie, Lim: "A Metric Learning
              Reality Check", ECCV 2020)
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_int
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.ranks import Ranks
from unicom_ext.retrieval.search import (
    DEFAULT_BLOCK_BYTES,
    TieRank,
    best_keys,
    check_block_bytes,
    check_gallery,
    check_rows,
)


class Result(NamedTuple):
    """Retrieval quality at `dim` leading dimensions, averaged over `num_queries` queries."""

    dim: int
    recall: dict[int, float]
    map_at_r: float
    num_queries: int
    num_excluded: int  # queries without a relevant item in the gallery; in no average


@torch.no_grad()
def evaluate(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    process_group: dist.ProcessGroup | None = None,
) -> list[Result]:
    """Recall@K and mAP@R by cosine similarity, one Result for each entry of `dims`.

    queries         [Nq, d] floating point, any norm; cosines are computed in fp32
    query_labels    [Nq] integers
    gallery         [Ng, d] and gallery_labels [Ng], on the same device. None: the queries are the
                    gallery. Each query is then left out of its own list by its index, never by its
                    score or position, so an exact copy of it counts like any other item.
    dims            numbers of leading dimensions; rows are cut, then normalised again. None: [d]
    block_bytes     bound on the working memory. Queries are taken in order of R, in blocks whose
                    lists of R candidates fit; one query's own list of R (at most Ng) always fits.
    process_group   ranks that all call this with the same arguments: each searches for a part of
                    the queries, and all return the same

    Ties are broken against the model: at equal fp32 cosines the items of other classes come first.
    So the result does not depend on the order of the gallery, and a model that maps everything to
    one point scores 0. A zero row has cosine 0 to everything.

    Raises ValueError if no query has a relevant item, on NaN or infinity, and on shapes, devices or
    values that do not fit; TypeError on wrong types.
    """
    check_rows("queries", queries)
    _check_labels("query_labels", query_labels, "queries", queries)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: give both or neither")
    exclude_self = gallery is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    check_gallery(queries, gallery)
    _check_labels("gallery_labels", gallery_labels, "gallery", gallery)
    check_block_bytes(block_bytes)
    dims = _check_counts("dims", [queries.shape[1]] if dims is None else dims, queries.shape[1])
    ks = _check_counts("ks", ks, None)

    relevant = _num_relevant(query_labels, gallery_labels) - int(exclude_self)  # R, [Nq]
    counted = (relevant > 0).nonzero().flatten()
    if len(counted) == 0:
        raise ValueError("query_labels: no query has another item with its label in the gallery")
    # Largest R first: no query of a block needs a longer list than the one that starts it.
    counted = counted[relevant[counted].argsort(descending=True, stable=True)]
    n = len(counted)
    ranks = Ranks(process_group)
    counted = counted[ranks.rank :: ranks.world_size]  # so that ranks have as much to do
    longest = relevant[counted].tolist()

    def is_wrong(query: Tensor, item: Tensor) -> Tensor:
        return (query_labels[query] != gallery_labels[item]).long()

    results = []
    for dim in dims:
        hits, precision = torch.zeros(len(ks), dtype=torch.int64), 0.0
        for ids, keys in best_keys(
            queries,
            gallery,
            counted,
            lambda start: min(max(longest[start], *ks), len(gallery)),
            TieRank(is_wrong, lambda _: 1),
            exclude_self=exclude_self,
            block_bytes=block_bytes,
            dim=dim,
        ):
            # Best first. Entries that stayed free come last, after all R relevant items.
            right = keys & 1 == 0  # [q, k]
            found = right.cumsum(1)
            width = right.shape[1]
            hits += (found[:, [min(k, width) - 1 for k in ks]] > 0).sum(0).cpu()
            rank = torch.arange(1, width + 1, device=right.device)
            r = relevant[ids, None]
            counts = right & (rank <= r)
            precision += (found.float() / (rank * r) * counts).sum(dtype=torch.float64).item()
        sums = torch.tensor([*hits.tolist(), precision], dtype=torch.float64)
        *found_by_all, precision = ranks.sum(sums.to(queries.device)).tolist()
        hits = torch.tensor(found_by_all, dtype=torch.int64)
        recall = {k: hit / n for k, hit in zip(ks, hits.tolist(), strict=True)}
        results.append(Result(dim, recall, precision / n, n, len(queries) - n))
    return results


def _num_relevant(query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """How often each query's label occurs in the gallery, int64 [Nq]."""
    ordered = gallery_labels.long().sort().values
    wanted = query_labels.long().contiguous()
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)


def _check_labels(name: str, labels: Tensor, rows_name: str, rows: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, must be an integer torch.Tensor")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: got dtype {labels.dtype}, must be an integer type")
    if labels.shape != rows.shape[:1]:
        raise ValueError(
            f"{name}: got shape {list(labels.shape)}, must be [{len(rows)}], one per row of "
            f"{rows_name}"
        )
    if labels.device != rows.device:
        raise ValueError(f"{name}: is on {labels.device}, {rows_name} on {rows.device}")


def _check_counts(name: str, values: Sequence[int], largest: int | None) -> list[int]:
    """A non-empty list of ints from 1 to `largest`."""
    values = [as_int(v) for v in values]
    if not values or min(values) < 1 or (largest is not None and max(values) > largest):
        limit = "at least 1" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"{name}: got {values}, must be a non-empty list of ints, each {limit}")
    return values
