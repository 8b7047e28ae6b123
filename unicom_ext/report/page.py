"""The page: its parts, and how they become HTML."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.report import methods, queries, thumbnails
from unicom_ext.report.clusters import Clusters
from unicom_ext.report.methods import Methods
from unicom_ext.report.names import short
from unicom_ext.report.neighbours import Neighbours
from unicom_ext.report.projection import Projection
from unicom_ext.report.queries import Queries
from unicom_ext.report.training import Training
from unicom_ext.utils.files import write_file

EXAMPLES = 24  # images of `Page.examples`
UNREADABLE = 5  # names of images that could not be read
QUERIES, SHEETS, MAP, OF_TRAINING = range(4)  # streams of random numbers, one for each section


@dataclass(frozen=True)
class Headline:
    """The figure that matters: a share in [0, 1], what it is a share of, and its 95 % interval."""

    share: float
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Page:
    """What is on a page. A section whose part is not given is left out.

    title        of the page
    lead         what was trained, on what: a sentence or two of plain text
    noun         what classes are called
    seed         of all that is drawn at random
    inverted     images are light on dark, such as glyphs: a light page shows them inverted
    headline     the figure that matters
    methods      results side by side
    training     its course
    queries      embeddings of test images: queries and what they find, confused classes, a map
    clusters     of images
    examples     images to show some of, such as those that were trained on
    data         (part, images, classes) of each part of the data
    unreadable   images that could not be read: why, by name
    environment  versions, device, processor
    settings     of the run, by name
    """

    title: str
    lead: str
    noun: str = "classes"
    seed: int = 0
    inverted: bool = False
    headline: Headline | None = None
    methods: Methods | None = None
    training: Training | None = None
    queries: Queries | None = None
    clusters: Clusters | None = None
    examples: ImageSet | None = None
    data: Sequence[tuple[str, int, int]] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)


def write(path: str | os.PathLike[str], page: Page) -> None:
    """Write the page to a file, which is whole or not there.

    The same page gives the same bytes. An image that cannot be read any more is left out. Raises
    OSError, which names the file.
    """
    # A name of a file need not be valid Unicode.
    content = render(page).encode(errors="replace")
    write_file(Path(path), lambda file: file.write(content))


def render(page: Page) -> str:
    """The HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    return environment.from_string(_resource("page.html.j2")).render(
        page=page,
        style=Markup(_resource("page.css")),
        figures=methods.figures,
        interval=methods.interval,
        unreadable=list(page.unreadable)[:UNREADABLE],
        **_drawn(page),
    )


def _drawn(page: Page) -> dict[str, Any]:
    """What the sections show that is searched or drawn at random."""
    found = projection = None
    if page.queries is not None and len(page.queries.query.images):
        found = Neighbours.search(page.queries.query, page.queries.gallery)
        projection = Projection.of(page.queries.query, _random(page, MAP))
    clusters = page.clusters
    if clusters is not None and not clusters.sizes.any():
        clusters = None
    return {
        "grids": queries.grids(found, _random(page, QUERIES)) if found else [],
        "confused": queries.confused(found) if found else [],
        "projection": projection,
        "clusters": clusters,
        "sheets": clusters.sheets(_random(page, SHEETS)) if clusters else [],
        "examples": _examples(page),
    }


def _examples(page: Page) -> list[tuple[thumbnails.Thumbnail, str]]:
    if page.examples is None:
        return []
    order = _random(page, OF_TRAINING).permutation(len(page.examples))
    return [
        (small, page.examples.class_name(index))
        for index, small in thumbnails.first_readable(page.examples, order, EXAMPLES)
    ]


def _random(page: Page, stream: int) -> np.random.Generator:
    """Sections draw apart, so that none changes with what else is on the page."""
    return np.random.default_rng([page.seed, stream])


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
