"""Features of images in files: what they hold, and that neither a kill nor others' files matter."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from rich.console import Console
from support.images import encoded, exactly, patterns, pictures

from unicom_ext.cli.main import main
from unicom_ext.cluster import ClusterConfig, cluster
from unicom_ext.data import ngrams
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import open_part
from unicom_ext.data.source import Source
from unicom_ext.encoders import contents as named
from unicom_ext.encoders import dump, extract, registry
from unicom_ext.encoders.extract import some_words
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.retrieval.files import evaluate_files, probe_files
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.settings import ConfigError

CONFIG = ExtractConfig(encoder="pixels", dim=4)
WORDS = "GREEK SMALL LETTER ALPHA"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(extract, "SHARD_ROWS", 5)
    monkeypatch.setattr(extract, "BATCH", 3)


def write(output, images=None, config=CONFIG, **options):
    images = patterns() if images is None else images
    return extract.extract(config, images, output, console=Console(file=io.StringIO()), **options)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


SHARDS = [f"{kind}/{kind}_000{i}" for kind in ("img_emb", "text_emb", "metadata") for i in range(3)]
NAMES = [f"{name}.jsonl" if "metadata" in name else f"{name}.npy" for name in SHARDS]
NAMES += ["true_labels.npy", "images.npy", "encoder.pt"]


# ---- what they hold ------------------------------------------------------------------------------


def test_features_are_those_of_the_encoders(tmp_path):
    images = patterns()
    facts = write(tmp_path, images)
    assert facts == json.loads((tmp_path / "extract.json").read_text())
    assert facts["config"] == CONFIG.to_dict()
    assert (facts["image_dim"], facts["text_dim"], facts["unreadable"]) == (4, 4, 0)
    assert facts["files"] == NAMES
    assert set(contents(tmp_path)) == {*NAMES, "extract.json"}

    pixels = torch.from_numpy(images.pictures.images)[:, None] / 255
    encoder = registry.create(CONFIG, 4)
    encoder.module.fit(pixels)
    rows = Source(tmp_path).take(np.arange(12))
    torch.testing.assert_close(rows, F.normalize(encoder.module(pixels)), atol=1e-3, rtol=1e-3)
    text = ngrams.NGrams(4)
    text.fit([images.caption(i) for i in range(12)])
    expected = text.encode([images.caption(i) for i in range(12)])
    found = Source(tmp_path, joint="text").take(np.arange(12))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert np.load(tmp_path / "true_labels.npy").tolist() == images.labels.tolist()
    assert np.array_equal(np.load(tmp_path / "images.npy"), images.pictures.images)
    lines = (tmp_path / "metadata" / "metadata_0001.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"name": "5", "class": "PATTERN B", "caption": "PATTERN B"}
    # A fitted encoder serves other images.
    other = write(tmp_path / "other", config=dataclasses.replace(
        CONFIG, weights=str(tmp_path / "encoder.pt")))  # fmt: skip
    assert "encoder.pt" not in other["files"]
    again = Source(tmp_path / "other").take(np.arange(12))
    assert torch.equal(again, rows)


def test_without_captions_labels_and_thumbnails(tmp_path):
    images = patterns(captions=False, labels=np.full(12, -1))
    facts = write(tmp_path, images, dataclasses.replace(CONFIG, thumbnails=0))
    assert facts["text_dim"] is None
    assert not (tmp_path / "text_emb").exists()
    assert not (tmp_path / "images.npy").exists()
    assert (np.load(tmp_path / "true_labels.npy") == -1).all()
    line = (tmp_path / "metadata" / "metadata_0000.jsonl").read_text().splitlines()[1]
    assert json.loads(line) == {"name": "1"}
    assert write(tmp_path / "b", config=dataclasses.replace(CONFIG, text_encoder="none"))[
        "text_dim"
    ] is None  # fmt: skip


def test_images_that_cannot_be_read_have_zero_rows_and_no_label(tmp_path):
    folder = tmp_path / "pictures"
    pictures(folder, [f"{c}/{i}.jpg" for c in "ab" for i in range(4)])
    (folder / "a" / "2.jpg").write_bytes(encoded(0, "JPEG")[:80])
    for name in ("a/1.txt", "a/2.txt"):
        (folder / name).write_text(f"a caption of {name}")
    config = dataclasses.replace(CONFIG, data=str(folder), dim=3, thumbnails=8)
    facts = write(tmp_path / "out", open_part(config, 0, "all"), config)
    assert facts["unreadable"] == 1
    rows = Source(tmp_path / "out").take(np.arange(8))
    assert (rows.norm(dim=1) == 0).nonzero().flatten().tolist() == [2]
    text = Source(tmp_path / "out", joint="text").take(np.arange(8))
    assert text.any(dim=1).nonzero().flatten().tolist() == [1]
    assert np.load(tmp_path / "out" / "true_labels.npy").tolist() == [0, 0, -1, 0, 1, 1, 1, 1]
    line = (tmp_path / "out" / "metadata" / "metadata_0000.jsonl").read_text().splitlines()[2]
    found = json.loads(line)
    assert (found["name"], found["class"]) == ("a/2.jpg", "a")
    assert found["unreadable"].startswith(str(folder / "a" / "2.jpg"))
    assert np.load(tmp_path / "out" / "images.npy").shape == (8, 8, 8)
    # All of them: nothing is left to look at.
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"\xff\xd8nothing")
    with pytest.raises(ConfigError):
        write(tmp_path / "none", open_part(config, 0, "all"), config)


def test_labels_are_those_of_all_parts(tmp_path):
    """So that a classifier of one part can be tested on another."""
    folders = ("train/a", "train/b", "test/b", "test/c")
    pictures(tmp_path, [f"pictures/{folder}/{i}.png" for folder in folders for i in range(2)])
    config = dataclasses.replace(CONFIG, data=str(tmp_path / "pictures"), dim=2, thumbnails=0)
    for part, labels in (("train", [0, 0, 1, 1]), ("query", [1, 1, 2, 2])):
        write(tmp_path / part, open_part(config, 0, part), config)
        assert np.load(tmp_path / part / "true_labels.npy").tolist() == labels


def test_features_of_different_encoders_are_not_compared_in_silence(tmp_path):
    """As those of encoders that were fitted to each part by itself."""
    a, b, again = (tmp_path / name for name in ("a", "b", "again"))
    config = dataclasses.replace(CONFIG, weights=str(a / "encoder.pt"))
    write(a, patterns(20))
    write(b, patterns(11))
    write(again, patterns(11), config)
    message = exactly(
        f"test: {b} has features of another encoder than {a} (weights): cosines between them say "
        f"nothing. To have the same, extract them with --weights {a}/encoder.pt"
    )
    with pytest.warns(UserWarning, match=message):
        probe_files(a, a / "true_labels.npy", b, b / "true_labels.npy")
    with pytest.warns(UserWarning, match="^gallery: "):
        evaluate_files(a, a / "true_labels.npy", b, b / "true_labels.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_files(a, a / "true_labels.npy", again, again / "true_labels.npy")
        # Where nothing says of which encoder they are, and where they are not of it.
        probe_files(a, a / "true_labels.npy", b / "img_emb", b / "true_labels.npy")
        probe_files(a, a / "true_labels.npy", b, b / "true_labels.npy", joint="text")


def test_labels_of_other_images_are_refused(tmp_path):
    """Of as many: each row would get the label of another one."""
    a, b, same = (tmp_path / name for name in ("a", "b", "same"))
    write(a, patterns(20))
    write(b, patterns(20, labels=np.arange(20) % 2))
    write(same, patterns(20), dataclasses.replace(CONFIG, dim=3))
    right, wrong = a / "true_labels.npy", b / "true_labels.npy"
    config = ClusterConfig(clusters=2, passes=1)
    for name, part, call in (
        ("labels", "features", lambda y: evaluate_files(a, y)),
        ("gallery_labels", "gallery", lambda y: evaluate_files(a, right, a, y)),
        ("labels", "features", lambda y: probe_files(a, y, a, right)),
        ("test_labels", "features", lambda y: probe_files(a, right, a, y)),
        (
            "true_labels", "features",
            lambda y: cluster(config, a, tmp_path / "c", true_labels=y, overwrite=True),
        ),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=exactly(
            f"{name}: {wrong}: are classes of other images (20 of 4 classes) than these (20 of 4 "
            f"classes); must be those of the {part}"
        )):  # fmt: skip
            call(wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a gallery that holds the queries
            call(same / "true_labels.npy")
    with pytest.raises(SourceError, match=r"^labels: .*: are clusters of other images "):
        evaluate_files(b, tmp_path / "c")


def test_small_pictures_in_colour(tmp_path):
    array = np.full((6, 40, 40, 3), (250, 120, 3), np.uint8)
    array += np.random.default_rng(0).integers(0, 5, array.shape, dtype=np.uint8)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "unused.pt")
    config = dataclasses.replace(CONFIG, encoder="support.encoder:mean_colour", thumbnails=16)
    write(tmp_path / "out", ImageSet.of_arrays(array, np.zeros(6, int), ["x"]), config)
    small = np.load(tmp_path / "out" / "images.npy")
    assert small.shape == (6, 16, 16, 3)
    assert abs(small.astype(int).mean((0, 1, 2)) - (252, 122, 5)).max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder": "small"}, "weights: small has none of its own; name a file or the output of"),
        ({"encoder": "vit-s-16"}, "weights: vit-s-16 has none of its own"),
        ({"encoder": "hogg"}, "did you mean hog"),
        ({"dim": 40}, "encoder: pixels is not possible here: dim: got 40"),
        ({"text_encoder": "bert"}, "text_encoder: got 'bert'"),
    ],
)
def test_encoders_that_are_not_possible(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        write(tmp_path / "out", config=dataclasses.replace(CONFIG, **settings))
    assert not (tmp_path / "out" / "img_emb").exists()


def test_some_words_of_a_caption():
    assert some_words(WORDS, 1.0, 0, 0) == WORDS
    some = [some_words(WORDS, 0.5, 0, i) for i in range(200)]
    assert some == [some_words(WORDS, 0.5, 0, i) for i in range(200)]
    assert all(set(text.split()) <= set(WORDS.split()) and text for text in some)
    assert 0.45 < np.mean([len(text.split()) for text in some]) / 4 < 0.58
    assert {len(some_words(WORDS, 1e-9, 0, i).split()) for i in range(20)} == {1}
    assert some_words("", 0.5, 0, 0) == ""


# ---- kills ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing on the way may mend it."""


def kill_at(monkeypatch, place, name, number):
    """Let the call of this number end the program, before or after it has done its work."""
    real, calls = getattr(place, name), []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, killed)
    return calls


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_extraction_goes_on(tmp_path, overwrite):
    """Whichever file it was about to write or move."""
    expected, number, ended = tmp_path / "expected", 0, False
    write(expected)
    while not ended:
        number += 1
        output = tmp_path / f"{number}"
        if overwrite:  # another dump is there, with more shards
            write(output, patterns(17), dataclasses.replace(CONFIG, dim=3))
            before = contents(output)
        with pytest.MonkeyPatch.context() as patch:
            calls = [
                kill_at(patch, place, name, number)
                for place, name in ((extract, "write_file"), (dump, "write_file"), (Path, "rename"))
            ]
            try:
                write(output, overwrite=overwrite)
                ended = all(len(c) < number for c in calls)
            except Killed:
                if overwrite and not (output / "extract.tmp" / "true_labels.npy").exists():
                    now = contents(output)
                    kept = {k: v for k, v in now.items() if not k.startswith("extract.tmp")}
                    in_place = before.keys() <= kept.keys()
                    assert not in_place or kept == before
        assert write(output, overwrite=overwrite)["files"] == NAMES
        assert contents(output) == contents(expected)
    assert number > 8


def test_what_is_whole_is_not_made_again(tmp_path, monkeypatch):
    facts = write(tmp_path)
    monkeypatch.setattr(extract._Extraction, "run", None)
    assert write(tmp_path) == facts
    moved = dataclasses.replace(CONFIG, workers=1, device="cpu")
    assert write(tmp_path, config=moved) == facts
    with pytest.raises(SourceError) as caught:
        write(tmp_path, config=dataclasses.replace(CONFIG, dim=3))
    assert str(caught.value) == (
        f"{tmp_path}/extract.json: is of other features (dim: 3 here, 4 there); overwrite them, or "
        "name another directory"
    )
    with pytest.raises(SourceError, match=r"other images: .*'images': 8.* here, .*12.* there"):
        write(tmp_path, patterns(8))


@pytest.mark.parametrize("name", ["img_emb/img_emb_0001.npy", "true_labels.npy", "encoder.pt"])
def test_what_was_deleted_is_made_again(tmp_path, name):
    facts, before = write(tmp_path), contents(tmp_path)
    (tmp_path / name).unlink()
    assert write(tmp_path) == facts
    assert contents(tmp_path) == before


def test_other_captions_are_other_features_where_they_are_used(tmp_path):
    images, changed = patterns(), patterns()
    changed.pictures._captions[3] = "PATTERN E"  # as long as it was
    write(tmp_path / "a", images)
    with pytest.raises(SourceError, match=r"is of other features .a caption has changed.; "):
        write(tmp_path / "a", changed)
    write(tmp_path / "a", changed, overwrite=True)
    line = (tmp_path / "a/metadata/metadata_0000.jsonl").read_text().splitlines()[3]
    assert json.loads(line)["caption"] == "PATTERN E"
    without = dataclasses.replace(CONFIG, text_encoder="none")
    assert write(tmp_path / "b", images, without) == write(tmp_path / "b", changed, without)


def test_other_contents_of_the_same_files_are_other_features(tmp_path, monkeypatch):
    """Weights that were trained on since, and a factory whose code has changed."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_encoders.py").write_text(
        "import torch\n\ndef image():\n    return torch.nn.Sequential("
        "torch.nn.Flatten(), torch.nn.LazyLinear(3))\n"
    )
    monkeypatch.syspath_prepend(folder)
    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, encoder="small", weights=str(weights), text_encoder="none")
    untrained = dataclasses.replace(config, weights="")
    torch.save(registry.create(untrained, 8).module.state_dict(), weights)
    write(tmp_path / "a", config=config)
    torch.save(registry.create(untrained, 8).module.state_dict(), weights)
    with pytest.raises(SourceError, match="what weights names has changed"):
        write(tmp_path / "a", config=config)
    found = [named.contents({"encoder": "own_encoders:image", "weights": str(weights)})]
    (folder / "own_encoders.py").write_text("def image():\n    return None\n")
    found.append(named.contents({"encoder": "own_encoders:image", "weights": str(weights)}))
    assert found[0].keys() == found[1].keys() == {"encoder", "weights"}
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["encoder"] != found[1]["encoder"]


def test_a_single_byte_of_weights_counts(tmp_path):
    """Wherever it is: layers that were frozen stay as they are around it."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights, content = folder / "model.safetensors", bytearray(1 << 20)
    settings = {"encoder": f"hf:{folder}", "weights": str(weights)}
    weights.write_bytes(content)
    before = named.contents(settings)
    content[300_000] = 1
    weights.write_bytes(content)
    after = named.contents(settings)
    assert before["encoder"] != after["encoder"]
    assert before["weights"] != after["weights"]


def test_contents_of_folders_and_of_nothing(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = {"encoder": f"hf:{folder}", "text_encoder": f"sentence:{folder}", "weights": ""}
    found = named.contents(settings)
    assert found.keys() == {"encoder", "text_encoder"}
    (folder / "model.safetensors").write_bytes(b"1")
    other = named.contents(settings)
    assert found["encoder"] != other["encoder"] == other["text_encoder"]
    # A run's output: the last checkpoint counts, not the pages beside it.
    for step in (9, 10):
        (tmp_path / f"run/step-{step}").mkdir(parents=True)
        (tmp_path / f"run/step-{step}/.metadata").write_text(f"{step}")
    found = named.contents({"weights": str(tmp_path / "run")})
    (tmp_path / "run/report.html").write_text("a page")
    (tmp_path / "run/step-9/.metadata").write_text("other")
    assert named.contents({"weights": str(tmp_path / "run")}) == found
    (tmp_path / "run/step-11").mkdir()
    assert named.contents({"weights": str(tmp_path / "run")}) != found
    for name in (
        "hog",
        "timm:resnet18",
        "no.such_module:f",
        f"hf:{tmp_path}/none",
        "strange name:f",
    ):
        assert named.contents({"encoder": name, "text_encoder": "ngrams"}) == {}


def test_an_empty_caption_has_no_features(tmp_path):
    images = patterns()
    for i in (1, 6):
        images.pictures._captions[i] = ""
    write(tmp_path, images)
    text = Source(tmp_path, joint="text").take(np.arange(12))
    assert (text.norm(dim=1) == 0).nonzero().flatten().tolist() == [1, 6]
    encoder = ngrams.NGrams(4)
    encoder.fit([images.caption(i) for i in range(12) if i not in (1, 6)])
    torch.testing.assert_close(text[:1], encoder.encode(["PATTERN A"]), atol=1e-3, rtol=1e-3)
    image = F.normalize(Source(tmp_path).take(np.arange(12)))
    for joint, expected in (
        ("average", image),
        ("concat", torch.cat([image, torch.zeros(12, 4)], dim=1)),
    ):
        joined = Source(tmp_path, joint=joint).take(np.arange(12))
        torch.testing.assert_close(joined[[1, 6]], expected[[1, 6]])
        assert not torch.isclose(joined[0], expected[0], atol=0.05).all()
    images.pictures._captions[:] = [""] * 12
    write(tmp_path / "none", images)
    assert (Source(tmp_path / "none", joint="text").take(np.arange(12)) == 0).all()


def test_a_killed_extraction_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, extract, "write_file", 5)
        with pytest.raises(Killed):
            write(tmp_path, config=dataclasses.replace(CONFIG, dim=3))
    write(tmp_path)
    write(tmp_path / "new")
    found = contents(tmp_path / "new")
    assert {name: contents(tmp_path)[name] for name in found} == found


# ---- other files ---------------------------------------------------------------------------------


def test_a_dump_takes_the_place_of_an_earlier_one(tmp_path):
    output, new = tmp_path / "used", tmp_path / "new"
    write(output)
    (output / "mine.txt").write_text("mine")
    (output / "img_emb" / "mine.txt").write_text("mine")
    write(output, patterns(8), overwrite=True)
    write(new, patterns(8))
    left = contents(output)
    assert left.pop("mine.txt") == left.pop("img_emb/mine.txt") == b"mine"
    assert left == contents(new)


def test_an_earlier_dump_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    write(tmp_path)
    before, save = contents(tmp_path), np.save

    def full(file, arr):
        if arr.dtype == np.int64:  # the labels, after all others
            file.write(b"part")
            raise OSError("14778368 requested and 1535872 written")
        save(file, arr)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"true_labels\.npy cannot be written: 14778368 requested"):
        write(tmp_path, patterns(8), overwrite=True)
    now = {k: v for k, v in contents(tmp_path).items() if not k.startswith("extract.tmp")}
    assert now == before


@pytest.mark.parametrize(
    "name",
    ["img_emb/img_emb_7.npy", "text_emb/text_emb_0000.npy", "images.npy", "extract.json"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_dump_replaces_no_file_of_others(tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"files": ["notes.txt"]}')
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SourceError) as caught:
        write(tmp_path, overwrite=overwrite)
    assert str(caught.value) == f"{tmp_path / name}: is there already, and not of an earlier dump"
    assert contents(tmp_path) == before


def test_the_list_of_a_dump_reaches_no_other_file(tmp_path):
    output = tmp_path / "output"
    write(output)
    for name in ("../notes.npy", "img_emb/../../notes.npy", str(tmp_path / "notes.npy"), 7):
        (output / "extract.json").write_text(json.dumps({"files": ["images.npy", name]}))
        (tmp_path / "notes.npy").write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(SourceError, match=r"extract\.json: is there already"):
            write(output, overwrite=True)
        assert contents(tmp_path) == before


# ---- the command ---------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command(tmp_path):
    folder, output = tmp_path / "pictures", tmp_path / "features"
    pictures(folder, [f"{c}/{i}.png" for c in "abcd" for i in range(3)])
    (folder / "a" / "0.txt").write_text("a caption")
    (folder / "b" / "1.png").write_bytes(b"nothing")
    result = invoke("extract", "--data", folder, "--output", output, "--dim", 3)
    assert result.exit_code == 0, result.output
    assert f"Features of 12 images of 4 classes in {output}." in result.output
    assert "1 could not be read: their rows are zero" in result.output
    assert f"cluster {output} --joint concat --clusters 4" in result.output
    part = invoke(
        "extract", "--data", folder, "--output", tmp_path / "part", "--part", "train", "--dim", 2,
        "--encoder", "pixels",
    )  # fmt: skip
    assert "Features of 6 images of 2 classes" in part.output
    for options, words in (
        (["--part", "validation"], "part: got 'validation', but"),
        (["--data", tmp_path / "nowhere"], f"{tmp_path / 'nowhere'}: is not there"),
        (["--encoder", "vit-b-32"], "weights: vit-b-32 has none of its own"),
        (["--kept-words", 2], "kept_words: got 2.0, must be a number in (0, 1]"),
        (["--dim", 2], "is of other features"),
    ):
        arguments = ["--data", folder, "--output", output, "--dim", 3, *options]
        result = invoke("extract", *arguments)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), result.output


def test_names_that_are_not_text(tmp_path):
    folder = tmp_path / "images"
    names = [os.fsdecode(b"caf\xe9%d.png" % i) for i in range(6)]
    pictures(folder, names)
    (folder / names[5]).write_bytes(b"spoilt")
    config = dataclasses.replace(CONFIG, data=str(folder), workers=0)
    facts = write(tmp_path / "a", open_part(config, 0, "all"), config)
    assert facts["unreadable"] == 1
    lines = [
        json.loads(line)
        for file in sorted((tmp_path / "a" / "metadata").iterdir())
        for line in file.read_text("utf-8").splitlines()
    ]
    assert [line["name"] for line in lines] == names


def test_a_full_disk_is_said_and_not_a_bus_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    path = tmp_path / "a" / "extract.tmp" / "images.npy"
    with pytest.raises(OSError, match=exactly(
        f"[Errno 28] {path} cannot be written: No space left on device"
    )):  # fmt: skip
        write(tmp_path / "a")
    monkeypatch.undo()
    assert write(tmp_path / "a")["unreadable"] == 0
