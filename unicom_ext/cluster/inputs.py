"""What a clustering reads: feature files, and arrays with an entry for each of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.data.formats import SourceError
from unicom_ext.data.source import Source
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
    """Integers [rows] below 2^31, mapped into memory."""
    labels = _column(path, rows, "iu", (1,), "integers [rows]")
    if labels is not None and labels.max() >= 2**31:
        raise SourceError(f"{path}: classes must be below 2^31")
    return labels


def open_images(path: str | Path | None, rows: int) -> np.ndarray | None:
    """uint8 [rows, h, w] or [rows, h, w, 3], mapped into memory."""
    return _column(path, rows, "u", (3, 4), "uint8 [rows, h, w(, 3)]")


def _column(
    path: str | Path | None, rows: int, kinds: str, ndims: tuple[int, ...], wanted: str
) -> np.ndarray | None:
    """A memory-mapped .npy file with one entry for each row."""
    if path is None:
        return None
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    if array.dtype.kind not in kinds or array.ndim not in ndims or len(array) != rows:
        raise SourceError(
            f"{path}: holds {array.dtype} {list(array.shape)}, must be {wanted} with {rows} rows"
        )
    return array


def read_centroids(path: str, k: int, dim: int) -> Tensor:
    """Initial centroids of a .npy file: unit vectors fp32 [k, dim]."""
    try:
        array = np.load(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    if array.shape != (k, dim) or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise SourceError(
            f"{path}: holds {array.dtype} {list(array.shape)}, must be finite floating "
            f"point [{k}, {dim}]"
        )
    return F.normalize(torch.from_numpy(array).float())
