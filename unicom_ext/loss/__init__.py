"""The partial margin softmax: a module, a function, on several ranks, and in plain PyTorch."""

from unicom_ext.loss.module import PartialMarginSoftmax, Selection

__all__ = ["PartialMarginSoftmax", "Selection"]
