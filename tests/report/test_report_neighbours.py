"""Right, nearly right, wrong, and confused classes, against brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.report.neighbours import NEAR, TOP, Confusion, Neighbours
from unicom_ext.report.queries import PAIRS, confused, grids


def embedded(labels, seed, dim=3, classes=6):
    rng = np.random.default_rng(seed)
    n = len(labels)
    images = ImageSet.of_arrays(
        rng.integers(0, 256, (n, 8, 8), dtype=np.uint8),
        np.asarray(labels),
        [f"class {c}" for c in range(classes)],
    )
    return Embedded(torch.from_numpy(rng.standard_normal((n, dim)).astype(np.float32)), images)


def unit(x):
    x = x.double()
    return (x / x.norm(dim=1, keepdim=True)).numpy()


CASES = {
    # -1 has no class, and class 5 a single image: neither can be found
    "among each other": (embedded([*np.arange(90) % 5, 5, -1, -1], 0), None),
    # no image of class 3 in the gallery, and distractors there
    "in a gallery": (embedded([*np.arange(60) % 5, -1], 1),
                     embedded([*np.arange(60) % 3, 4, 4, -1, -1], 2)),
    "in a gallery of two": (embedded(np.arange(40) % 3, 3), embedded([0, 1], 4)),
}  # fmt: skip


def brute(query, gallery):
    """(query, its nearest numbers best first, cosines) of each that counts."""
    among = gallery or query
    cosines = unit(query.embeddings) @ unit(among.embeddings).T
    for q, label in enumerate(query.images.labels.tolist()):
        others = [g for g in range(len(among.images)) if gallery is not None or g != q]
        if label < 0 or label not in [among.images.labels[g] for g in others]:
            continue
        order = sorted(others, key=lambda g: -cosines[q, g])[:TOP]
        yield q, order, cosines[q]


@pytest.mark.parametrize("case", CASES)
def test_outcomes(case):
    query, gallery = CASES[case]
    labels, others = query.images.labels, (gallery or query).images.labels
    expected = {"right": [], "near": [], "wrong": []}
    for q, order, cosine in brute(query, gallery):
        at = [g for g in order if others[g] == labels[q]]
        if others[order[0]] == labels[q]:
            expected["right"].append(q)
        elif at and cosine[order[0]] - cosine[at[0]] <= NEAR:
            expected["near"].append(q)
        else:
            expected["wrong"].append(q)
    found = Neighbours.search(query, gallery).outcomes
    assert {name: part.tolist() for name, part in found._asdict().items()} == expected
    assert all(expected.values()) or case == "in a gallery of two"


@pytest.mark.parametrize("case", CASES)
def test_confusions(case):
    query, gallery = CASES[case]
    labels, others = query.images.labels, (gallery or query).images.labels
    ways, first = Counter(), {}
    for q, order, _ in brute(query, gallery):
        way = int(labels[q]), int(others[order[0]])
        if way[0] != way[1] and way[1] >= 0:
            ways[way] += 1
            first.setdefault(way, (q, order[0]))
    expected = []
    for a, b in {tuple(sorted(way)) for way in ways}:
        there, back = ways[a, b], ways[b, a]
        expected.append(Confusion(a, b, there, back, *first[(a, b) if there >= back else (b, a)]))
    expected.sort(key=lambda c: (-c.there - c.back, c.first, c.second))
    found = Neighbours.search(query, gallery)
    assert found.confusions(1000) == expected
    assert found.confusions(2) == expected[:2]


def test_confused_classes_have_names_counts_and_pictures():
    query, gallery = CASES["in a gallery"]
    found = Neighbours.search(query, gallery)
    confusion = max(found.confusions(PAIRS), key=lambda c: c.back - c.there)
    assert confusion.back > confusion.there  # the picture of a query comes second then
    pair = confused(found)[found.confusions(PAIRS).index(confusion)]
    assert pair.names == (f"class {confusion.first}", f"class {confusion.second}")
    assert pair.counts == (confusion.there, confusion.back)
    assert pair.totals == tuple(
        int((query.images.labels == c).sum()) if c in gallery.images.labels else 0
        for c in (confusion.first, confusion.second)
    )
    assert pair.pictures[0] != pair.pictures[1]
    one = grids(found, np.random.default_rng(0))[0].cards[0].picture.url
    assert one.startswith("data:image/png;base64,")


def test_cards_say_what_was_found():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.22, 2.0, 2.2])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    images = embedded([0, 1, 0, 1, 2, 2], 0).images
    found = Neighbours.search(Embedded(rows, images), None)
    drawn = {grid.title: grid for grid in grids(found, np.random.default_rng(0))}
    assert {title: grid.total for title, grid in drawn.items()} == {
        "Right": 2, "Near misses": 4
    }  # fmt: skip
    notes = {card.picture: card.note for card in drawn["Near misses"].cards}
    assert sorted(notes.values()) == [
        "finds class 0; right at rank 2, 0.007 behind",
        "finds class 0; right at rank 3, 0.002 behind",
        "finds class 1; right at rank 2, 0.015 behind",
        "finds class 1; right at rank 3, 0.020 behind",
    ]
    card = drawn["Right"].cards[0]
    assert card.note == ""
    assert card.answers[0].right
    assert card.answers[0].name == "class 2"
    assert card.answers[0].cosine == pytest.approx(np.cos(0.2))
