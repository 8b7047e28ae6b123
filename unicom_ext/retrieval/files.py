"""Retrieval quality of features that lie in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unicom_ext.data.labels import read_labels
from unicom_ext.data.source import Source
from unicom_ext.retrieval.metrics import Result, evaluate


def evaluate_files(
    features: str | Path,
    labels: str | Path,
    gallery: str | Path | None = None,
    gallery_labels: str | Path | None = None,
    *,
    joint: str = "image",
    image_weight: float = 0.5,
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> list[Result]:
    """`retrieval.evaluate` of the rows of feature files, all of which are read into memory.

    features, gallery       see `unicom_ext.data.formats`: [n, d] each; without a gallery each row
                            is searched among the others
    labels, gallery_labels  .npy files of integers [n] below 2^63, or directories of labels_*.npy,
                            which belong to the shards of the same number; rows with a negative
                            label take no part
    joint, image_weight     which features, as in `unicom-ext cluster`
    dims, ks                see `retrieval.evaluate`

    Raises ConfigError, SourceError or ValueError; the message names the file or what is wrong.
    """
    source = Source(features, joint=joint, image_weight=image_weight)
    found = _labelled_rows("labels", labels, source)
    others: tuple[Tensor | None, Tensor | None] = (None, None)
    if gallery is not None and gallery_labels is not None:
        source = Source(gallery, joint=joint, image_weight=image_weight)
        others = _labelled_rows("gallery_labels", gallery_labels, source)
    elif gallery is not None or gallery_labels is not None:
        raise ValueError("gallery and gallery_labels: give both or neither")
    return evaluate(*found, *others, dims=dims, ks=ks)


def _labelled_rows(name: str, path: str | Path, source: Source) -> tuple[Tensor, Tensor]:
    """The rows [n, d] that have a label, and their labels int64 [n]."""
    known = read_labels(name, path, source.rows, source.shards)
    rows = (known >= 0).nonzero()[0]
    return source.take(rows), torch.from_numpy(known[rows])
