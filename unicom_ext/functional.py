"""The loss as a function of prototypes and selections of your own.

Public path of `unicom_ext.loss.functional`.
"""

from unicom_ext.loss.functional import LossKwargs, LossOptions, Metrics, partial_margin_softmax

__all__ = ["LossKwargs", "LossOptions", "Metrics", "partial_margin_softmax"]
