"""Collections in folders, and how they are cut into parts."""

from __future__ import annotations

import hashlib
import os
import sys

import numpy as np
import pytest
from support.images import encoded, exactly, opened, pictures, pixels, refused, told, write

from unicom_ext.data import glyphs
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.images import opening
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import open_images, open_part
from unicom_ext.data.images.pictures import PictureError
from unicom_ext.data.images.settings import LAYOUTS, DataSettings

CLASSES = [f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in (1, 2)]


def test_every_layout_can_be_opened():
    assert set(LAYOUTS) == set(opening.LAYOUTS)


# ---- folders ----


def test_a_sub_folder_is_a_class(tmp_path):
    pictures(tmp_path, ["c10/2.jpg", "c2/b2/10.PNG", "c2/b2/9.png", "c2/a.JPEG", "c2/b10/c/1.webp"])
    write(tmp_path / "c2/notes.md", "no image")
    write(tmp_path / "c2/.a.jpg", "hidden")
    write(tmp_path / ".hidden/a.jpg", "hidden")
    (tmp_path / "empty").mkdir()
    whole = opened(tmp_path)
    parts = [whole.train, whole.query]
    assert whole.validation is whole.gallery is None
    names = [row[:2] for part in parts for row in told(part)]
    assert sorted(names) == [
        ("c10/2.jpg", "c10"),
        ("c2/a.JPEG", "c2"),
        ("c2/b10/c/1.webp", "c2"),
        ("c2/b2/10.PNG", "c2"),
        ("c2/b2/9.png", "c2"),
    ]
    of_c2 = next(part for part in parts if "c2" in part.class_names)
    assert [of_c2.name(i) for i in range(4)] == [
        "c2/a.JPEG", "c2/b2/9.png", "c2/b2/10.PNG", "c2/b10/c/1.webp",
    ]  # fmt: skip


def test_a_flat_folder_has_no_classes(tmp_path):
    pictures(tmp_path, ["10.png", "9.png"])
    write(tmp_path / "9.txt", "\ufeffa nine \n")
    whole = opened(tmp_path)
    assert told(whole.train) == [("9.png", None, "a nine"), ("10.png", None, "")]
    assert whole.train.labels.dtype == np.int64
    assert whole.train.pictures.has_captions
    assert whole.validation is whole.query is whole.gallery is None
    assert np.array_equal(whole.train.read(1), pixels(0))
    pictures(tmp_path / "other", ["1.png"])
    assert not opened(tmp_path / "other").train.pictures.has_captions


def test_parts_have_classes_of_their_own(tmp_path):
    pictures(tmp_path, ["train/b/1.png", "train/a/1.png", "Test/a/2.png", "Test/c/1.png"])
    pictures(tmp_path, ["val/1.png"])
    whole = opened(tmp_path)
    assert told(whole.train) == [("train/a/1.png", "a", ""), ("train/b/1.png", "b", "")]
    assert told(whole.query) == [("Test/a/2.png", "a", ""), ("Test/c/1.png", "c", "")]
    assert whole.query.labels.tolist() == whole.train.labels.tolist() == [0, 1]
    assert told(whole.validation) == [("val/1.png", None, "")]
    assert whole.gallery is None


def test_query_and_gallery_share_their_classes(tmp_path):
    pictures(tmp_path, ["query/b/1.png", "gallery/a/1.png", "gallery/b/2.png"])
    whole = opened(tmp_path)
    assert len(whole.train) == whole.train.num_classes == 0
    assert list(whole.query.class_names) == list(whole.gallery.class_names) == ["a", "b"]
    assert whole.query.labels.tolist() == [1]
    assert whole.gallery.labels.tolist() == [0, 1]


def test_parts_without_labels_are_not_evaluated_on(tmp_path):
    pictures(tmp_path, ["train/1.png", "test/1.png"])
    whole = opened(tmp_path)
    assert told(whole.train) == [("train/1.png", None, "")]
    assert whole.query is None


def test_train_among_other_classes_is_a_class(tmp_path):
    pictures(tmp_path, ["bus/1.png", "train/1.png"])
    whole = opened(tmp_path)
    assert {*whole.train.class_names, *whole.query.class_names} == {"bus", "train"}


def test_files_of_img2dataset_have_no_classes(tmp_path):
    pictures(tmp_path, ["00000/000000000.jpg", "00001/000010000.jpg"])
    write(tmp_path / "00000/000000000.txt", "a dog")
    for shard in ("00000", "00001"):
        write(tmp_path / f"{shard}_stats.json", "{}")
        write(tmp_path / f"{shard}.parquet", "of no interest")
    assert told(opened(tmp_path).train) == [
        ("00000/000000000.jpg", None, "a dog"),
        ("00001/000010000.jpg", None, ""),
    ]


def test_a_link_to_a_folder_is_followed(tmp_path):
    pictures(tmp_path / "elsewhere", ["1.png"])
    pictures(tmp_path / "data", ["a/1.png"])
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    whole = opened(tmp_path / "data")
    assert {*whole.train.class_names, *whole.query.class_names} == {"a", "b"}
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data" / "a")
    refused(tmp_path / "data", f"{tmp_path}/data/a/up: is a link to a folder that it lies in")


def test_folders_that_cannot_be_used(tmp_path):
    kinds = (
        ".jpg, .jpeg, .jpe, .jfif, .png, .webp, .gif, .bmp, .tif, .tiff, .ppm, .pgm, .pbm, .avif"
    )
    refused(tmp_path / "none", f"{tmp_path}/none: is not there")
    (tmp_path / "empty").mkdir()
    message = f"{tmp_path}/empty: has no images, which are {kinds}"
    refused(tmp_path / "empty", message, layout="folder")
    allowed = (
        " and no images below; must have images, .tar shards or the files of one of sop, inshop, "
        "cub, cars, inat, gldv2, or be a table itself (.csv, .jsonl, .parquet)"
    )
    refused(tmp_path / "empty", f"{tmp_path}/empty: has nothing{allowed}")
    for i in range(4):
        write(tmp_path / f"empty/{i}.csv", "path\n")
    refused(tmp_path / "empty", f"{tmp_path}/empty: has 0.csv, 1.csv, 2.csv, ...{allowed}")
    pictures(tmp_path / "half", ["train/1.png"])
    (tmp_path / "half/test").mkdir()
    message = f"{tmp_path}/half/test: has no images, which are {kinds}"
    refused(tmp_path / "half", message)
    cases = {
        "mixed": (
            ["a/1.png", "2.png"],
            ": has images in itself (2.png) and in sub-folders (a/1.png); must be a sub-folder for "
            "each class, or one folder without classes",
        ),
        "both": (
            ["train/a/1.png", "test/a/1.png", "bus/1.png"],
            ": has bus beside the parts test, train; must be parts or classes, not both",
        ),
        "beside": (
            ["train/a/1.png", "test/1.png", "1.png"],
            ": has images beside the parts test, train",
        ),
        "twice": (
            ["val/1.png", "validation/1.png"],
            ": has two names of one part among val, validation",
        ),
        "too many": (
            ["query/1.png", "gallery/1.png", "test/1.png"],
            ": has gallery, query, test; must be test, whose images are searched among each other, "
            "or else query and gallery",
        ),
        "too few": (["Query/1.png"], ": has Query, but no gallery"),
        "in a part": (
            ["train/a/1.png", "train/2.png"],
            "/train: has images in itself (2.png) and in sub-folders (a/1.png); must be a "
            "sub-folder for each class, or one folder without classes",
        ),
    }  # fmt: skip
    for name, (paths, message) in cases.items():
        pictures(tmp_path / name, paths)
        refused(tmp_path / name, f"{tmp_path}/{name}{message}")


# ---- how classes are cut ----


def test_classes_are_cut_by_their_names_and_the_seed(tmp_path):
    pictures(tmp_path, CLASSES)
    whole = opened(tmp_path, seed=3, test_fraction=0.25)
    names = ("ant", "bee", "cat", "dog")
    first = min(names, key=lambda name: hashlib.sha256(f"3:{name}".encode()).digest())
    assert list(whole.query.class_names) == [first]
    assert told(whole.query) == [(path, first, "") for path in CLASSES if path.startswith(first)]
    assert len(whole.train) == 6
    assert whole.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    three = opened(tmp_path, seed=3, test_fraction=0.25, validation_fraction=0.34)
    assert told(three.query) == told(whole.query)
    assert sorted([*told(three.train), *told(three.validation)]) == told(whole.train)
    assert three.validation.num_classes == 1


def test_names_that_are_not_utf_8_are_names_too(tmp_path):
    if sys.platform == "darwin":
        pytest.skip("whose file names are UTF-8")
    for name in (b"\xff", b"b"):
        folder = bytes(tmp_path) + b"/" + name
        os.mkdir(folder)
        with open(folder + b"/1.png", "wb") as file:
            file.write(encoded())
    whole = opened(tmp_path)
    assert {*whole.train.class_names, *whole.query.class_names} == {"\udcff", "b"}
    digest = hashlib.sha256()
    for part in (whole.train, whole.query):
        assert np.array_equal(part.read(0), pixels(0))
        part.digest(digest)


def test_images_without_a_class_are_trained_on():
    images = ImageSet.of_arrays(np.zeros((4, 2, 2), np.uint8), np.array([1, -1, 0, -1]), ["a", "b"])
    train, test = images.split(0, 0.5)
    assert (train.labels < 0).sum() == 2
    assert sorted(train.labels.tolist()) == [-1, -1, 0]
    assert test.labels.tolist() == [0]
    assert {*train.rows.tolist(), *test.rows.tolist()} == {0, 1, 2, 3}


def test_fractions_that_leave_a_part_without_a_class(tmp_path):
    pictures(tmp_path / "data", CLASSES)
    data = tmp_path / "data"
    refused(
        data, "test_fraction: got 0.1, which leaves one part of the 4 classes empty",
        test_fraction=0.1,
    )  # fmt: skip
    refused(
        data, "validation_fraction: got 0.9, which leaves one part of the 2 classes empty",
        validation_fraction=0.9,
    )  # fmt: skip
    pictures(tmp_path / "one", ["a/1.png"])
    refused(tmp_path / "one", f"{tmp_path}/one: all images that have a class have the same, 'a'")
    pictures(tmp_path / "flat", ["1.png"])
    refused(
        tmp_path / "flat",
        "validation_fraction: got 0.5, which leaves one part of the 0 classes empty",
        validation_fraction=0.5,
    )
    pictures(tmp_path / "own", ["train/a/1.png", "val/a/1.png"])
    refused(
        tmp_path / "own",
        f"validation_fraction: got 0.5, must be 0: {tmp_path}/own has images for validation",
        validation_fraction=0.5,
    )


def test_the_bundled_glyphs(monkeypatch):
    """Cut exactly as `glyphs.split` cuts them."""
    n = 12
    drawn = Glyphs(
        images=np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2),
        labels=np.arange(n) // 2,
        fonts=np.zeros(n, np.int64),
        codepoints=np.arange(6) + 65,
        captions=[f"LETTER {c}" for c in "ABCDEF"],
        font_names=["Sans"],
    )
    monkeypatch.setattr(glyphs, "load", lambda: drawn)
    whole = open_images(DataSettings(test_fraction=0.34), 5)
    for part, cut in zip((whole.train, whole.query), glyphs.split(drawn, 5, 0.34), strict=True):
        assert np.array_equal([part.read(i) for i in range(len(part))], cut.images)
        assert np.array_equal(part.labels, cut.labels)
        assert list(part.class_names) == cut.captions
        assert [drawn.captions[number] for number in part.numbers] == cut.captions
        assert [part.caption(i) for i in range(len(part))] == [cut.captions[c] for c in cut.labels]
    assert whole.validation is whole.gallery is None
    cut = open_images(DataSettings(test_fraction=0.34, validation_fraction=0.25), 5)
    assert told(cut.query) == told(whole.query)
    assert (cut.train.num_classes, cut.validation.num_classes) == (3, 1)
    assert {*cut.train.class_names, *cut.validation.class_names} == {*whole.train.class_names}


def test_a_class_has_one_number_in_all_parts(tmp_path):
    folders = ("train/b", "train/a", "train/7", "query/b", "gallery/b", "gallery/x", "gallery/c")
    pictures(tmp_path, [f"{folder}/1.png" for folder in folders])
    settings = DataSettings(data=str(tmp_path))
    for part, labels in (("train", [0, 1, 2]), ("query", [2]), ("gallery", [2, 3, 4])):
        images = open_part(settings, 0, part)
        assert images.common_labels.tolist() == labels
        assert images.take(np.arange(1)).common_labels.tolist() == labels[:1]
    assert open_part(settings, 0, "all").common_labels.tolist() == [2, 3, 4, 2, 0, 1, 2]
    train = open_part(settings, 0, "train")
    assert train.of_classes([0, 2]).of_classes([1]).common_labels.tolist() == [2]
    assert train.relabelled(np.array([[5, -1], [9, 5], [-1, -1]])).common_labels.tolist() == [
        [0, -1], [1, 0],
    ]  # fmt: skip


# ---- what is found when it is read ----


def test_captions_that_cannot_be_read(tmp_path):
    pictures(tmp_path, ["1.png", "2.png"])
    write(tmp_path / "1.txt", b"\xff\xfe\x00")
    write(tmp_path / "2.txt", "a two")
    train = opened(tmp_path).train
    assert list(train.pictures._captions[1:]) == ["a two"]
    with pytest.raises(PictureError, match=exactly(f"{tmp_path}/1.txt: is not text in UTF-8")):
        train.caption(0)
    (tmp_path / "2.txt").unlink()
    with pytest.raises(PictureError, match=exactly(f"{tmp_path}/2.txt: No such file or directory")):
        train.caption(1)


def test_an_image_that_has_gone(tmp_path):
    pictures(tmp_path, ["1.png", "2.png"])
    train = opened(tmp_path).train
    before = hashlib.sha256()
    train.digest(before)
    (tmp_path / "1.png").unlink()
    with pytest.raises(PictureError, match=exactly(f"{tmp_path}/1.png: No such file or directory")):
        train.read(0)
    after = hashlib.sha256()
    train.digest(after)
    assert before.digest() != after.digest()
