"""Public path of `unicom_ext.loss.margins`."""

from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace, SphereFace

__all__ = ["ArcFace", "CombinedMargin", "CosFace", "SphereFace"]
