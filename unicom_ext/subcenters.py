"""Several prototypes of a class, and what they tell of its labels.

Public path of `unicom_ext.loss.subcenters`.
"""

from unicom_ext.loss.subcenters import SubCenters

__all__ = ["SubCenters"]
