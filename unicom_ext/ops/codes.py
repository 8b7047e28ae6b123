"""The options of the loss as the operators take them: two lists, in the order that stands here.

csrc/bind/ops/options.h reads them in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

REDUCTION = {"none": 0, "mean": 1, "sum": 2}
MULTI_LABEL = {"average": 0, "separate": 1}
PRECISION = {"fp32": 0, "fp16": 1, "bf16": 2}


class Reals(NamedTuple):
    """The list ``reals``, float[]."""

    m1: float
    m2: float  # 0 where each positive has its own
    m3: float  # 0 where each positive has its own
    scale: float
    filter: float  # infinity for none
    label_smoothing: float


class Codes(NamedTuple):
    """The list ``codes``, int[]."""

    exact_margin_grad: int
    linear_beyond_pi: int
    precision: int  # of PRECISION
    reduction: int  # of REDUCTION
    multi_label: int  # of MULTI_LABEL
    workspace_bytes: int
    sparse_grad: int
    num_centers: int
    wants_embeddings: int  # whether there will be a backward pass for them, or for the scale
