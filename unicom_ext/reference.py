"""The loss in plain PyTorch, the oracle of the tests.

Public path of `unicom_ext.loss.reference`.
"""

from unicom_ext.loss.reference import Metrics, partial_margin_softmax

__all__ = ["Metrics", "partial_margin_softmax"]
