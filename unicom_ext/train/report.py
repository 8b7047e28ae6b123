"""What a run found: a table for the terminal and one HTML file with everything inside."""

from __future__ import annotations

import base64
import importlib.resources
import io
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.data.images.settings import GLYPHS
from unicom_ext.retrieval import topk
from unicom_ext.utils.files import write_atomically

MODEL = "our model"
TOP = 5
EXAMPLES = 12  # queries in each picture
SIDE = 32  # of an image there
CELL = 40  # from one image of a picture to the next, in pixels of the images
RIGHT, WRONG, OURS = "#1a7f37", "#cf222e", "#0969da"
OTHERS = "#8c959f", "#bf8700", "#1a7f37", "#bf3989"  # lines of the baselines


def methods(metrics: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results to compare: the baselines, then the model at its last evaluation."""
    return {**metrics["baselines"], MODEL: metrics["evaluations"][-1]["results"]}


def table(metrics: dict[str, Any]) -> Table:
    """Recall@1 of every method at every dimension, for the terminal."""
    dims = metrics["config"]["dims"]
    data = metrics["data"]
    grid = Table(
        title=f"Recall@1 on unseen {noun(metrics)}",
        caption=f"{data['test_images']:,} images of {data['test_classes']:,} {noun(metrics)}, each "
        "searched among "
        + (f"{data['gallery_images']:,}" if "gallery_images" in data else "all the others"),
    )
    grid.add_column("dimensions")
    for dim in dims:
        grid.add_column(str(dim), justify="right")
    rows = methods(metrics)
    best = {d: max(_at(results, d, "1") or 0 for results in rows.values()) for d in dims}
    for name, results in rows.items():
        cells = []
        for dim in dims:
            recall = _at(results, dim, "1")
            text = "-" if recall is None else f"{recall:.3f}"
            cells.append(f"[bold green]{text}[/]" if recall == best[dim] else text)
        grid.add_row(name, *cells)
    return grid


def noun(metrics: dict[str, Any]) -> str:
    """What a class is called."""
    return "characters" if metrics["config"].get("data", GLYPHS) == GLYPHS else "classes"


def write(
    output: Path,
    metrics: dict[str, Any],
    query: Embedded,
    gallery: Embedded | None,
    rng: np.random.Generator,
) -> None:
    """Write report.html to `output`."""
    found = Neighbours.search(query, gallery)
    shown = Shown(query.images, (gallery or query).images, noun(metrics) == "characters")
    failures = np.flatnonzero(~found.right[:, 0])
    pictures = {
        "loss": loss_curve(metrics),
        "recall": recall_against_dimension(metrics),
        "examples": grid(shown, found, _draw(rng, np.arange(len(query.images)))),
        "failures": grid(shown, found, _draw(rng, failures)) if len(failures) else None,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = importlib.resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    rows = methods(metrics)
    page = environment.from_string(template).render(
        metrics=metrics,
        noun=noun(metrics),
        dims=metrics["config"]["dims"],
        methods=rows,
        at=_at,
        top=TOP,
        pictures={name: figure and _embedded(figure) for name, figure in pictures.items()},
    )
    write_atomically(output / "report.html", lambda file: file.write(page.encode()))


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of the gallery, or other images, of each query, best first."""

    index: np.ndarray  # [n, k] int64
    cosine: np.ndarray  # [n, k] fp32
    right: np.ndarray  # [n, k] bool: of the same class

    @classmethod
    def search(cls, query: Embedded, gallery: Embedded | None) -> Neighbours:
        k = min(TOP, len(query.images) - 1 if gallery is None else len(gallery.images))
        among = None if gallery is None else gallery.embeddings
        cosine, index = (found.numpy() for found in topk(query.embeddings, among, k))
        labels = query.images.labels
        right = (gallery or query).images.labels[index] == labels[:, None]
        return cls(index, cosine, right & (labels >= 0)[:, None])


@dataclass(frozen=True)
class Shown:
    """The images of a picture: queries, and what they are searched among."""

    queries: ImageSet
    gallery: ImageSet
    inverted: bool  # dark on white

    def pixels(self, images: ImageSet, index: int) -> np.ndarray:
        """uint8 [SIDE, SIDE] or [SIDE, SIDE, 3]."""
        picture = images.read(index)
        pixels = np.asarray(Preprocessing(SIDE, picture.mode, (), ())(picture))
        return 255 - pixels if self.inverted else pixels


def loss_curve(metrics: dict[str, Any]) -> Figure:
    loss = np.array(metrics["loss"])
    window = min(25, len(loss))
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(loss) + 1), loss, color=OURS, alpha=0.25, linewidth=0.8)
    middle = np.arange(len(smooth)) + (window + 1) / 2  # of each window
    axes.plot(middle, smooth, color=OURS)
    axes.set(xlabel="step", ylabel="loss (faint: each step)", ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def recall_against_dimension(metrics: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    others = cycle(OTHERS)
    for name, results in methods(metrics).items():
        ours = name == MODEL
        axes.plot(
            [r["dim"] for r in results],
            [r["recall"]["1"] for r in results],
            marker="o",
            label=name,
            linewidth=2.5 if ours else 1.2,
            color=OURS if ours else next(others),
            zorder=3 if ours else 2,
        )
    dims = metrics["config"]["dims"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="dimensions", ylabel="Recall@1")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure


def grid(shown: Shown, found: Neighbours, queries: np.ndarray) -> Figure:
    """Each query, two to a line: its image, then its nearest images, framed by right and wrong.

    Below stand the name of its class and, if the nearest is of another one, the name of that.
    """
    across = min(2, len(queries))
    down = -(-len(queries) // across)
    width = (1 + found.index.shape[1]) * CELL + CELL // 2  # of a query with its neighbours
    height = CELL + 28  # with a line of text above and two below
    figure = Figure(figsize=(across * width / 60, down * height / 60))
    # One coordinate system of pixels for everything; a hundred axes would take seconds to lay out.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across * width), ylim=(down * height, 0))
    axes.axis("off")

    def picture(image: np.ndarray, left: int, top: int, caption: str, colour: str) -> None:
        size = image.shape[0]
        axes.imshow(
            image, cmap="gray", vmin=0, vmax=255, aspect="auto",
            extent=(left, left + size, top + size, top),
        )  # fmt: skip
        axes.add_patch(
            Rectangle((left - 1, top - 1), size + 2, size + 2, fill=False, ec=colour, lw=2)
        )
        axes.text(left + size / 2, top - 4, caption, color=colour, ha="center", fontsize=8)

    for place, query in enumerate(queries):
        left = place // down * width + CELL // 4
        top = place % down * height + 12
        picture(shown.pixels(shown.queries, query), left, top, "query", "black")
        name = shown.queries.class_name(query)
        if not found.right[query, 0]:
            name += "\nnearest: " + shown.gallery.class_name(found.index[query, 0])
        axes.text(left, top + CELL - 4, name, color="#59636e", va="top", fontsize=7)
        for rank, neighbour in enumerate(found.index[query]):
            left += CELL
            right = found.right[query, rank]
            caption = f"{'✓' if right else '✗'} {found.cosine[query, rank]:.2f}"
            image = shown.pixels(shown.gallery, neighbour)
            picture(image, left, top, caption, RIGHT if right else WRONG)
    axes.set(xlim=(0, across * width), ylim=(down * height, 0))  # imshow has changed them
    return figure


def _draw(rng: np.random.Generator, among: np.ndarray) -> np.ndarray:
    return np.sort(rng.choice(among, size=min(EXAMPLES, len(among)), replace=False))


def _at(results: list[dict[str, Any]], dim: int, k: str) -> float | None:
    """Recall@k at a dimension; None if the method was not evaluated there."""
    return next((r["recall"][k] for r in results if r["dim"] == dim), None)


def _embedded(figure: Figure) -> str:
    """The figure as a data URL."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
