"""Retrieval quality of features that lie in files, and stay there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from unicom_ext.data.labels import check_same_images, read_integers, read_labels
from unicom_ext.data.source import ENCODER, Source, encoder_of
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.retrieval.arguments import check_counts, check_same_width
from unicom_ext.retrieval.classify import knn_accuracy, linear_probe
from unicom_ext.retrieval.evaluation import checked_options, checked_task, evaluate_task
from unicom_ext.retrieval.metrics import Result
from unicom_ext.retrieval.relevance import has_no_label
from unicom_ext.utils.arrays import check_finite
from unicom_ext.utils.search import DEFAULT_BLOCK_BYTES, VALUE_BYTES

_READ_BYTES = 1 << 20


class FeatureKwargs(TypedDict, total=False):
    """Which features, as in `unicom-ext cluster`; see `unicom_ext.data.source.Source`."""

    joint: str
    image_weight: float
    image_column: str
    text_column: str


def evaluate_files(
    features: str | Path,
    labels: str | Path,
    gallery: str | Path | None = None,
    gallery_labels: str | Path | None = None,
    *,
    groups: str | Path | None = None,
    gallery_groups: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    **which: Unpack[FeatureKwargs],
) -> list[Result]:
    """`retrieval.evaluate` of the rows of feature files, which are read a block at a time.

    features, gallery       see `unicom_ext.data.formats`: [n, d] each; without a gallery each row
                            is searched among the others
    labels, gallery_labels  .npy files of integers [n] below 2^63, or directories of labels_*.npy,
                            which belong to the shards of the same number; a negative label is none,
                            as in `retrieval.evaluate`. Those of a gallery may be [n, P]
    groups, gallery_groups  files like those of labels: the `query_groups` and `gallery_groups` of
                            `retrieval.evaluate`
    options                 of `retrieval.evaluate`: `dims`, `ks` and what follows, but for the
                            process group
    which                   features

    A row that is zero and has no label, as `unicom-ext extract` writes it of an image that cannot
    be read, is not there.

    In memory are the labels and groups and the working memory, which `block_bytes` bounds; of
    Parquet files also a row group each. The gallery is read once for each block of queries, so
    more `block_bytes` mean less reading.

    Raises ConfigError, SourceError, ValueError or TypeError; the message names the file or what is
    wrong. Warns where queries and gallery are of different encoders.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels: give both or neither")
    if gallery is None and gallery_groups is not None:
        raise ValueError("gallery_groups: was given without a gallery")
    if gallery is not None and (groups is None) != (gallery_groups is None):
        raise ValueError("groups and gallery_groups: give both or neither")
    source = Source(features, **which)
    checked = checked_options(source.dim, **(options or {}))
    zero = find_zero_rows("features", source, checked.block_bytes)
    check_same_images("labels", labels, source.images, "those of the features")
    query_labels = torch.from_numpy(read_labels("labels", labels, source.rows, source.shards))
    query_groups = _integers("groups", groups, source)
    queries, query_labels, query_groups = _readable(source, zero, query_labels, query_groups)
    items = item_labels = item_groups = None
    if gallery is not None:
        source = Source(gallery, **which)
        _check_same_encoder("gallery", gallery, features, which)
        assert gallery_labels is not None
        check_same_images("gallery_labels", gallery_labels, source.images, "those of the gallery")
        zero = find_zero_rows("gallery", source, checked.block_bytes)
        item_labels = _integers("gallery_labels", gallery_labels, source, several=True)
        assert item_labels is not None
        item_groups = _integers("gallery_groups", gallery_groups, source)
        items, item_labels, item_groups = _readable(source, zero, item_labels, item_groups)
    task = checked_task(queries, query_labels, items, item_labels, query_groups, item_groups)
    return evaluate_task(task, checked, Ranks(None))


def _check_same_encoder(
    name: str, path: str | Path, other: str | Path, which: FeatureKwargs
) -> None:
    """Warns where image features that `unicom-ext extract` has written are of different encoders.
    The same weights may lie in different files, so that this is no error."""
    here, there = encoder_of(Path(path)), encoder_of(Path(other))
    if here is None or there is None or which.get("joint") == "text":
        return
    if differ := [setting for setting in here if here[setting] != there[setting]]:
        fitted = Path(other) / ENCODER
        warnings.warn(
            f"{name}: {path} has features of another encoder than {other} ({', '.join(differ)}): "
            "cosines between them say nothing"
            + (f". To have the same, extract them with --weights {fitted}" * fitted.exists()),
            stacklevel=3,
        )


def _readable(
    source: Source, zero: Tensor, labels: Tensor, groups: Tensor | None
) -> tuple[StoredRows, Tensor, Tensor | None]:
    """Rows, labels and groups without those of images that could not be read, which are zero and
    have no label."""
    there = ~(zero & has_no_label(labels))
    if there.all():
        return StoredRows(source), labels, groups
    rows = StoredRows(source, there.nonzero().flatten().numpy())
    return rows, labels[there], None if groups is None else groups[there]


class ProbeResult(NamedTuple):
    """How well rows cut to `dim` leading dimensions are classified."""

    dim: int
    knn: dict[int, float]  # accuracy by k
    linear: float
    l2: float  # of the linear probe
    num_train: int  # rows with a label
    num_test: int


def probe_files(
    train: str | Path,
    labels: str | Path,
    test: str | Path,
    test_labels: str | Path,
    *,
    dims: Sequence[int] | None = None,
    k: Sequence[int] = (1, 20),
    temperature: float = 0.07,
    seed: int = 0,
    **which: Unpack[FeatureKwargs],
) -> list[ProbeResult]:
    """`retrieval.knn_accuracy` and `linear_probe` of feature files, which are read into memory.

    train, test          as the features of `evaluate_files`, and so are their labels
    dims                 numbers of leading dimensions; None: all
    k, temperature, seed of the two functions
    which                features

    Raises as `evaluate_files` does.
    """
    rows, numbers = [], []
    for names, path, of in (
        (("train", "labels"), train, labels),
        (("test", "test_labels"), test, test_labels),
    ):
        source = Source(path, **which)
        find_zero_rows(names[0], source, DEFAULT_BLOCK_BYTES)
        check_same_images(names[1], of, source.images, "those of the features")
        rows.append(source.take(np.arange(source.rows)))
        found = read_labels(names[1], of, source.rows, source.shards)
        numbers.append(torch.from_numpy(found))
    check_same_width("test", rows[1], "training rows", rows[0])
    _check_same_encoder("test", test, train, which)
    width = rows[0].shape[1]
    results = []
    for dim in check_counts("dims", [width] if dims is None else dims, width):
        x, y = (part[:, :dim] for part in rows)
        knn = knn_accuracy(x, numbers[0], y, numbers[1], k, temperature=temperature)
        linear = linear_probe(x, numbers[0], y, numbers[1], seed=seed)
        counts = (int((of >= 0).sum()) for of in numbers)
        results.append(ProbeResult(dim, knn, linear.accuracy, linear.l2, *counts))
    return results


class StoredRows:
    """The rows of feature files as a `unicom_ext.utils.search.Matrix`: fp32, read when they are
    asked for.

    Args:
        source: the files.
        kept: which of their rows, in increasing order; None: all.
    """

    device = torch.device("cpu")

    def __init__(self, source: Source, kept: np.ndarray | None = None) -> None:
        self._source = source
        self._kept = np.arange(source.rows) if kept is None else kept
        self.shape = torch.Size((len(self._kept), source.dim))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: tuple[slice | Tensor, slice]) -> Tensor:
        rows, columns = index
        if isinstance(rows, Tensor):
            order = rows.argsort()
            found = self._read(self._kept[rows[order].numpy()], columns)
            return found[order.argsort()]
        return self._read(self._kept[rows], columns)

    def _read(self, rows: np.ndarray, columns: slice) -> Tensor:
        """Rows in increasing order. Files give whole ones: so many at a time that they take no more
        than what is wanted of them, or than is too little to be worth a call."""
        dim = columns.stop
        part = max(
            _READ_BYTES // (8 * self._source.dim), len(rows) * dim // (2 * self._source.dim), 1
        )
        found = torch.empty(len(rows), dim)
        for start in range(0, len(rows), part):
            found[start : start + part] = self._source.take(rows[start : start + part])[:, columns]
        return found


def find_zero_rows(name: str, source: Source, block_bytes: int) -> Tensor:
    """Which rows are zero, bool [n]. SourceError with file and row where one is not finite."""
    size = max(1, block_bytes // (4 * VALUE_BYTES * source.dim))
    found = []
    for shard, start, rows in source.blocks(size=size):
        files = " and ".join(str(file.path) for file in shard.files)
        check_finite(f"{name}: {files}", rows, start)
        found.append(~rows.any(dim=1))
    return torch.cat(found)


def _integers(
    name: str, path: str | Path | None, source: Source, several: bool = False
) -> Tensor | None:
    """int64 [n], one for each row of the source, with `several` also [n, P]; None where there is
    no file."""
    if path is None:
        return None
    return torch.from_numpy(read_integers(name, path, source.rows, source.shards, several))
