"""Exact retrieval: `evaluate` (Recall@K, mAP@R) and `topk`, in bounded memory."""

from .metrics import Result, evaluate
from .search import topk

__all__ = ["Result", "evaluate", "topk"]
