"""Public path of `unicom_ext.loss.functional`."""

from unicom_ext.loss.functional import Metrics, partial_margin_softmax

__all__ = ["Metrics", "partial_margin_softmax"]
