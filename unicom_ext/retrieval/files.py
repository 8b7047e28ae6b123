"""Retrieval quality of features that lie in files, and stay there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicom_ext.data.labels import read_integers, read_labels
from unicom_ext.data.source import Source
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.retrieval.evaluation import checked_options, checked_task, evaluate_task
from unicom_ext.retrieval.metrics import Result
from unicom_ext.utils.arrays import check_finite
from unicom_ext.utils.search import VALUE_BYTES

_READ_BYTES = 1 << 20


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
    **options: Any,
) -> list[Result]:
    """`retrieval.evaluate` of the rows of feature files, which are read a block at a time.

    features, gallery       see `unicom_ext.data.formats`: [n, d] each; without a gallery each row
                            is searched among the others
    labels, gallery_labels  .npy files of integers [n] below 2^63, or directories of labels_*.npy,
                            which belong to the shards of the same number; a negative label is none,
                            as in `retrieval.evaluate`
    groups, gallery_groups  files like those of labels: the `query_groups` and `gallery_groups` of
                            `retrieval.evaluate`
    joint, image_weight, image_column, text_column
                            which features, as in `unicom-ext cluster`
    options                 the other keywords of `retrieval.evaluate`, but for `process_group`

    In memory are the labels and groups and the working memory, which `block_bytes` bounds; of
    Parquet files also a row group each. The gallery is read once for each block of queries, so
    more `block_bytes` mean less reading.

    Raises ConfigError, SourceError, ValueError or TypeError; the message names the file or what is
    wrong.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: give both or neither")
    if gallery is None and gallery_groups is not None:
        raise ValueError("gallery_groups: was given without a gallery")
    if gallery is not None and (groups is None) != (gallery_groups is None):
        raise ValueError("groups and gallery_groups: give both or neither")

    def open_rows(path: str | Path) -> StoredRows:
        columns = {"image_column": image_column, "text_column": text_column}
        return StoredRows(Source(path, joint=joint, image_weight=image_weight, **columns))

    queries = open_rows(features)
    checked = checked_options(queries.shape[1], **options)
    queries.check_finite("features", checked.block_bytes)
    source = queries.source
    query_labels = torch.from_numpy(read_labels("labels", labels, source.rows, source.shards))
    query_groups = _integers("groups", groups, source)
    items = None
    if gallery is not None:
        items = open_rows(gallery)
        items.check_finite("gallery", checked.block_bytes)
        source = items.source
    task = checked_task(
        queries,
        query_labels,
        items,
        _integers("gallery_labels", gallery_labels, source),
        query_groups,
        _integers("gallery_groups", gallery_groups, source),
    )
    return evaluate_task(task, checked, Ranks(None))


class StoredRows:
    """The rows of feature files as a `unicom_ext.utils.search.Matrix`: fp32, read when they are
    asked for.

    Args:
        source: the files.
    """

    device = torch.device("cpu")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shape = torch.Size((source.rows, source.dim))

    def __len__(self) -> int:
        return self.source.rows

    def __getitem__(self, index: tuple[slice | Tensor, slice]) -> Tensor:
        rows, columns = index
        if isinstance(rows, Tensor):
            order = rows.argsort()
            found = self._read(rows[order].numpy(), columns)
            return found[order.argsort()]
        return self._read(np.arange(rows.start, rows.stop), columns)

    def _read(self, rows: np.ndarray, columns: slice) -> Tensor:
        """Rows in increasing order. Files give whole ones: so many at a time that they take no more
        than what is wanted of them, or than is too little to be worth a call."""
        dim = columns.stop
        part = max(
            _READ_BYTES // (8 * self.source.dim), len(rows) * dim // (2 * self.source.dim), 1
        )
        found = torch.empty(len(rows), dim)
        for start in range(0, len(rows), part):
            found[start : start + part] = self.source.take(rows[start : start + part])[:, columns]
        return found

    def check_finite(self, name: str, block_bytes: int) -> None:
        """SourceError with the file and the row where one is not."""
        size = max(1, block_bytes // (4 * VALUE_BYTES * self.source.dim))
        for shard, start, rows in self.source.blocks(size=size):
            files = " and ".join(str(file.path) for file in shard.files)
            check_finite(f"{name}: {files}", rows, start)


def _integers(name: str, path: str | Path | None, source: Source) -> Tensor | None:
    """int64 [n], one for each row of the source; None where there is no file."""
    if path is None:
        return None
    return torch.from_numpy(read_integers(name, path, source.rows, source.shards))
