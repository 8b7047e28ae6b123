"""The glyph collection, its cache, its split, and the features that need no network."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unicom_ext.data import glyphs
from unicom_ext.data.baselines import (
    BASELINES,
    _discriminants,
    _histograms_of,
    hog,
    hog_lda,
    lda,
    principal_axes,
    raw_pixels,
)
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.retrieval import evaluate


def assert_same(a: Glyphs, b: Glyphs):
    for field in fields(Glyphs):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y)
        assert np.array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


@pytest.fixture(scope="session")
def collection() -> Glyphs:
    """Drawn afresh whenever the source has changed, as that takes many seconds."""
    source = hashlib.sha256(Path(glyphs.__file__).read_bytes()).hexdigest()[:16]
    return glyphs.load(Path(__file__).resolve().parents[2] / "build" / "glyphs" / source)


# ---- the collection ------------------------------------------------------------------------------


@pytest.mark.slow
def test_size_and_types(collection):
    g = collection
    assert len(g) > 25_000
    assert g.num_classes > 2_500
    assert (g.images.dtype, g.images.shape) == (np.uint8, (len(g), 32, 32))
    assert (g.labels.dtype, g.fonts.dtype, g.codepoints.dtype) == (np.int64,) * 3
    assert len(g.captions) == len(set(g.captions)) == len(set(g.codepoints)) == g.num_classes
    assert len(g.font_names) == len(glyphs.FACES) == 16
    assert set(g.fonts) == set(range(16))
    assert np.bincount(g.labels, minlength=g.num_classes).min() >= glyphs.MIN_IMAGES


@pytest.mark.slow
def test_glyphs_are_cropped_centred_and_white(collection):
    images = collection.images
    assert images.max(axis=(1, 2)).min() > 100
    first, length = [], []
    for axis in (1, 2):
        ink = images.any(axis=axis)
        first.append(ink.argmax(axis=1))
        length.append(32 - ink[:, ::-1].argmax(axis=1) - first[-1])
    first, length = np.array(first), np.array(length)
    # The faintest edge of a smoothed stroke may round to zero.
    assert length.max() == glyphs.INK
    assert length.max(axis=0).min() >= glyphs.INK - 2
    assert abs(2 * first + length - 32).max() <= 3


@pytest.mark.slow
def test_no_bitmap_occurs_twice(collection):
    assert len({image.tobytes() for image in collection.images}) == len(collection)


@pytest.mark.slow
def test_lookalikes_are_one_class_and_others_are_not(collection):
    classes = set(collection.codepoints.tolist())
    assert ord("A") in classes
    assert not {0x391, 0x410} & classes  # Greek Alpha and Cyrillic A: drawn like Latin A
    assert {ord(c) for c in "0OoQCGil8B&@"} <= classes
    assert {0x3A9, 0x3B2, 0x44F} <= classes  # Omega, beta, ya
    assert 0x2126 not in classes  # the ohm sign is drawn like Omega
    where = collection.codepoints.tolist().index(0x3B2)
    assert collection.captions[where] == "GREEK SMALL LETTER BETA"


@pytest.mark.slow
def test_every_class_is_a_visible_character(collection):
    for codepoint, caption in zip(collection.codepoints.tolist(), collection.captions, strict=True):
        assert unicodedata.category(chr(codepoint))[0] in "LNPS"
        assert unicodedata.name(chr(codepoint)) == caption


@pytest.mark.slow
def test_faces_draw_only_what_they_have(monkeypatch):
    """Without a glyph of its own a character would come out as the face's missing-glyph box."""
    import matplotlib
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    monkeypatch.setattr(glyphs, "FACES", ("DejaVuSans", "DejaVuSansMono-Oblique"))
    monkeypatch.setattr(glyphs, "MIN_FACES", 1)
    visible = glyphs._is_visible
    monkeypatch.setattr(glyphs, "_is_visible", lambda c: 0x2600 <= c < 0x2700 and visible(c))
    images, codepoints, fonts = glyphs._draw()
    assert len(set(codepoints)) > 150
    for f, face in enumerate(glyphs.FACES):
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
        with TTFont(path) as font:
            assert set(codepoints[fonts == f]) <= set(font.getBestCmap())
        missing = glyphs._draw_one(ImageFont.truetype(str(path), glyphs.DRAWN), "\U0010ffff")
        assert not (images[fonts == f] == missing).all(axis=(1, 2)).any()
    assert (fonts == 1).sum() < (fonts == 0).sum()  # the second has fewer of them


# ---- cleaning ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(65, 74), st.integers(0, 12)), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_cleaning_against_connected_components(drawn, min_images):
    """drawn: (character, number of its bitmap). The oracle spreads labels until nothing changes."""
    images = np.zeros((len(drawn), 32, 32), np.uint8)
    images[:, 0, 0] = [bitmap for _, bitmap in drawn]
    name = {c: c for c, _ in drawn}
    for _ in drawn:
        for c, b in drawn:
            name[c] = min(name[other] for other, bitmap in drawn if bitmap == b or other == c)
    expected = {}
    for c, b in drawn:
        expected.setdefault(name[c], set()).add(b)
    expected = {c: bitmaps for c, bitmaps in expected.items() if len(bitmaps) >= min_images}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "MIN_IMAGES", min_images)
        codepoints = np.array([c for c, _ in drawn])
        g = glyphs._clean(images, codepoints, np.arange(len(drawn)) % 16)
    assert g.codepoints.tolist() == sorted(expected)
    assert len(g) == sum(map(len, expected.values()))
    for label, c in enumerate(g.codepoints.tolist()):
        assert set(g.images[g.labels == label, 0, 0].tolist()) == expected[c]
        assert g.captions[label] == unicodedata.name(chr(c))


# ---- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch) -> list:
    """Makes drawing instant; returns a list that grows by one at each drawing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32), dtype=np.uint8)
    drawings = []

    def draw():
        drawings.append(1)
        return images, np.arange(60) % 10 + 65, np.arange(60) % 16

    monkeypatch.setattr(glyphs, "_draw", draw)
    return drawings


def test_second_load_reads_the_cache(small, tmp_path):
    first = glyphs.load(tmp_path / "new" / "folder")
    assert_same(glyphs.load(tmp_path / "new" / "folder"), first)
    assert len(small) == 1
    assert (first.num_classes, len(first)) == (10, 60)


def test_a_damaged_cache_is_drawn_again(small, tmp_path):
    expected = glyphs.load(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"not a zip", whole[:-1], whole[: len(whole) // 2], whole[100:], whole * 2]
    for position in rng.integers(0, len(whole), 150):
        damaged.append(bytearray(whole))
        damaged[-1][position] ^= 1 << int(rng.integers(8))
    for content in damaged:
        path.write_bytes(content)
        assert_same(glyphs.load(tmp_path), expected)
    assert len(small) > 100

    # A well-formed file with other pixels is told by its checksum alone.
    with np.load(path) as file:
        arrays = dict(file)
    arrays["images"][3, 4, 5] ^= 1
    np.savez_compressed(path, **arrays)
    before = len(small)
    assert_same(glyphs.load(tmp_path), expected)
    assert_same(glyphs.load(tmp_path), expected)
    assert len(small) == before + 1


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_behind(small, tmp_path, monkeypatch, error):
    def fail(file, **arrays):
        file.write(b"half a file")
        raise error

    monkeypatch.setattr(np, "savez_compressed", fail)
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match="not cached in .*no space left"):
            assert len(glyphs.load(tmp_path)) == 60
    else:
        with pytest.raises(KeyboardInterrupt):
            glyphs.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_costs_a_warning(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not cached"):
        assert len(glyphs.load(tmp_path / "file")) == 60


def test_default_directory(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    glyphs.load()
    assert len(list((tmp_path / "xdg" / "unicom_ext").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    glyphs.load()
    assert len(list((tmp_path / "home" / ".cache" / "unicom_ext").iterdir())) == 1


def test_other_versions_have_their_own_cache(small, tmp_path, monkeypatch):
    glyphs.load(tmp_path)
    for module, attribute in (("matplotlib", "__version__"), ("PIL", "__version__")):
        monkeypatch.setattr(f"{module}.{attribute}", "0.0")
        glyphs.load(tmp_path)
    monkeypatch.setattr("PIL.features.version", lambda name: "0.0")
    glyphs.load(tmp_path)
    monkeypatch.setattr(glyphs, "FORMAT", glyphs.FORMAT + 1)
    glyphs.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(small) == 5


# ---- split ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.5, 0.1])
def test_split_shares_no_class_and_loses_none(collection, fraction):
    train, test = glyphs.split(collection, seed=3, test_fraction=fraction)
    assert test.num_classes == round(fraction * collection.num_classes)
    assert not set(train.codepoints) & set(test.codepoints)
    assert set(train.codepoints) | set(test.codepoints) == set(collection.codepoints)
    assert len(train) + len(test) == len(collection)
    for part in (train, test):
        assert np.array_equal(np.unique(part.labels), np.arange(part.num_classes))
        images = {image.tobytes(): i for i, image in enumerate(collection.images)}
        rows = [images[image.tobytes()] for image in part.images]
        codepoints = collection.codepoints[collection.labels[rows]]
        assert np.array_equal(part.codepoints[part.labels], codepoints)
        assert np.array_equal(part.fonts, collection.fonts[rows])
        assert part.captions == [unicodedata.name(chr(c)) for c in part.codepoints.tolist()]


@pytest.mark.slow
def test_split_depends_on_the_seed_alone(collection):
    for a, b in zip(glyphs.split(collection), glyphs.split(collection, seed=0), strict=True):
        assert_same(a, b)
    tests = [set(glyphs.split(collection, seed=s)[1].codepoints) for s in range(4)]
    # Two independent halves share a quarter of all classes; one standard deviation is 13.
    for i in range(4):
        for j in range(i):
            assert abs(len(tests[i] & tests[j]) - collection.num_classes / 4) < 80


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 1e-9, float("nan")])
def test_split_refuses_an_empty_part(collection, fraction):
    with pytest.raises(ValueError, match="test_fraction: got"):
        glyphs.split(collection, test_fraction=fraction)


# ---- baselines -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def halves(collection):
    """Small ones, to be quick: some 200 classes each, images of 16 x 16."""
    few = glyphs._take(collection, list(range(0, collection.num_classes, 6)))
    return glyphs.split(replace(few, images=few.images[:, ::2, ::2]))


@pytest.fixture(scope="session")
def features(halves):
    train, test = halves
    return {name: f(train.images, train.labels, test.images) for name, f in BASELINES.items()}


@pytest.mark.slow
def test_features_are_finite_and_ordered(halves, features):
    for x in features.values():
        assert (x.dtype, x.shape) == (torch.float32, (len(halves[1]), 128))
        assert torch.isfinite(x).all()
        spread = x.var(0)
        assert spread[:16].sum() > spread[16:32].sum() > spread[32:64].sum() > spread[96:].sum()


@pytest.mark.slow
def test_features_of_an_image_do_not_depend_on_the_others(halves, features):
    train, test = halves
    for name, function in BASELINES.items():
        alone = function(train.images, train.labels, test.images[:5])
        assert torch.allclose(alone, features[name][:5], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_better_features_retrieve_better(collection):
    few = glyphs._take(collection, list(range(0, collection.num_classes, 6)))
    whole = torch.from_numpy(few.images)[:, None].float()
    images = torch.nn.functional.interpolate(whole, size=24, mode="area")  # to be quick
    train, test = glyphs.split(replace(few, images=images[:, 0].byte().numpy()))
    recall = {}
    for name, function in BASELINES.items():
        x = function(train.images, train.labels, test.images, 32)
        recall[name] = evaluate(x, torch.from_numpy(test.labels))[0].recall[1]
    assert 0.5 < recall["raw pixels"] < recall["HOG"] < recall["HOG + LDA"] < 1
    assert recall["raw pixels"] < recall["LDA"]


@pytest.mark.slow
def test_labels_matter_to_the_discriminants_alone(halves, features):
    train, test = halves
    shuffled = np.random.default_rng(0).permutation(train.labels)
    for name, function in BASELINES.items():
        x = function(train.images, shuffled, test.images)
        assert torch.equal(x, features[name]) == (function in (raw_pixels, hog))


@pytest.mark.parametrize("rows", [12, 90])
def test_principal_axes_of_few_images_and_of_many(rows):
    train = torch.randn(rows, 30, generator=torch.Generator().manual_seed(0))
    train[1] = train[0]
    mean, axes = principal_axes(train, 5)
    assert torch.equal(mean, train.mean(0))
    _, right = np.linalg.eigh(np.cov(train.double().numpy().T))
    cosines = axes.double().numpy().T @ right[:, :-6:-1]
    assert np.allclose(np.abs(cosines), np.eye(5), atol=1e-5)
    _, all_of_them = principal_axes(train, min(rows - 1, 30))  # of few, one has no variance
    torch.testing.assert_close(all_of_them.T @ all_of_them, torch.eye(min(rows - 1, 30)))


def test_discriminants_solve_fishers_problem():
    """Scatters within and between classes become diagonal, W and W^2, W decreasing; and the sum of
    all W is the trace of (within^-1 between), which no choice of coordinates changes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(300) % 8)
    x = rng.normal(size=(8, 6))[labels] * [1, 2, 0.1, 3, 1, 1] + rng.normal(size=(300, 6)) @ (
        rng.normal(size=(6, 6))
    )

    def scatters(x):
        means = np.stack([x[labels == c].mean(0) for c in range(8)])
        inner = x - means[labels]
        outer = means[labels] - x.mean(0)
        return inner.T @ inner / (300 - 8), outer.T @ outer

    data = torch.from_numpy(x).float()
    y = _discriminants(data, labels, data, 6).double().numpy()
    within, between = scatters(y)
    weight = np.diag(within)
    assert (np.diff(weight) < 0).all()
    assert np.allclose(within, np.diag(weight), atol=1e-3 * weight[0])
    assert np.allclose(between, np.diag(weight**2), atol=1e-3 * weight[0] ** 2)
    within, between = scatters(x)
    assert weight.sum() == pytest.approx(np.trace(np.linalg.solve(within, between)), rel=1e-3)
    assert np.allclose(_discriminants(data, labels, data, 3), y[:, :3], atol=1e-3)


@pytest.mark.slow
def test_gradient_histograms_ignore_the_sign_and_the_level(halves):
    train, test = halves
    images = test.images[:50] // 2 + 40
    expected = hog(train.images, None, images)
    assert torch.allclose(hog(train.images, None, 255 - images), expected, atol=1e-4)
    assert torch.allclose(hog(train.images, None, images + 60), expected, atol=1e-4)


def test_gradient_histograms_tell_the_angle():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for degrees, bins in ((0, [0]), (40, [2]), (90, [4, 5]), (135, [6, 7]), (220, [2])):
        angle = torch.tensor(degrees).deg2rad()
        ramp = (x * angle.cos() + y * angle.sin()) / 64
        votes = _histograms_of(ramp[None, None], 9, 4).view(9, 4, -1)
        middle = votes.permute(0, 2, 1)[:, 24].sum(1)  # of 7 x 7 blocks
        assert set(middle.topk(len(bins)).indices.tolist()) == set(bins)
        assert middle.topk(len(bins)).values.sum() > 0.99 * middle.sum()


@pytest.mark.slow
@pytest.mark.parametrize("function", BASELINES.values())
def test_bad_images_and_sizes(halves, function):
    train, test = halves
    with pytest.raises(ValueError, match=r"images: got torch\.float32"):
        function(train.images, train.labels, test.images.astype(np.float32))
    with pytest.raises(ValueError, match=r"train_images: got torch\.uint8 \[16, 16\]"):
        function(train.images[0], train.labels, test.images)
    with pytest.raises(ValueError, match="dim"):
        function(train.images, train.labels, test.images, 5000)
    with pytest.raises(ValueError, match="dim"):
        function(train.images, train.labels, test.images, 0)


@pytest.mark.slow
@pytest.mark.parametrize("function", [lda, hog_lda])
def test_discriminants_need_enough_classes(halves, function):
    train, test = halves
    with pytest.raises(ValueError, match="dim: got 128, must be from 1 to 99"):
        function(train.images, train.labels % 100, test.images)
    with pytest.raises(ValueError, match=r"train_labels: got shape \[3\]"):
        function(train.images, train.labels[:3], test.images)
