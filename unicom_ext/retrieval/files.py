"""Retrieval quality of features that lie in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unicom_ext.data.labels import read_integers, read_labels
from unicom_ext.data.source import Source
from unicom_ext.retrieval.evaluation import evaluate
from unicom_ext.retrieval.metrics import Result
from unicom_ext.utils.arrays import check_finite


def evaluate_files(
    features: str | Path,
    labels: str | Path,
    gallery: str | Path | None = None,
    gallery_labels: str | Path | None = None,
    *,
    groups: str | Path | None = None,
    gallery_groups: str | Path | None = None,
    joint: str = "image",
    image_weight: float = 0.5,
    image_column: str = "image_embedding",
    text_column: str = "text_embedding",
    dims: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> list[Result]:
    """`retrieval.evaluate` of the rows of feature files, all of which are read into memory.

    features, gallery       see `unicom_ext.data.formats`: [n, d] each; without a gallery each row
                            is searched among the others
    labels, gallery_labels  .npy files of integers [n] below 2^63, or directories of labels_*.npy,
                            which belong to the shards of the same number; a negative label is none,
                            as in `retrieval.evaluate`
    groups, gallery_groups  files like those of labels: the `query_groups` and `gallery_groups` of
                            `retrieval.evaluate`
    joint, image_weight, image_column, text_column
                            which features, as in `unicom-ext cluster`
    dims, ks                see `retrieval.evaluate`

    Raises ConfigError, SourceError or ValueError; the message names the file or what is wrong.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: give both or neither")
    if gallery is None and gallery_groups is not None:
        raise ValueError("gallery_groups: was given without a gallery")
    if gallery is not None and (groups is None) != (gallery_groups is None):
        raise ValueError("groups and gallery_groups: give both or neither")

    def read(name: str, path: str | Path) -> tuple[Source, Tensor]:
        source = Source(
            path,
            joint=joint,
            image_weight=image_weight,
            image_column=image_column,
            text_column=text_column,
        )
        rows = source.take(np.arange(source.rows))
        for shard in source.shards:
            files = " and ".join(str(file.path) for file in shard.files)
            check_finite(f"{name}: {files}", rows[shard.first : shard.first + shard.rows])
        return source, rows

    source, queries = read("features", features)
    query_labels = torch.from_numpy(read_labels("labels", labels, source.rows, source.shards))
    query_groups = _integers("groups", groups, source)
    items = None
    if gallery is not None:
        source, items = read("gallery", gallery)
    return evaluate(
        queries,
        query_labels,
        items,
        _integers("gallery_labels", gallery_labels, source),
        query_groups=query_groups,
        gallery_groups=_integers("gallery_groups", gallery_groups, source),
        dims=dims,
        ks=ks,
    )


def _integers(name: str, path: str | Path | None, source: Source) -> Tensor | None:
    """int64 [n], one for each row of the source; None where there is no file."""
    if path is None:
        return None
    return torch.from_numpy(read_integers(name, path, source.rows, source.shards))
