"""The rows of a gallery that are nearest to each query, by `unicom_ext.utils.search`."""

from __future__ import annotations

from operator import index as as_int

import torch
from torch import Tensor

from unicom_ext.retrieval.arguments import check_block_bytes, check_gallery, check_rows
from unicom_ext.utils.search import (
    DEFAULT_BLOCK_BYTES,
    best_keys,
    first_of_equals,
    id_of,
    score_of,
)


@torch.no_grad()
def topk(
    queries: Tensor,
    gallery: Tensor | None = None,
    k: int = 10,
    *,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k gallery rows with the largest cosine to each query, best first.

    Args:
        queries: [Nq, d] floating point, any norm; cosines are computed in double and rounded to
            fp32.
        gallery: [Ng, d] on the same device. None: the queries are the gallery, and each query is
            left out of its own list by its index, so an exact copy of it stays.
        k: 1 to Ng (Ng - 1 if gallery is None).
        block_bytes: bound on the working memory beyond inputs and outputs; one query with its k
            candidates is always taken.

    Returns:
        cosine fp32 [Nq, k] and index int64 [Nq, k]. At equal fp32 cosines the lower index comes
        first. A zero row has cosine 0 to everything.

    Raises:
        TypeError: a type is wrong.
        ValueError: NaN or infinity, or values, shapes or devices that do not fit.
    """
    check_rows("queries", queries)
    exclude_self = gallery is None
    gallery = queries if gallery is None else gallery
    check_rows("gallery", gallery)
    check_gallery(queries, gallery)
    check_block_bytes(block_bytes)
    available = max(len(gallery) - exclude_self, 0)
    if not 1 <= as_int(k) <= available:
        own = " without the query itself" if exclude_self else ""
        raise ValueError(f"k: got {k}, must be 1 to {available}, the rows of the gallery{own}")

    cosine = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for ids, keys in best_keys(
        queries,
        gallery,
        torch.arange(len(queries), device=queries.device),
        lambda _: k,
        first_of_equals(),
        exclude_self=exclude_self,
        block_bytes=block_bytes,
    ):
        cosine[ids] = score_of(keys)
        index[ids] = id_of(keys)
    return cosine, index
