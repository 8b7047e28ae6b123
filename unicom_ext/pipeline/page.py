"""What a pipeline found, as the page report.html."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext import report
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts
from unicom_ext.data.labels import read_labels
from unicom_ext.data.source import Source
from unicom_ext.pipeline.table import rows
from unicom_ext.train.report import page as page_of_run


def page(
    metrics: dict[str, Any], figures: dict[str, Any], parts: Parts, clusters: Path, features: Path
) -> report.Page:
    """The page of the last run, with what the steps before it found.

    Args:
        metrics: of that run.
        figures: as evaluation/figures.json has them.
        parts: the images.
        clusters: directory of the labels of the training images.
        features: directory of the test images' features by the last encoder.
    """
    assert parts.query is not None
    query = _embedded(features / "query", parts.query)
    gallery = None if parts.gallery is None else _embedded(features / "gallery", parts.gallery)
    labels = read_labels("clusters", clusters, len(parts.train))
    found = report.Clusters(labels, parts.train)
    of_run = page_of_run(metrics, parts.train, query, gallery, found)
    compared = rows(figures)
    *_, last = compared
    return replace(of_run, methods=report.Methods(compared, last))


def _embedded(features: Path, images: ImageSet) -> Embedded:
    """Those that could be read: rows of the others are zero."""
    source = Source(features)
    embeddings = source.take(np.arange(source.rows))
    kept = embeddings.any(dim=1)
    return Embedded(embeddings[kept], images.take(np.flatnonzero(kept.numpy())))
