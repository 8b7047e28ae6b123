"""Pseudo-classes: spherical k-means over image and text features that stream from disk.

`unicom-ext cluster` on the command line, `cluster(ClusterConfig(...), input, output)` in Python;
`nearest` and `Centroids` are the search alone, `UnitSums` is where the centroids come from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicom_ext.cluster.config import ClusterConfig
    from unicom_ext.cluster.driver import cluster
    from unicom_ext.cluster.nearest import Centroids, nearest
    from unicom_ext.cluster.quality import Quality, quality
    from unicom_ext.cluster.sums import UnitSums

__all__ = [
    "Centroids", "ClusterConfig", "Quality", "UnitSums", "cluster", "nearest", "quality",
]  # fmt: skip

# Loaded at first use, so that the command line can read the settings without torch.
_HOME = {
    "Centroids": "nearest",
    "ClusterConfig": "config",
    "Quality": "quality",
    "UnitSums": "sums",
    "cluster": "driver",
    "nearest": "nearest",
    "quality": "quality",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Some functions are named like the module they live in, which the import has put here.
    for public, home in _HOME.items():
        globals()[public] = getattr(import_module(f"{__name__}.{home}"), public)
    return globals()[name]
