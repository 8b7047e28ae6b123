"""What a clustering reads: feature files, and arrays with an entry for each of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.data.source import Source
from unicom_ext.utils.arrays import (
    check_finite,
    check_labels,
    check_some_label,
    is_floating,
    open_array,
    refused,
    to_tensor,
)
from unicom_ext.utils.settings import ConfigError


def open_source(path: Path, config: ClusterConfig) -> Source:
    """Raises SourceError (files), and ConfigError where there are fewer rows than clusters."""
    source = Source(
        path,
        joint=config.joint,
        image_weight=config.image_weight,
        image_column=config.image_column,
        text_column=config.text_column,
    )
    if config.clusters > source.rows:
        raise ConfigError(f"clusters: got {config.clusters}, but {path} has {source.rows} rows")
    return source


def open_true_labels(path: str | Path | None, rows: int) -> np.ndarray | None:
    """Integers [rows] below 2^31, mapped into memory; not all negative, which stand for none."""
    if path is None:
        return None
    labels = open_array(path, "true_labels")
    check_labels(f"true_labels: {path}", labels, rows, below=2**31)
    check_some_label(f"true_labels: {path}", labels)
    return labels


def open_images(path: str | Path | None, rows: int) -> np.ndarray | None:
    """uint8 [rows, h, w] or [rows, h, w, 3], mapped into memory."""
    if path is None:
        return None
    images = open_array(path, "images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != rows or (
        0 in images.shape or images.shape[3:] not in ((), (3,))
    ):  # fmt: skip
        raise refused(path, "images", images, f"uint8 [{rows}, h, w] or [{rows}, h, w, 3]")
    return images


def read_centroids(path: Path, k: int, dim: int) -> Tensor:
    """Initial centroids of a .npy file: unit vectors fp32 [k, dim]."""
    array = open_array(path, "init")
    if array.shape != (k, dim) or not is_floating(array.dtype):
        raise refused(path, "init", array, f"floating point [{k}, {dim}]")
    centroids = to_tensor(array).float()
    check_finite(f"init: {path}", centroids)
    return F.normalize(centroids)
