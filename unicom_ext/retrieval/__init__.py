"""Exact retrieval: `evaluate` (Recall@K, mAP@K, mAP@R and more) and `topk`, in bounded memory, also
of what an index stores (`encode`); accuracy of a k-NN classifier and of a linear probe."""

from unicom_ext.retrieval.classify import Probe, knn_accuracy, linear_probe
from unicom_ext.retrieval.codes import encode
from unicom_ext.retrieval.evaluation import evaluate
from unicom_ext.retrieval.metrics import Result
from unicom_ext.retrieval.search import topk

__all__ = ["Probe", "Result", "encode", "evaluate", "knn_accuracy", "linear_probe", "topk"]
