"""Partial margin softmax for PyTorch: train embeddings on very many classes.

`PartialMarginSoftmax` draws a part of the classes and of the feature dimensions at each step, and
computes margin softmax cross entropy on them in one operator that never stores the logits. See
UNICOM (arXiv:2304.05884) and PartialFC (arXiv:2203.15565).
"""

from unicom_ext.cpu import cpu_capability, set_cpu_capability
from unicom_ext.functional import Metrics, partial_margin_softmax
from unicom_ext.loss import PartialMarginSoftmax, Selection
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace, SphereFace

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "Metrics",
    "PartialMarginSoftmax",
    "Selection",
    "SphereFace",
    "cpu_capability",
    "partial_margin_softmax",
    "set_cpu_capability",
]
