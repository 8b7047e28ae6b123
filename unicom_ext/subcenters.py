"""Public path of `unicom_ext.loss.subcenters`."""

from unicom_ext.loss.subcenters import SubCenters

__all__ = ["SubCenters"]
