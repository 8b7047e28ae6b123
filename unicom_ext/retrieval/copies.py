"""Queries that lie in the gallery themselves, which makes Recall@1 say nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.utils.search import Matrix, id_of, score_of, unit_rows

_SAME = 1e-6  # unit rows as near as this in each dimension are one row, but for rounding


def num_copies(
    queries: Matrix, gallery: Matrix, ids: Tensor, nearest: Tensor, block_bytes: int
) -> int:
    """How many of the queries `ids` [q] have their own row as nearest, key `nearest` [q]."""
    near = (score_of(nearest) > 1 - torch.finfo(torch.bfloat16).eps ** 2).nonzero().flatten()
    dim, count = queries.shape[1], 0
    for part in near.split(max(1, block_bytes // (32 * dim))):
        own, other = ids[part], id_of(nearest[part])
        stored, found = queries[own, :dim], gallery[other, :dim]
        x = unit_rows("queries", stored, own).float()
        y = unit_rows("gallery", found, other).float()
        # What one of them has lost where it was stored in fewer bits.
        rounding = torch.maximum(_rounding(stored), _rounding(found))
        far = (x - y).abs() > _SAME + rounding[:, None] * torch.maximum(x.abs(), y.abs())
        count += int((~far.any(1)).sum())
    return count


def _rounding(rows: Tensor) -> Tensor:
    """Relative error, fp32 [n], of rows that are or were stored in half precision; else 0."""
    error = torch.zeros(len(rows), device=rows.device)
    for dtype in (torch.float16, torch.bfloat16):
        error[(rows.to(dtype).to(rows.dtype) == rows).all(1)] = torch.finfo(dtype).eps
    return error
