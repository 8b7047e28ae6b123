"""The page: what is on it, what it does without, and names and images that are hard to show."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import exactly
from support.training import synthetic

from unicom_ext.cluster.quality import quality
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.pictures import ArrayPictures, PictureError
from unicom_ext.report import Clusters, Headline, Methods, Page, Queries, Training, write
from unicom_ext.report.charts import ticks
from unicom_ext.report.names import LONGEST, short
from unicom_ext.report.thumbnails import SIDE, thumbnail

IMAGES = synthetic(10, seed=0)
BARE = Page(title="A title", lead="A lead.")
VOID = {"meta", "img", "br", "path", "rect"}


class Parsed(HTMLParser):
    """Raises AssertionError where an element is not closed, or not by its own tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " * (not {"style", "title"} & {*self.open}) + data.replace("\n", " ")

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def sections(self):
        return [attrs["id"] for attrs in self.all("section")]

    @property
    def words(self):
        return " ".join(self.text.replace("\u2013", "-").split())


def result(dim, recall, **more):
    return {"dim": dim, "recall": {"1": recall, "5": 0.99}, "map_at_r": 0.5, **more}


def embedded(images, seed=0):
    rows = np.random.default_rng(seed).standard_normal((len(images), 4))
    rows += 1.5 * np.eye(max(images.num_classes, 4))[images.labels][:, :4]
    return Embedded(torch.from_numpy(rows.astype(np.float32)), images)


FULL = Page(
    title="A title",
    lead="A lead.",
    seed=3,
    headline=Headline(0.9, "of them", (0.85, 0.94)),
    methods=Methods(
        {
            "pixels": [result(8, 0.7)],
            "ours": [
                result(4, 0.6, intervals={"Recall@1": [0.5, 0.65], "mAP@R": [0.4, 0.6]}),
                result(8, 0.9, intervals={"Recall@1": [0.85, 0.94]}),
            ],
        },
        "ours",
    ),
    training=Training(
        [3.0, 2.0, float("nan"), 1.0],
        [
            {"step": 2, "part": "validation", "results": [result(8, 0.8)]},
            {"step": 4, "part": "validation", "results": [result(8, 0.85)]},
            {"step": 4, "results": [result(8, 0.9)]},
        ],
        {"training": 2.0, "waiting": 0.5},
        images=100,
    ),
    queries=Queries(embedded(IMAGES)),
    clusters=Clusters(np.arange(len(IMAGES)) % 7, IMAGES),
    examples=IMAGES,
    data=[("training", 1000, 10)],
    unreadable={f"image {i}": "why" for i in range(7)},
    environment={"torch": "2.11", "cpu": "a CPU"},
    settings={"scale": 32.0, "dims": (4, 8)},
)


def written(path, page):
    write(path / "page.html", page)
    return (path / "page.html").read_text("utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return written(tmp_path_factory.mktemp("full"), FULL)


def test_a_full_page_has_all_sections_and_links_to_them(full):
    parsed = Parsed(full)
    assert parsed.sections == [
        "results", "training", "queries", "confusions", "clusters", "map", "examples", "about"
    ]  # fmt: skip
    assert [a["href"] for a in parsed.all("a")] == [f"#{name}" for name in parsed.sections]
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_nothing_comes_from_elsewhere(full):
    assert not re.search(r"https?:|//cdn|<script|<link|<iframe|@import|url\(|\son\w+=", full)
    for image in Parsed(full).all("img"):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.load()
            assert picture.format == kind.upper()
            assert max(picture.size) <= SIDE


def test_pictures_have_words_for_those_who_do_not_see_them(full):
    parsed = Parsed(full)
    assert len(parsed.all("img")) > 50
    assert all(image["alt"] for image in parsed.all("img"))
    charts = parsed.all("svg")
    assert len(charts) == 5
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_figures_are_on_the_page(full):
    words = Parsed(full).words
    assert "90.0 % of them (95 % interval: 85.0 to 94.0 %)" in words
    assert "dimensions 4 8 pixels - 0.700 ours 0.600 0.500-0.650 0.900 0.850-0.940" in words
    assert re.findall(r'<td class="best">(.*?)<', full) == ["0.600", "0.900"]
    assert "4 0.6000 0.500-0.650 0.9900 0.5000 0.400-0.600" in words
    assert "4 steps. 50 images a second, 25% of the time waiting for images." in words
    assert "Seconds: training 2.0, waiting 0.5." in words
    assert "validation classes test classes Recall@1 on the way" in words
    assert "training 1,000 10" in words
    assert (
        "7 of the images could not be read and were left out: image 0 , image 1 , image 2 , "
        "image 3 , image 4 and others." in words
    )
    assert "torch 2.11, cpu a CPU." in words
    assert "scale 32.0 dims (4, 8)" in words
    assert "Drawn at random by seed 3, not chosen." in words


def test_the_same_page_gives_the_same_bytes(full, tmp_path):
    assert written(tmp_path, FULL) == full
    assert written(tmp_path, dataclasses.replace(FULL, seed=4)) != full


@pytest.mark.parametrize(
    "part", ["headline", "methods", "training", "queries", "clusters", "examples", "data"]
)
def test_a_part_alone_and_all_but_one(part, tmp_path):
    sections = {
        "methods": ["results"],
        "queries": ["queries", "confusions", "map"],
        "headline": [],
        "data": [],
    }.get(part, [part])
    alone = dataclasses.replace(BARE, **{part: getattr(FULL, part)})
    assert Parsed(written(tmp_path, alone)).sections == [*sections, "about"]
    if part in ("methods", "training"):  # what others would look at
        without = dataclasses.replace(FULL, **{part: None})
        assert not {*sections} & {*Parsed(written(tmp_path, without)).sections}


def test_what_is_empty_is_left_out(tmp_path):
    none = IMAGES.take(np.arange(0))
    page = dataclasses.replace(
        BARE,
        training=Training([]),
        queries=Queries(Embedded(torch.empty(0, 4), none)),
        clusters=Clusters(np.full(len(IMAGES), -1), IMAGES),
        examples=none,
    )
    assert Parsed(written(tmp_path, page)).sections == ["about"]


def test_two_images_of_one_dimension(tmp_path):
    """Too few for a map."""
    images = IMAGES.take(np.arange(2))
    page = dataclasses.replace(BARE, queries=Queries(Embedded(torch.ones(2, 1), images)))
    assert Parsed(written(tmp_path, page)).sections == ["queries", "about"]


def test_queries_that_find_nothing_right_or_wrong(tmp_path):
    images = dataclasses.replace(IMAGES, labels=np.full(len(IMAGES), -1))
    rows = torch.randn(len(images), 4, generator=torch.Generator().manual_seed(0))
    page = dataclasses.replace(BARE, queries=Queries(Embedded(rows, images)))
    parsed = Parsed(written(tmp_path, page))
    assert parsed.sections == ["map", "about"]
    assert "others" in parsed.words


def test_a_loss_that_is_no_number(tmp_path):
    training = Training([math.nan, math.inf], [{"step": 2, "results": [result(8, 0.1)]}])
    parsed = Parsed(written(tmp_path, dataclasses.replace(BARE, training=training)))
    assert parsed.sections == ["training", "about"]
    assert not parsed.all("svg")


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(full, dark):
    """The contrast that WCAG 2 asks for at level AA, and of lines and points that of graphics."""
    light, dark_colours = (
        dict(re.findall(r"--(\w+): #(\w+)", block))
        for block in re.findall(r":root \{(.*?)\}", full, re.S)
    )
    colours = {**light, **(dark_colours if dark else {})}
    assert set(light) == set(dark_colours)

    def luminance(name):
        code = colours[name] if len(colours[name]) == 6 else "".join(c * 2 for c in colours[name])
        rgb = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a, b):
        low, high = sorted(map(luminance, (a, b)))
        return (high + 0.05) / (low + 0.05)

    for name in ("text", "muted"):
        assert all(contrast(name, below) >= 4.5 for below in ("page", "raised", "ours"))
    for name in ("right", "wrong", "k0"):  # k0 is that of links
        assert contrast(name, "page") >= 4.5
    assert all(contrast(f"k{i}", "page") >= 3 for i in range(8))


# ---- clusters ------------------------------------------------------------------------------------


def test_clusters_are_described():
    labels = np.array([0] * 9 + [1] * 3 + [2] * 2 + [4] + [-1])
    images = dataclasses.replace(IMAGES.take(np.arange(16)), labels=np.arange(16) // 6)
    clusters = Clusters(labels, images)
    assert clusters.sizes.tolist() == [9, 3, 2, 0, 1]
    assert clusters.quality == quality([(labels, images.labels)])
    sheets = clusters.sheets(np.random.default_rng(0))
    assert [(s.cluster, s.why, s.size) for s in sheets] == [
        (0, "largest", 9), (2, "median", 2), (1, "random", 3), (4, "random", 1)
    ]  # fmt: skip
    assert (sheets[0].name, sheets[0].share) == ("PATTERN 0", 6 / 9)
    assert sorted((m.name, m.typical) for m in sheets[0].members) == (
        [("PATTERN 0", True)] * 6 + [("PATTERN 1", False)] * 3
    )
    heights = re.findall(r'class="bar" .*? height="([\d.]+)"', clusters.chart())
    assert np.array(heights, float) == pytest.approx(196 * np.array([1, 2, 0, 1]) / 2, abs=0.1)


def test_clusters_of_images_without_classes(tmp_path):
    images = dataclasses.replace(IMAGES, labels=np.full(len(IMAGES), -1))
    clusters = Clusters(np.arange(len(images)) % 7, images)
    assert clusters.quality is None
    parsed = Parsed(written(tmp_path, dataclasses.replace(BARE, clusters=clusters)))
    assert "purity" not in parsed.words
    assert {image["alt"] for image in parsed.all("img")} == {"a member"}
    assert not [attrs for attrs in parsed.all("span") if attrs.get("class") == "wrong"]


def test_labels_of_other_images():
    with pytest.raises(
        ValueError, match=exactly("labels: got shape [5], must be [60], one for each image")
    ):
        Clusters(np.zeros(5, np.int64), IMAGES)


# ---- what is hard to show ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("\"><img src=x onerror='f()'>&amp;", "\"><img src=x onerror='f()'>&amp;"),
        ("x" * 5000, "x" * (LONGEST - 1) + "…"),
        ("\u0639\u0631\u0628\u064a", "\u0639\u0631\u0628\u064a"),
        ("a\u202eb", "a\ufffdb"),  # it would turn the text after it round
        ("👩\u200d🚀 ❤\ufe0f", "👩\u200d🚀 ❤\ufe0f"),
        ("line\nline\0", "line line\ufffd"),
        ("\udcff.png", "\ufffd.png"),  # of a file whose name is not UTF-8
        ("{{ 7 * 7 }}{% raw %}", "{{ 7 * 7 }}{% raw %}"),
    ],
)
def test_names(name, shown, tmp_path):
    assert short(name) == shown
    images = dataclasses.replace(IMAGES, class_names=[name] * IMAGES.num_classes)
    page = Page(
        title=f"t {name}",
        lead=f"l {name}",
        methods=Methods({name: [result(4, 0.5), result(8, 0.5)]}, name),
        queries=Queries(embedded(images)),
        clusters=Clusters(np.arange(len(images)) % 7, images),
        examples=images,
        unreadable={name: "why"},
        settings={"name": name},
    )
    text = written(tmp_path, page)
    parsed = Parsed(text)
    assert len(parsed.sections) == 7
    assert not parsed.all("script")
    assert {image["alt"] for image in parsed.all("img")} == {shown, f"Query: {shown}"}
    assert not [image for image in parsed.all("img") if "onerror" in image]
    assert text.count("<bdi>") > 20


class Spoilt(ArrayPictures):
    """Of which every third image cannot be read any more."""

    def read(self, number):
        if number % 3 == 0:
            raise PictureError(f"{number}: is gone")
        return super().read(number)


def test_images_that_cannot_be_read(tmp_path):
    images = dataclasses.replace(IMAGES, pictures=Spoilt(IMAGES.pictures.images))
    page = dataclasses.replace(
        FULL,
        queries=Queries(embedded(images)),
        clusters=Clusters(np.arange(len(images)) % 7, images),
        examples=images,
    )
    parsed = Parsed(written(tmp_path, page))
    assert len(parsed.sections) == 8
    assert "not readable" in parsed.words
    spans = [attrs for attrs in parsed.all("span") if "aria-label" in attrs]
    assert all(attrs["aria-label"].endswith(", which cannot be read") for attrs in spans)


def test_no_image_can_be_read(tmp_path):
    class Gone(ArrayPictures):
        def read(self, number):
            raise PictureError("gone")

    images = dataclasses.replace(IMAGES, pictures=Gone(IMAGES.pictures.images))
    page = dataclasses.replace(BARE, queries=Queries(embedded(images)), examples=images)
    parsed = Parsed(written(tmp_path, page))
    assert parsed.sections == ["confusions", "map", "about"]
    assert not parsed.all("img")


def test_thumbnails():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 200, 400, 3), dtype=np.uint8)
    flat = np.full((1, 200, 400), 7, np.uint8)
    for array, kind in ((noise, "jpeg"), (flat, "png")):
        small = thumbnail(ImageSet.of_arrays(array, np.zeros(1, np.int64), ["a"]), 0)
        head, data = small.url.split(",")
        assert head == f"data:image/{kind};base64"
        assert not small.tiny
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (SIDE, SIDE // 2)  # as wide as it was
    small = thumbnail(IMAGES, 0)
    assert small.tiny
    with Image.open(io.BytesIO(base64.b64decode(small.url.split(",")[1]))) as picture:
        assert np.array_equal(np.asarray(picture), IMAGES.pictures.images[0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.42, 0.87, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (3, 3, [3, 4, 5, 6]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1e-3, 2e4, [-5000, 0, 5000, 10000, 15000, 20000]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == expected


def test_a_line_goes_where_its_points_are():
    chart = Training([4.0, 2.0, 0.0]).loss_chart()
    ((points,),) = [re.findall(r'class="line k0" d="M(.*?)"', chart)]
    places = [tuple(map(float, point.split())) for point in points.split("L")]
    assert [x for x, _ in places] == [54.0, 228.0, 402.0]
    assert [y for _, y in places] == [10.0, 108.0, 206.0]
