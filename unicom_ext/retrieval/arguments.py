"""What retrieval takes, and what is said of what it does not take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index as as_int

import torch
from torch import Tensor

from unicom_ext.utils.search import LAST_ROW, Matrix

FAISS = "faiss:"  # how an index of faiss is named


def check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, must be a torch.Tensor [N, d]")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a {x.layout} tensor, must be a dense one")
    if not x.is_floating_point():
        raise TypeError(f"{name}: got dtype {x.dtype}, must be floating point")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {list(x.shape)}, must be [N, d] with d >= 1")


def check_gallery(queries: Matrix, gallery: Matrix) -> None:
    """Of rows that `check_rows` has seen."""
    check_same_width("gallery", gallery, "queries", queries)
    if len(gallery) > LAST_ROW + 1:
        raise ValueError(f"gallery: got {len(gallery)} rows, at most 2^31 are allowed")


def check_same_width(name: str, rows: Matrix, others_name: str, others: Matrix) -> None:
    """Both have as many dimensions, and are on one device."""
    if rows.shape[1] != others.shape[1]:
        raise ValueError(
            f"{name}: got {rows.shape[1]} dimensions, the {others_name} have {others.shape[1]}"
        )
    if rows.device != others.device:
        raise ValueError(f"{name}: is on {rows.device}, the {others_name} are on {others.device}")


def check_block_bytes(block_bytes: int) -> None:
    if as_int(block_bytes) < 1:
        raise ValueError(f"block_bytes: got {block_bytes}, must be at least 1")


def check_codes(codes: str) -> None:
    if codes not in ("int8", "binary"):
        raise ValueError(f"codes: got {codes!r}, must be 'int8' or 'binary'")


def check_index(index: str, codes: str | None) -> None:
    if not isinstance(index, str) or (index != "exact" and not index.startswith(FAISS)):
        raise ValueError(
            f"index: got {index!r}, must be 'exact', or 'faiss:' and what faiss.index_factory takes"
        )
    if index != "exact" and codes is not None:
        raise ValueError("index and codes: give one; an index of faiss has codes of its own")


def check_bootstrap(resamples: int, over: str, seed: int) -> None:
    resamples = check_int("bootstrap", resamples)
    if resamples != 0 and resamples < 100:
        raise ValueError(
            f"bootstrap: got {resamples}, must be 0, for no intervals, or at least 100 resamples"
        )
    if over not in ("classes", "queries"):
        raise ValueError(f"bootstrap_over: got {over!r}, must be 'classes' or 'queries'")
    check_seed(seed)


def check_seed(seed: int) -> int:
    seed = check_int("seed", seed)
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: got {seed}, must be from 0 to 2^63 - 1")
    return seed


def check_int(name: str, value: int) -> int:
    try:
        return as_int(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, must be an int") from None


def check_positive(name: str, value: float) -> float:
    """A finite number above 0."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, must be a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, must be a finite number above 0")
    return float(value)


def check_groups(
    queries: Matrix,
    query_groups: Tensor | None,
    gallery: Matrix,
    gallery_groups: Tensor | None,
    exclude_self: bool,
) -> tuple[Tensor, Tensor] | None:
    """Groups of queries and gallery, checked; None where none were given."""
    if exclude_self:
        if gallery_groups is not None:
            raise ValueError("gallery_groups: was given without a gallery, must be None")
        gallery_groups = query_groups
    check_both("query_groups", query_groups, "gallery_groups", gallery_groups)
    if query_groups is None or gallery_groups is None:
        return None
    check_integers("query_groups", query_groups, "queries", queries)
    check_integers("gallery_groups", gallery_groups, "gallery", gallery)
    return query_groups, gallery_groups


def check_both(name: str, value: object, other_name: str, other: object) -> None:
    if (value is None) != (other is None):
        raise ValueError(f"{name} and {other_name}: give both or neither")


def check_integers(
    name: str, values: Tensor, rows_name: str, rows: Matrix, several: bool = False
) -> None:
    """One integer for each row; with `several` also [N, P]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, must be an integer torch.Tensor")
    if values.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: got dtype {values.dtype}, must be an integer type")
    one_each = values.shape == rows.shape[:1]
    if not one_each and not (several and values.ndim == 2 and values.shape[0] == len(rows)):
        wanted = f"[{len(rows)}], one per row of {rows_name}"
        if several:
            wanted += f", or [{len(rows)}, P]"
        raise ValueError(f"{name}: got shape {list(values.shape)}, must be {wanted}")
    if values.device != rows.device:
        raise ValueError(f"{name}: is on {values.device}, {rows_name} on {rows.device}")


def check_counts(name: str, values: Sequence[int], largest: int | None) -> list[int]:
    """A non-empty list of ints from 1 to `largest`."""
    try:
        values = [as_int(v) for v in values]
    except TypeError:
        raise TypeError(f"{name}: got {values!r}, must be a list of ints") from None
    if not values or min(values) < 1 or (largest is not None and max(values) > largest):
        limit = "at least 1" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"{name}: got {values}, must be a non-empty list of ints, each {limit}")
    return values
