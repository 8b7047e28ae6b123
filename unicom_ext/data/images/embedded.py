"""Embeddings with the images that they are of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unicom_ext.data.images.imageset import ImageSet


class Embedded(NamedTuple):
    """Embeddings of the images of a set that can be read."""

    embeddings: Tensor  # fp32 [n, d]
    images: ImageSet  # n
