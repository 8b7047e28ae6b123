"""Images of a test: queries with what they find, and the pairs of classes that are confused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unicom_ext.data.images.embedded import Embedded
from unicom_ext.report.names import short
from unicom_ext.report.neighbours import NEAR, Confusion, Neighbours
from unicom_ext.report.thumbnails import Thumbnail, first_readable, thumbnail

CARDS = 8  # queries of each kind
PAIRS = 12  # of classes


@dataclass(frozen=True, eq=False)
class Queries:
    """Of a test.

    query    the images to look for
    gallery  what they are searched in; None: the other queries
    """

    query: Embedded
    gallery: Embedded | None = None


class Answer(NamedTuple):
    picture: Thumbnail | None  # None: it cannot be read any more
    name: str  # of its class
    cosine: float
    right: bool


class Card(NamedTuple):
    """A query and what it finds, best first."""

    picture: Thumbnail
    name: str
    answers: list[Answer]
    note: str


class Grid(NamedTuple):
    title: str
    text: str
    total: int  # that the cards are drawn from
    cards: list[Card]


class ConfusedPair(NamedTuple):
    names: tuple[str, str]
    counts: tuple[int, int]  # queries of the first that find the second, and the other way round
    totals: tuple[int, int]  # queries of each
    pictures: tuple[Thumbnail | None, Thumbnail | None]


def grids(found: Neighbours, rng: np.random.Generator) -> list[Grid]:
    """Queries that are drawn at random among the right, the nearly right and the wrong ones."""
    outcomes = found.outcomes
    close = f"among the first {found.index.shape[1]}, at most {NEAR:g} in cosine behind the nearest"
    kinds = (
        ("Right", "The nearest image is of the query's class.", outcomes.right),
        ("Near misses", f"The right one is just behind: {close}.", outcomes.near),
        ("Wrong", "The nearest image is of another class, and no right one is close behind it.",
         outcomes.wrong),
    )  # fmt: skip
    drawn = []
    for title, text, among in kinds:
        queries = first_readable(found.queries, rng.permutation(among), CARDS)
        cards = [
            Card(
                picture,
                found.queries.class_name(query),
                [_answer(found, query, rank) for rank in range(found.index.shape[1])],
                _note(found, query),
            )
            for query, picture in queries
        ]
        drawn.append(Grid(title, text, len(among), cards))
    return [grid for grid in drawn if grid.cards]


def confused(found: Neighbours) -> list[ConfusedPair]:
    return [_pair(found, confusion) for confusion in found.confusions(PAIRS)]


def _pair(found: Neighbours, confusion: Confusion) -> ConfusedPair:
    labels = found.queries.first_labels
    classes = confusion.first, confusion.second
    pictures = (
        thumbnail(found.queries, confusion.query),
        thumbnail(found.gallery, confusion.found),
    )
    first, second = (int((found.counted & (labels == c)).sum()) for c in classes)
    return ConfusedPair(
        (found.queries.class_names[classes[0]], found.queries.class_names[classes[1]]),
        (confusion.there, confusion.back),
        (first, second),
        pictures if labels[confusion.query] == confusion.first else pictures[::-1],
    )


def _answer(found: Neighbours, query: int, rank: int) -> Answer:
    index = int(found.index[query, rank])
    return Answer(
        thumbnail(found.gallery, index),
        found.gallery.class_name(index),
        float(found.cosine[query, rank]),
        bool(found.right[query, rank]),
    )


def _note(found: Neighbours, query: int) -> str:
    """What is wrong with what it finds; "" where nothing is."""
    right = found.right[query]
    if right[0]:
        return ""
    name = found.gallery.class_name(int(found.index[query, 0]))
    text = f"finds {short(name)}" if name else "finds an image without a class"
    if not right.any():
        return text
    rank = int(right.argmax())
    behind = float(found.cosine[query, 0] - found.cosine[query, rank])
    return f"{text}; right at rank {rank + 1}, {behind:.3f} behind"
