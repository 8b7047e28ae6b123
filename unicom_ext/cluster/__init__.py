"""Pseudo-classes: spherical k-means over image and text features that stream from disk."""

from unicom_ext.cluster.nearest import Centroids, add_unit_rows, nearest

__all__ = ["Centroids", "add_unit_rows", "nearest"]
