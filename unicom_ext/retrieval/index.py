"""An index of faiss in the place of the exact search: it names candidates, which are ranked as the
exact search ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unicom_ext.retrieval.arguments import FAISS
from unicom_ext.utils.search import (
    BEST_BYTES,
    NOTHING,
    VALUE_BYTES,
    Matrix,
    TieRank,
    best_keys,
    key_of,
    unit_rows,
)

_TRAINED_ON = 1 << 18  # rows at most
_SAMPLE = 1000  # queries whose candidates are compared with the exact ones

Search = Callable[..., Iterator[tuple[Tensor, Tensor]]]


class FaissSearch:
    """`unicom_ext.utils.search.best_keys` among the candidates of an index of the gallery.

    Args:
        index: "faiss:" and what `faiss.index_factory` takes, such as "faiss:HNSW32".
        gallery: rows [n, d] on the CPU.
        dim: number of leading dimensions.
        block_bytes: bound on the working memory beyond the index.

    Raises ValueError where faiss is not installed, or takes no such index of such a gallery.
    """

    def __init__(self, index: str, gallery: Matrix, dim: int, block_bytes: int) -> None:
        try:
            import faiss
        except ModuleNotFoundError:
            raise ValueError(
                f"index: got {index!r}, which needs faiss: pip install faiss-cpu"
            ) from None
        if gallery.device.type != "cpu":
            raise ValueError(f"index: got {index!r}, which needs rows on the CPU")
        block = max(1, block_bytes // (VALUE_BYTES * dim))
        try:
            self._index: Any = faiss.index_factory(
                dim, index.removeprefix(FAISS), faiss.METRIC_INNER_PRODUCT
            )
            if not self._index.is_trained:
                some = torch.arange(0, len(gallery), len(gallery) // _TRAINED_ON + 1)
                self._index.train(_unit(gallery[some, :dim]))
            for start in range(0, len(gallery), block):
                self._index.add(_unit(gallery[start : min(start + block, len(gallery)), :dim]))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"index: got {index!r}, which faiss refuses: {reason}") from None

    def __call__(
        self,
        queries: Matrix,
        gallery: Matrix,
        order: Tensor,
        list_length: Callable[[int], int],
        tie: TieRank,
        *,
        exclude_self: bool,
        groups: tuple[Tensor, Tensor] | None,
        block_bytes: int,
        dim: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        own = int(exclude_self)  # candidates that a query may not meet
        if groups is not None:
            own += int(groups[1].unique(return_counts=True)[1].max())
        start = 0
        while start < len(order):
            k = list_length(start)
            wide = min(k + own, len(gallery))
            block = max(1, block_bytes // (wide * (dim * (VALUE_BYTES + 8) + BEST_BYTES)))
            ids = order[start : start + block]
            start += len(ids)
            x = unit_rows("queries", queries[ids, :dim], ids)
            found = torch.from_numpy(self._index.search(x.float().numpy(), wide)[1])
            item = found.clamp(min=0)
            y = unit_rows("gallery", gallery[item.flatten(), :dim], item.flatten())
            # Row by row: equal rows have equal cosines.
            cosine = (y.view(*item.shape, dim) * x[:, None]).sum(2).float()
            keys = key_of(cosine, tie.of(ids[:, None], item))
            hidden = found < 0
            if exclude_self:
                hidden |= item == ids[:, None]
            if groups is not None:
                mine, theirs = groups[0][ids, None], groups[1][item]
                hidden |= (mine == theirs) & (mine >= 0)
            yield ids, keys.masked_fill_(hidden, NOTHING).topk(k, dim=1).values


def found_of_exact(search: Search, order: Tensor, k: int, *rows: Any, **how: Any) -> Tensor:
    """How many of the exact k nearest of some of the queries `order` a search finds, and how many
    there are: float64 [2]. rows, how: what both searches take."""
    if len(order) == 0:  # a rank of more than there are queries
        return torch.zeros(2, dtype=torch.float64)
    some = order[:: max(1, -(-len(order) // _SAMPLE))]
    queries, gallery, tie = rows
    found, exact = (
        torch.cat([keys for _, keys in of(queries, gallery, some, lambda _: k, tie, **how)])
        for of in (search, best_keys)
    )
    # Keys are totally ordered: what is not behind the last of the exact ones is one of them.
    hits = (found >= exact[:, -1:]) & (found != NOTHING)
    return torch.stack([hits.sum(), (exact != NOTHING).sum()]).double()


def _unit(rows: Tensor) -> Any:
    return unit_rows("gallery", rows, 0).float().numpy()
