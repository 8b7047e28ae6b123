"""Exact retrieval quality of embeddings, in blocks."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.retrieval.arguments import (
    check_block_bytes,
    check_bootstrap,
    check_both,
    check_codes,
    check_counts,
    check_gallery,
    check_groups,
    check_index,
    check_integers,
    check_rows,
)
from unicom_ext.retrieval.bootstrap import UnitSums, intervals
from unicom_ext.retrieval.codes import CodedRows
from unicom_ext.retrieval.copies import num_copies
from unicom_ext.retrieval.index import FaissSearch, Search, found_of_exact
from unicom_ext.retrieval.metrics import Result, names, values
from unicom_ext.retrieval.relevance import against_the_model, has_no_label, num_relevant
from unicom_ext.utils.search import (
    DEFAULT_BLOCK_BYTES,
    VALUE_BYTES,
    Matrix,
    best_keys,
    check_finite,
)


@dataclass(frozen=True)
class Options:
    """How embeddings are evaluated; see `evaluate`."""

    dims: list[int]
    ks: list[int]
    codes: str | None
    index: str
    bootstrap: int
    bootstrap_over: str
    seed: int
    block_bytes: int


def checked_options(
    dim: int,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    codes: str | None = None,
    index: str = "exact",
    bootstrap: int = 0,
    bootstrap_over: str = "classes",
    seed: int = 0,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> Options:
    """For embeddings of `dim` dimensions."""
    check_block_bytes(block_bytes)
    if codes is not None:
        check_codes(codes)
    check_index(index, codes)
    check_bootstrap(bootstrap, bootstrap_over, seed)
    dims = check_counts("dims", [dim] if dims is None else dims, dim)
    ks = check_counts("ks", ks, None)
    return Options(dims, ks, codes, index, bootstrap, bootstrap_over, seed, block_bytes)


@dataclass(frozen=True)
class Task:
    """What is evaluated; see `evaluate`."""

    queries: Matrix
    query_labels: Tensor
    gallery: Matrix
    gallery_labels: Tensor
    groups: tuple[Tensor, Tensor] | None
    exclude_self: bool


def checked_task(
    queries: Matrix,
    query_labels: Tensor,
    gallery: Matrix | None,
    gallery_labels: Tensor | None,
    query_groups: Tensor | None,
    gallery_groups: Tensor | None,
) -> Task:
    """The task, unless labels, groups and gallery do not fit."""
    check_integers("query_labels", query_labels, "queries", queries)
    check_both("gallery", gallery, "gallery_labels", gallery_labels)
    exclude_self = gallery is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    check_gallery(queries, gallery)
    check_integers("gallery_labels", gallery_labels, "gallery", gallery, several=not exclude_self)
    groups = check_groups(queries, query_groups, gallery, gallery_groups, exclude_self)
    return Task(queries, query_labels, gallery, gallery_labels, groups, exclude_self)


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
    codes: str | None = None,
    index: str = "exact",
    bootstrap: int = 0,
    bootstrap_over: str = "classes",
    seed: int = 0,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    process_group: dist.ProcessGroup | None = None,
) -> list[Result]:
    """Recall@K, mAP@K, mAP@R and R-precision by cosine similarity, one Result per entry of `dims`.

    Lists are as long as the larger of R and K, so nothing is cut off. Ties are broken against the
    model: at equal fp32 cosines the items of other classes come first. So the result does not
    depend on the order of the gallery, and a model that maps everything to one point scores 0. A
    zero row has cosine 0 to everything (of binary codes, which all have a norm, it is one of them).

    Args:
        queries: [Nq, d] floating point, any norm; cosines are those of unit rows in fp32, computed
            in double and rounded to fp32.
        query_labels: [Nq] integers. A negative label, such as -1, is none, and matches nothing, nor
            another -1: such a query is left out and counted (`num_unlabelled`), such a gallery item
            is a distractor, found as any other and always wrong (`num_distractors`).
        gallery: [Ng, d] on the same device. None: the queries are the gallery. Each query is then
            left out of its own list by its index, never by its score or position, so an exact copy
            of it counts like any other item.
        gallery_labels: [Ng] integers, where there is a gallery, or [Ng, P] where an item has
            several, rows filled up with negative ones: it is relevant to the queries of each.
        query_groups: [Nq] integers. Items of the query's own group are neither right nor wrong: it
            is searched for as if they were not there. A negative group is none. For "the same class
            by the same camera", as person re-identification has it, number the pairs of class and
            camera.
        gallery_groups: [Ng] integers, where there are groups and a gallery.
        dims: numbers of leading dimensions; rows are cut, then normalised again. None: [d].
        ks: K of Recall@K and mAP@K. One beyond the gallery takes all of it.
        codes: None: the rows as they are. ``"int8"`` or ``"binary"``: queries and gallery are coded
            as an index would store them, see `encode`, once they have been cut.
        index: ``"exact"``, or ``"faiss:"`` and what `faiss.index_factory` takes, such as
            ``"faiss:HNSW32"``: an index of the normalised rows names as many candidates as lists
            are long, which are then ranked as ever; what it does not find is not there.
            `Result.index_recall` is the share of the max(ks) nearest that it finds.
        bootstrap: resamples, such as 1000, for 95 % intervals of all averages
            (`Result.intervals`); 0 for none.
        bootstrap_over: ``"classes"``: classes are drawn again, each with all its queries, as
            queries of one class are not independent; or ``"queries"``. The gallery stays as it is.
        seed: of the resamples, which are the same at all dims.
        block_bytes: bound on the working memory. Queries are taken in order of R, in blocks whose
            lists of R candidates fit; one query's own list of R (at most Ng) always fits.
        process_group: ranks that all call this with the same arguments: each searches for a part of
            the queries, and all return the same.

    Returns:
        The results, in the order of `dims`.

    Raises:
        TypeError: a type is wrong.
        ValueError: no query has a relevant item, NaN or infinity, or shapes, devices or values that
            do not fit.

    Warns:
        UserWarning: nearest gallery items are the queries themselves (the same rows, but for scale
            and rounding to half precision).
    """
    ranks = Ranks(process_group)
    with ranks.together():
        check_rows("queries", queries)
        if gallery is not None:
            check_rows("gallery", gallery)
        task = checked_task(
            queries, query_labels, gallery, gallery_labels, query_groups, gallery_groups
        )
        options = checked_options(
            queries.shape[1], dims, ks, codes, index, bootstrap, bootstrap_over, seed, block_bytes
        )
        # All of them on every rank, which will meet some only: all raise, or none.
        for name, rows in (("queries", queries), ("gallery", gallery)):
            if rows is not None:
                _check_finite(name, rows[:, : max(options.dims)], block_bytes)
    return evaluate_task(task, options, ranks)


def evaluate_task(task: Task, options: Options, ranks: Ranks) -> list[Result]:
    """`evaluate`, of rows that are finite; the options are checked."""
    queries, gallery, groups = task.queries, task.gallery, task.groups
    query_labels, gallery_labels = task.query_labels, task.gallery_labels
    dims, ks = options.dims, options.ks
    _check_same_on_ranks(
        ranks,
        {
            "shapes": [list(queries.shape), list(gallery.shape)],
            "dims": dims,
            "ks": ks,
            "codes": options.codes,
            "index": options.index,
            "bootstrap": [options.bootstrap, options.bootstrap_over, options.seed],
            "query_labels (CRC-32)": query_labels,
            "gallery_labels (CRC-32)": gallery_labels,
            "groups (CRC-32)": None if groups is None else torch.cat([g.long() for g in groups]),
        },
    )

    labelled = query_labels >= 0
    relevant = num_relevant(query_labels, gallery_labels, groups, task.exclude_self)  # R, [Nq]
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
    num_distractors = int(has_no_label(gallery_labels).sum())
    unit = _units(query_labels[counted], options)
    counted = counted[ranks.rank :: ranks.world_size]  # so that ranks have as much to do
    longest = relevant[counted].tolist()

    searched: tuple[Matrix, Matrix] = queries, gallery
    if options.codes is not None:
        searched = CodedRows(queries, options.codes), CodedRows(gallery, options.codes)
    tie = against_the_model(query_labels, gallery_labels)
    base: dict[str, Any] = {
        "exclude_self": task.exclude_self, "groups": groups, "block_bytes": options.block_bytes,
    }  # fmt: skip
    results, copies = [], 0.0
    for dim in dims:
        # Sums over queries: of their figures, and of how many find themselves.
        sums = torch.zeros(2 * len(ks) + 3, dtype=torch.float64, device=query_labels.device)
        of_units = None if unit is None else UnitSums(unit, len(sums) - 1, ranks)
        search: Search = best_keys
        how = base | {"dim": dim}
        if options.index != "exact":
            with ranks.together():
                search = FaissSearch(options.index, gallery, dim, options.block_bytes)
        for ids, keys in search(
            *searched, counted, lambda at: min(max(longest[at], *ks), len(gallery)), tie, **how
        ):
            figures = values(keys, relevant[ids], ks)
            sums[:-1] += figures.sum(0)
            if of_units is not None:
                of_units.add(figures)
            if not task.exclude_self and dim == max(dims):
                sums[-1] += num_copies(queries, gallery, ids, keys[:, 0], options.block_bytes)
        *means, copied = (ranks.sum(sums) / n).tolist()
        copies = max(copies, copied * n)
        index_recall = None
        if search is not best_keys:
            k = min(max(ks), len(gallery))
            hits = ranks.sum(found_of_exact(search, counted, k, *searched, tie, **how)).tolist()
            index_recall = hits[0] / hits[1]
        found = None
        if of_units is not None:
            of_all = intervals(
                ranks.sum(of_units.sums), options.bootstrap, options.seed, options.block_bytes
            )
            found = dict(zip(names(ks), of_all, strict=True))
        recall, (map_at_r, r_precision), map_at_k = (
            means[: len(ks)], means[len(ks) : -len(ks)], means[-len(ks) :]
        )  # fmt: skip
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
                intervals=found,
                codes=options.codes,
                search=options.index,
                index_recall=index_recall,
            )
        )
    if copies and ranks.is_first:
        warnings.warn(
            f"gallery: {round(copies):,} of the {n:,} queries find a row in it that is their own. "
            "If these are the queries themselves, they say nothing about the model: leave the "
            "gallery out, or give a query and its copy one group",
            stacklevel=4,  # `evaluate` and its no_grad are in between
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


def _units(labels: Tensor, options: Options) -> Tensor | None:
    """The unit of each counted query that is drawn with it, 0, 1, ...; None without a bootstrap."""
    if not options.bootstrap:
        return None
    if options.bootstrap_over == "queries":
        return torch.arange(len(labels), device=labels.device)
    found, unit = labels.unique(return_inverse=True)
    if len(found) == 1:
        raise ValueError(
            "bootstrap: all queries that count have one label, and a bootstrap over classes needs "
            'several; bootstrap_over="queries" draws queries'
        )
    return unit


def _check_finite(name: str, rows: Tensor, block_bytes: int) -> None:
    block = max(1, block_bytes // (VALUE_BYTES * rows.shape[1]))
    for start in range(0, len(rows), block):
        check_finite(name, rows[start : start + block], start)
