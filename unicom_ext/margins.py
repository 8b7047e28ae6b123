"""Margins: fixed ones, and modules that make the margins of each batch.

Public path of `unicom_ext.loss.margins` and of the modules in `unicom_ext.loss.adaptive`.
"""

from unicom_ext.loss.adaptive.class_size import ClassSizeMargin
from unicom_ext.loss.adaptive.elastic import ElasticArcFace, ElasticCosFace
from unicom_ext.loss.adaptive.norms import AdaFace, MagFace
from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace, SphereFace

__all__ = [
    "AdaFace",
    "ArcFace",
    "ClassSizeMargin",
    "CombinedMargin",
    "CosFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "MagFace",
    "SphereFace",
]
