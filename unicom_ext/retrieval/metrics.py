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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unicom_ext.retrieval.relevance import WRONG
from unicom_ext.utils.search import NOTHING


class Result(NamedTuple):
    """Retrieval quality at `dim` leading dimensions, averaged over `num_queries` queries.

    The queries given are num_queries + num_excluded + num_unlabelled. Averages are in [0, 1].

    Attributes:
        dim: how many leading dimensions were compared.
        recall: Recall@K by K.
        map_at_r: mAP@R.
        num_queries: how many queries the averages are over.
        num_excluded: queries with a label but without a relevant item; in no average.
        r_precision: R-precision.
        map_at_k: mAP@K by K.
        num_unlabelled: queries without a label; in no average.
        num_distractors: gallery items without a label, which are wrong for every query.
        codes: what of the rows was compared.
        search: ``"exact"``, or the index of faiss.
        index_recall: share of the max(ks) nearest that an index finds.
        intervals: bounds of 95 % intervals, by the names of `figures`.
    """

    dim: int
    recall: dict[int, float]
    map_at_r: float
    num_queries: int
    num_excluded: int
    r_precision: float
    map_at_k: dict[int, float]
    num_unlabelled: int
    num_distractors: int
    codes: str | None = None
    search: str = "exact"
    index_recall: float | None = None
    intervals: dict[str, tuple[float, float]] | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The averages by their names, such as "Recall@1" and "mAP@R"."""
        averages = [self.map_at_r, self.r_precision]
        averages = [*self.recall.values(), *averages, *self.map_at_k.values()]
        return dict(zip(names(list(self.recall)), averages, strict=True))


def names(ks: Sequence[int]) -> list[str]:
    """Of the columns of `values`."""
    recall, precision = ([f"{of}@{k}" for k in ks] for of in ("Recall", "mAP"))
    return [*recall, "mAP@R", "R-precision", *precision]


def values(keys: Tensor, r: Tensor, ks: Sequence[int]) -> Tensor:
    """Each query's own figures float64 [q, 2 len(ks) + 2], of which the averages are made.

    keys: int64 [q, width], best first; r: [q], R of each, at most width.
    """
    right = (keys & WRONG == 0) & (keys != NOTHING)
    found = right.cumsum(1)
    rank = torch.arange(1, keys.shape[1] + 1, device=keys.device)
    precision = (found.double() / rank).mul_(right).cumsum(1)  # sum_{i <= rank} P(i) rel(i)
    ends = [min(k, keys.shape[1]) - 1 for k in ks]
    most = torch.stack([r.clamp(max=k) for k in ks], 1)  # min(K, R), [q, len(ks)]
    at_r = (r - 1)[:, None]
    return torch.cat(
        [
            found[:, ends] > 0,
            precision.gather(1, at_r) / r[:, None],
            found.gather(1, at_r).double() / r[:, None],
            precision[:, ends] / most,
        ],
        dim=1,
    )
