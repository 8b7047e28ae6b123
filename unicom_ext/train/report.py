"""What a run found: a table for the terminal, and the page report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unicom_ext import report
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.settings import GLYPHS
from unicom_ext.data.labels import read_positives
from unicom_ext.report.methods import interval
from unicom_ext.train.config import Config

MODEL = "our model"
PARTS = {"train": "training", "validation": "validation", "test": "test", "gallery": "gallery"}


def methods(metrics: dict[str, Any]) -> report.Methods:
    """The results to compare: the baselines, then the model at its last evaluation."""
    return report.Methods({**metrics["baselines"], MODEL: _last(metrics)["results"]}, MODEL)


def table(metrics: dict[str, Any]) -> Table:
    """Recall@1 of every method at every dimension, for the terminal."""
    found = methods(metrics)
    grid = Table(
        title=f"Recall@1 on unseen {noun(metrics)}",
        caption=f"{_tested(metrics)}, each searched among "
        + (
            f"{metrics['data']['gallery_images']:,}"
            if "gallery_images" in metrics["data"]
            else "all the others"
        ),
    )
    grid.add_column("dimensions")
    for dim in found.dims:
        grid.add_column(str(dim), justify="right")
    for name in found.results:
        cells = []
        for dim in found.dims:
            recall = found.recall(name, dim)
            text = "-" if recall is None else f"{recall:.3f}"
            cells.append(f"[bold green]{text}[/]" if found.is_best(name, dim) else text)
        grid.add_row(name, *cells)
    return grid


def noun(metrics: dict[str, Any]) -> str:
    """What a class is called."""
    return "characters" if _is_glyphs(metrics) else "classes"


def clusters(config: Config, images: ImageSet) -> report.Clusters | None:
    """What the labels of `config` make of the images to train on; None where it names none.

    Of several labels of an image the first counts.
    """
    if not config.labels:
        return None
    labels = read_positives("labels", config.labels, len(images), config.positives)
    if labels.ndim == 2:
        labels = np.take_along_axis(labels, (labels < 0).argsort(axis=1, kind="stable"), axis=1)
        labels = labels[:, 0]
    return report.Clusters(labels, images)


def page(
    metrics: dict[str, Any],
    train: ImageSet,
    query: Embedded | None,
    gallery: Embedded | None,
    clusters: report.Clusters | None = None,
) -> report.Page:
    """The page of a run, from its metrics.json (or that of an earlier version), the images that it
    was trained on, the embedded test images and the clusters where there are any."""
    config, data = metrics["config"], metrics["data"]
    evaluated = bool(metrics["evaluations"])
    return report.Page(
        title=f"Finding {noun(metrics)} it never saw"
        if query is not None
        else f"A training on {data['train_classes']:,} {noun(metrics)}",
        lead=_lead(metrics),
        noun=noun(metrics),
        seed=config["seed"],
        inverted=_is_glyphs(metrics),
        headline=_headline(metrics) if evaluated else None,
        methods=methods(metrics) if evaluated else None,
        training=report.Training(
            metrics["loss"],
            metrics["evaluations"],
            metrics["seconds"],
            len(metrics["loss"]) * min(config["batch_size"], data["train_images"]),
        ),
        queries=None if query is None else report.Queries(query, gallery),
        clusters=clusters,
        examples=train,
        data=[
            (part, data[f"{name}_images"], data[f"{name}_classes"])
            for name, part in PARTS.items()
            if f"{name}_images" in data
        ],
        unreadable=metrics.get("unreadable", {}),
        environment={**metrics["versions"], **metrics.get("machine", {})},
        settings=config,
    )


def write(
    output: Path,
    metrics: dict[str, Any],
    train: ImageSet,
    query: Embedded | None,
    gallery: Embedded | None,
    clusters: report.Clusters | None = None,
) -> None:
    """Write report.html to `output`."""
    report.write(output / "report.html", page(metrics, train, query, gallery, clusters))


def _is_glyphs(metrics: dict[str, Any]) -> bool:
    return metrics["config"].get("data", GLYPHS) == GLYPHS


def _last(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics["evaluations"][-1]


def _part(metrics: dict[str, Any]) -> str:
    """What the last evaluation is of: "validation" where there is no test."""
    return _last(metrics).get("part", "test")


def _tested(metrics: dict[str, Any]) -> str:
    """The images of the last evaluation."""
    data, part = metrics["data"], _part(metrics)
    return f"{data[f'{part}_images']:,} images of {data[f'{part}_classes']:,} {noun(metrics)}"


def _lead(metrics: dict[str, Any]) -> str:
    data = metrics["data"]
    what = "one character, drawn in different fonts," if _is_glyphs(metrics) else "one class"
    return (
        f"A network learned to turn images into short vectors, such that images of {what} lie "
        "close together. It was trained with PartialMarginSoftmax on "
        f"{data['train_images']:,} images of {data['train_classes']:,} {noun(metrics)}."
    )


def _headline(metrics: dict[str, Any]) -> report.Headline:
    """Recall@1 at the most dimensions."""
    final = _last(metrics)["results"][-1]
    gallery = metrics["data"].get("gallery_images")
    among = f"nearest of {gallery:,} images" if gallery else "nearest other image"
    same = "character" if _is_glyphs(metrics) else "class"
    return report.Headline(
        final["recall"]["1"],
        f"Recall@1 at {final['dim']} dimensions: of {_tested(metrics)} that it was not trained "
        f"on, the share whose {among} is of the same {same}.",
        interval(final, "Recall@1"),
    )
