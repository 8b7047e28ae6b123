"""Exact retrieval: `evaluate` (Recall@K, mAP@K, mAP@R and more) and `topk`, in bounded memory."""

from unicom_ext.retrieval.codes import encode
from unicom_ext.retrieval.evaluation import evaluate
from unicom_ext.retrieval.metrics import Result
from unicom_ext.retrieval.search import topk

__all__ = ["Result", "encode", "evaluate", "topk"]
