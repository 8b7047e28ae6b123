"""Collections in tar shards, and that a collection is the same in each layout."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import pickle
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import encoded, exactly, opened, pixels, refused, told, write

from unicom_ext.data.images import shards
from unicom_ext.data.images.pictures import PictureError
from unicom_ext.utils.arrays import SourceError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "unicom_ext" / "shards"


def tar(path: Path, members: dict[str, bytes | str], **options) -> Path:
    """A tar of files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def test_webdataset(tmp_path):
    tar(tmp_path / "s-10.tar", {"x/a.jpg": encoded(2, "JPEG"), "x/a.cls": "7\n"})
    tar(
        tmp_path / "s-2.tar",
        {
            "a.PNG": encoded(0), "a.cls": "10", "a.txt": "an a\n", "a.seg.png": encoded(9),
            "b.json": json.dumps({"label": 7, "caption": "of b"}), "b.png": encoded(1),
            ".c.png": "hidden", "__meta__.json": "{}", "only.txt": "without an image",
        },
    )  # fmt: skip
    whole = opened(tmp_path)
    rows = sorted([*told(whole.train), *told(whole.query)])
    assert rows == [
        ("s-10.tar/x/a.jpg", "7", ""),
        ("s-2.tar/a.PNG", "10", "an a"),
        ("s-2.tar/b.png", "7", "of b"),
    ]
    of_7 = next(part for part in (whole.train, whole.query) if list(part.class_names) == ["7"])
    assert [of_7.name(i) for i in range(2)] == ["s-2.tar/b.png", "s-10.tar/x/a.jpg"]
    assert np.array_equal(of_7.read(0), pixels(1))
    one = opened(tmp_path / "s-2.tar").train.pictures
    assert len(one) == 2
    assert one.has_captions


def test_parts_of_shards(tmp_path):
    tar(tmp_path / "train/1.tar", {"a.png": encoded(0), "a.cls": "x", "b.png": encoded(1)})
    tar(tmp_path / "train/0.tar", {"a.png": encoded(2), "a.cls": "y"})
    tar(tmp_path / "test/0.tar", {"a.png": encoded(3), "a.cls": "z"})
    whole = opened(tmp_path)
    assert told(whole.train) == [
        ("train/0.tar/a.png", "y", ""),
        ("train/1.tar/a.png", "x", ""),
        ("train/1.tar/b.png", None, ""),
    ]
    assert told(whole.query) == [("test/0.tar/a.png", "z", "")]
    assert whole.gallery is None
    assert np.array_equal(whole.query.read(0), pixels(3))
    tar(tmp_path / "0.tar", {})
    refused(tmp_path, f"{tmp_path}: has .tar files beside those in test, train")
    (tmp_path / "0.tar").unlink()
    tar(tmp_path / "query/0.tar", {})
    refused(
        tmp_path,
        f"{tmp_path}: has query, test, train; must be test, whose images are searched among each "
        "other, or else query and gallery",
    )


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_kind_of_tar(tmp_path, kind):
    name = "long/" * 18 + "name" * 20 + ".png"
    members = {f"{i}.png": encoded(i) for i in range(3)} | {name: encoded(3)}
    if kind != tarfile.USTAR_FORMAT:
        members["ü.png"] = encoded(4)
    train = opened(tar(tmp_path / "0.tar", members, format=kind)).train
    assert [train.name(i) for i in range(len(train))] == [f"0.tar/{name}" for name in members]
    for i in range(len(train)):
        assert np.array_equal(train.read(i), pixels(i))


def test_the_index_is_made_once(tmp_path, cache, monkeypatch):
    path = tar(tmp_path / "0.tar", {"a.png": encoded(0), "b.png": encoded(1), "b.txt": "x"})
    first = opened(path).train
    assert len(list(cache.iterdir())) == 1
    scanned = shards._scanned
    monkeypatch.setattr(shards, "_scanned", None)
    again = opened(path).train
    assert told(again) == told(first) == [("0.tar/a.png", None, ""), ("0.tar/b.png", None, "x")]
    monkeypatch.setattr(shards, "_scanned", scanned)
    tar(path, {"c.png": encoded(2)})
    assert told(opened(path).train) == [("0.tar/c.png", None, "")]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    assert told(opened(path).train) == [("0.tar/c.png", None, "")]


def test_an_index_that_cannot_be_kept(tmp_path, monkeypatch):
    write(tmp_path / "file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tar(tmp_path / "0.tar", {"a.png": encoded(0)})
    with pytest.warns(UserWarning, match=f"the index of {path} was not cached in .*: "):
        assert len(opened(path).train) == 1


def test_worker_processes_read_too(tmp_path):
    """Forked ones after their parent has read, and spawned ones, which get a pickle."""
    for i in range(2):
        tar(tmp_path / f"{i}.tar", {"a.png": encoded(2 * i), "b.png": encoded(2 * i + 1)})
    pictures = opened(tmp_path).train.pictures
    pictures.read(0)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=lambda: theirs.send(np.asarray(pictures.read(3))))
    worker.start()
    assert np.array_equal(ours.recv(), pixels(3))
    worker.join()
    assert np.array_equal(pickle.loads(pickle.dumps(pictures)).read(2), pixels(2))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_tars_that_are_cut_off_or_spoilt(tmp_path):
    members = {"a.png": encoded(0), "b.png": encoded(1)}
    path = tmp_path / "0.tar"
    size = 512 + -(-len(members["a.png"]) // 512) * 512  # of a member
    for at, message in {
        100: "is not a tar file, or is cut off: truncated header",
        size - 300: "is cut off: unexpected end of data",
        size: f"is cut off or spoilt at byte {size} of {size}",
        size + 100: f"is cut off or spoilt at byte {size} of {size + 100}",
        2 * size - 300: "is cut off: unexpected end of data",
        2 * size: f"is cut off or spoilt at byte {2 * size} of {2 * size}",
    }.items():
        tar(path, members)
        cut(path, at)
        refused(path, f"{path}: {message}")
    data = bytearray(tar(path, members).read_bytes())
    data[size : size + 20] = b"?" * 20
    path.write_bytes(data)
    refused(path, f"{path}: is cut off or spoilt at byte {size} of {len(data)}")
    write(path, "")
    refused(path, f"{path}: is not a tar file, or is cut off: empty file")
    write(path, b"\x1f\x8b" + bytes(600))
    with pytest.raises(SourceError, match=f"^{path}: is not a tar file, or is cut off: "):
        opened(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": "x"}, ": has no images, which are .jpg, .jpeg, .jpe, .jfif, .png, .webp, .gif, "
         ".bmp, .tif, .tiff, .ppm, .pgm, .pbm, .avif"),
        ({}, ": has no images, which are .jpg, .jpeg, .jpe, .jfif, .png, .webp, .gif, .bmp, .tif, "
         ".tiff, .ppm, .pgm, .pbm, .avif"),
        ({"a.png": "", "a.jpg": ""}, ": a has two images: .png and .jpg"),
        ({"a.png": "", "a.json": "{"}, ": a.json: is not JSON: Expecting property name enclosed in "
         "double quotes: line 1 column 2 (char 1)"),
        ({"a.png": "", "a.json": "[]"}, ": a.json: must be an object, {...}"),
        ({"a.png": "", "a.json": '{"label": [1]}'},
         ": a.json: label is [1], must be text or a whole number"),
        ({"a.png": "", "a.json": '{"label": 1}', "a.cls": "2"},
         ": a has the class 2 in .cls, and the label 1 in .json"),
        ({"a.png": "", "a.cls": b"\xff"}, ": a.cls: is not text in UTF-8"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_used(tmp_path, members, message):
    path = tar(tmp_path / "0.tar", members)
    refused(path, f"{path}{message}")


def test_one_name_twice_in_a_tar(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("x/a.png"))
    refused(path, f"{path}: has x/a.png twice")


def test_folders_and_files_that_are_no_shards(tmp_path):
    refused(tmp_path, f"{tmp_path}: has no .tar files", layout="shards")
    write(tmp_path / "a.zip", "")
    refused(
        tmp_path / "a.zip",
        f"{tmp_path}/a.zip: must be a folder, or a file that ends in .csv, .jsonl, .parquet, .tar",
    )


def test_a_tar_beside_pictures(tmp_path):
    """Such as a backup of some: neither would be all that was meant."""
    root = tmp_path / "all"
    tar(root / "backup.tar", {"1.jpg": encoded(1)})
    write(root / ".thumbnails/1.png", encoded(3))
    assert len(opened(root).train) == 1
    write(root / "shoe/deeper/2.png", encoded(2))
    refused(root, f"{root}: has shards (backup.tar) and images (shoe/deeper/2.png); layout must "
                  "say which: shards or folder")  # fmt: skip
    assert told(opened(root, layout="shards").train) == [("backup.tar/1.jpg", None, "")]
    write(root / "hat/3.png", encoded(2))
    assert len(opened(root, layout="folder").train) == 1


def test_a_tar_that_changes_under_a_reader(tmp_path):
    path = tar(tmp_path / "0.tar", {"a.png": encoded(0), "a.json": '{"caption": "x"}'})
    train = opened(path).train
    assert train.caption(0) == "x"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for read, what in ((train.read, "is no image"), (train.caption, "its caption has changed")):
        with pytest.raises(PictureError, match=exactly(f"{path}: a.png: {what}")):
            read(0)
    cut(path, 600)
    with pytest.raises(PictureError, match=exactly(f"{path}: a.png: the tar has been cut off")):
        train.read(0)
    path.unlink()
    with pytest.raises(PictureError, match=exactly(f"{path}: a.png: No such file or directory")):
        train.read(0)


def test_shards_are_told_apart(tmp_path):
    digests = set()
    for number, members in enumerate([{"a.png": "1"}, {"a.png": "12"}, {"b.png": "1"}]):
        digest = hashlib.sha256()
        opened(tar(tmp_path / f"{number}" / "0.tar", members)).train.digest(digest)
        digests.add(digest.digest())
    assert len(digests) == 3


# ---- the same in each layout ----

NAMES = st.text("ab01é _-", min_size=1, max_size=4).filter(
    lambda name: name.strip() == name and not re.fullmatch(r"-\d+", name)
)
CAPTIONS = st.text('a,"é\n ', max_size=5).map(str.strip)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    st.dictionaries(NAMES, st.lists(CAPTIONS, min_size=1, max_size=3), min_size=2, max_size=5),
    st.integers(0, 9),
)
def test_a_collection_is_the_same_in_each_layout(classes, seed):
    with tempfile.TemporaryDirectory() as folder:
        root, number = Path(folder), 0
        for of_class, captions in classes.items():
            for i, caption in enumerate(captions):
                write(root / "folder" / of_class / f"{i}.png", encoded(number))
                if caption:
                    write(root / "folder" / of_class / f"{i}.txt", caption)
                number += 1
        sets = {"folder": opened(root / "folder", seed)}
        rows, members = [], [{}, {}]
        for part in (sets["folder"].train, sets["folder"].query):
            for i, (name, label, caption) in enumerate(told(part)):
                rows.append({"path": f"folder/{name}", "label": label, "caption": caption})
                key, data = f"{len(rows):05d}", (root / "folder" / name).read_bytes()
                members[i % 2 and len(rows) > 2] |= {f"{key}.png": data, f"{key}.cls": label}
                members[i % 2 and len(rows) > 2] |= {
                    f"{key}.json": json.dumps({"caption": caption})
                }
        write(root / "t.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        sets["table"] = opened(root / "t.jsonl", seed)
        for i, inside in enumerate(members):
            tar(root / "shards" / f"{i}.tar", inside)
        sets["shards"] = opened(root / "shards", seed)
        for layout in ("table", "shards"):
            for kind in ("train", "query"):
                one, other = getattr(sets["folder"], kind), getattr(sets[layout], kind)
                assert list(one.class_names) == list(other.class_names)
                assert len(one) == len(other)
                if layout == "table":
                    assert np.array_equal(one.labels, other.labels)
                assert contents(one) == contents(other)


def contents(images):
    """What is known of each image but for its name, in any order."""
    return sorted(
        (np.asarray(images.read(i)).tobytes(), images.class_names[label], images.caption(i))
        for i, label in enumerate(images.labels.tolist())
    )
