"""The experiment on partial selection: it goes on where it stopped, and its figures are right."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import emoji_pictures
import methods
import numpy as np
import one_run
import partial_selection
import picture_sets
import pytest
import records
import scipy
import selection_numbers
import selection_tables
import torch
from click.testing import CliRunner
from methods import FULL, Heads, Method
from PIL import Image
from support.training import synthetic

from unicom_ext.data.glyphs import Glyphs

RECIPE = one_run.Recipe(epochs=1, batch_size=80, width=1)
FEW = [FULL, Method("partial", 0.3, 0.5), Method("matryoshka"), Method("filter")]


def drawn(num_classes, seed, captions):
    """Patterns in three equal colours."""
    images = synthetic(num_classes, seed)
    return Glyphs(
        images=images.pictures.images[:, None].repeat(3, axis=1),
        labels=images.labels,
        fonts=np.zeros(len(images), np.int64),
        codepoints=np.arange(num_classes) + 0x4E00,
        captions=captions,
        font_names=["1"],
    )


@pytest.fixture
def tiny(monkeypatch):
    # Of five words there are enough texts for so many clusters.
    captions = [f"PATTERN {c} WITH {c % 7} AND {c % 11}" for c in range(60)]
    pictures = drawn(60, 1, captions)
    monkeypatch.setattr(picture_sets, "load", lambda name, cache: pictures)
    monkeypatch.setattr(partial_selection, "RECIPES", {"glyphs": RECIPE})
    # Histograms of gradients take long.
    monkeypatch.setattr(partial_selection, "plan", lambda quick: [("text", FEW)])
    monkeypatch.setattr(selection_tables, "PRIMARY", (FEW[1], "text", 16))
    return pictures


def call(*arguments):
    return CliRunner().invoke(partial_selection.main, arguments, catch_exceptions=False)


def without_timing(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "machine")} for r in records]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_is_summed_up(tiny, tmp_path, set_threads):
    set_threads(1)
    path = tmp_path / "results.jsonl"
    arguments = ["--results", str(path), "--seeds", "2", "--threads", "1"]
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert "glyphs: 20 runs, 20 of them to do" in done.output
    whole = without_timing(path)
    assert [r["stage"] for r in whole] == ["tuning"] * 12 + ["test"] * 8
    assert [r["seed"] for r in whole[12:]] == [0] * 4 + [1] * 4
    for record in whole:
        assert np.isfinite(record["loss"])
        assert record["classes"]["classes"] == round(2.3 * 30)
        is_full = (record["name"], record["sample_rate"]) == ("partial", 1)
        assert ("pca" in record["results"]) == (is_full and record["stage"] == "test")
    # The margin of the filter is that of full softmax, which its results on validation chose.
    margins = {r["candidate"]: r["results"]["leading"]["recall"] for r in whole[:3]}
    best = max(margins, key=lambda m: np.mean(list(margins[m].values())))
    chosen = methods.CANDIDATES["partial"][best]
    for r in [r for r in whole if r["name"] == "filter"] + whole[12:13]:
        assert {name: r["settings"][name] for name in chosen} == chosen

    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:18]) + lines[18][:50])
    done = call(*arguments)
    assert "20 runs, 2 of them to do" in done.output
    assert without_timing(path) == whole

    done = call("--results", str(path), "--summary")
    assert done.exit_code == 0, done.output
    for name in ("curves", "grid"):
        assert (tmp_path / f"glyphs-{name}.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text()
    for row in ("full, r1 = 1, r2 = 1", "r1 = 0.3, r2 = 0.5", "matryoshka", "PCA of full",
                "interclass filter", "Asked first", "r1, r2 chosen on validation"):  # fmt: skip
        assert row in text
    numbers = selection_numbers.numbers(records.read(path))["glyphs"]["text"]["tables"]
    a, b = ([r["results"]["leading"]["recall"]["16"] for r in whole[12:] if r["name"] == name]
            for name in ("matryoshka", "partial"))  # fmt: skip
    cell = numbers["Recall@1 at leading dimensions"]["matryoshka"]["16"]
    assert cell["mean"] == pytest.approx(np.mean(a))
    assert cell["difference"]["mean"] == pytest.approx(np.mean(a) - np.mean(b[::2]))

    done = call(*arguments, "--epochs", "2")
    assert done.exit_code == 1
    assert "'epochs': 1" in done.output
    assert "give another file" in done.output


def test_what_answers_the_question_comes_first_and_is_tuned_before():
    todo = list(partial_selection.tasks(partial_selection.plan(False), 5))
    kinds = len(picture_sets.LABELS)
    everything = kinds * (len(methods.GRID) + len(methods.RIVALS)) + len(methods.SMALL_SCALE)
    assert len(todo) == len(set(todo)) == everything * (3 + 5)
    few = len(methods.QUICK) * (3 + 5)
    assert todo[:few] == list(partial_selection.tasks(partial_selection.plan(True), 5))
    assert {t.method for t in todo[: 2 * few]} == set(methods.QUICK)
    assert {t.labels for t in todo[:few]} == {"joint"}
    seen = []
    for task in todo:
        same = [t for t in seen if (t.labels, t.method) == (task.labels, task.method)]
        if task.candidate is None:
            assert set(task.method.candidates) <= {t.candidate for t in same}
        seen.append(task)


def test_what_a_file_of_results_cannot_be(tmp_path):
    path = tmp_path / "results.jsonl"
    done = call("--results", str(path), "--summary")
    assert (done.exit_code, done.output) == (1, f"Error: {path}: there is no such file\n")
    with records.Records(path) as opened:
        opened.append({"a": 1})
        with pytest.raises(click.ClickException, match="another process is writing to it"):
            records.Records(path)
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(click.ClickException, match=r"results\.jsonl, line 2: is not JSON"):
        records.Records(path)
    assert path.read_text() == '{"a": 1}\n{"a"\n{"a": 3}\n'


def test_intervals_are_those_of_scipy():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5))
    series = [{seed: {"16": x} for seed, x in enumerate(values)} for values in (a, b)]
    found = selection_numbers.paired(*series, "16")
    right = scipy.stats.ttest_rel(a, b)
    low, high = right.confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(right.pvalue)
    del series[1][4]
    assert selection_numbers.paired(*series, "16").mean == pytest.approx((a - b)[:4].mean())
    assert selection_numbers.interval([0.5]) == (0.5, None, None, 1)
    assert selection_numbers.interval([0.0, 0.0]).p == 1
    assert selection_numbers.interval([0.5, 0.5]).p == 0


def test_holm_steps_down():
    # 0.05 / 4, 0.05 / 3, 0.05 / 2: the third fails, and so does the fourth.
    assert selection_numbers.holm([0.04, 0.012, 0.03, 0.016]) == [False, True, False, True]
    assert selection_numbers.holm([0.02, 0.026, 0.051]) == [False, False, False]
    assert selection_numbers.holm([0.05, 0.02]) == [True, True]
    assert selection_numbers.holm([]) == []


def test_matryoshka_is_the_sum_over_its_dimensions():
    settings = Method("matryoshka").settings("m2 0.3, s 32", None)
    heads = Heads(Method("matryoshka"), settings, 20, seed=3).double()
    x, labels = torch.randn(6, 128, dtype=torch.float64), torch.randint(20, (6,))
    total = 0.0
    for dim, head in zip(methods.DIMS, heads.heads, strict=True):
        assert head.weight.shape == (20, dim)
        unit = torch.nn.functional.normalize
        cosines = unit(x[:, :dim]) @ unit(head.weight).T
        target = cosines[range(6), labels]
        cosines[range(6), labels] = (target.acos() + 0.3).cos()
        total += torch.nn.functional.cross_entropy(32 * cosines, labels)
    assert heads(x, labels).item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "candidate", "right"),
    [
        (FULL, "m2 0.15, s 16", (0.15, 16.0, None)),
        (Method("softmax"), "s 8", (0.0, 8.0, None)),
        (Method("filter"), "above 0.4", (0.3, 32.0, 0.4)),
    ],
)
def test_a_candidate_sets_what_is_tuned_of_its_method(method, candidate, right):
    settings = method.settings(candidate, "m2 0.3, s 32" if method.name == "filter" else None)
    assert tuple(settings[n] for n in ("m2", "scale", "interclass_filter")) == right
    head = Heads(method, settings, 20, seed=0).heads[0]
    assert (head.margin.m2, head.scale, head.interclass_filter) == right


def test_random_dimensions_are_asked_by_each_picture_once():
    labels = torch.arange(31) % 5
    x = torch.randn(31, 128, dtype=torch.float64) + 0.5 * torch.randn(5, 128)[labels]
    found = one_run.at_random(x, labels, seed=4)
    assert found["recall"].keys() == {"8", "16", "32", "64"}
    right = 0
    for query in range(31):
        dims = np.random.default_rng([4, 2, query % 3]).permutation(128)[:16]
        cosines = torch.cosine_similarity(x[query, dims], x[:, dims])
        cosines[query] = -2
        right += int(labels[cosines.argmax()] == labels[query])
    assert found["recall"]["16"] == pytest.approx(right / 31)


def test_splits_share_no_class_and_validation_is_the_same_for_all_seeds(tiny):
    splits = [picture_sets.split(tiny, seed) for seed in (0, 1)]
    for split in splits:
        parts = [set(part.captions) for part in (split.train, split.validation, split.test)]
        assert [len(part) for part in parts] == [30, 6, 24]
        assert len(set.union(*parts)) == 60
    assert splits[0].validation.captions == splits[1].validation.captions
    assert splits[0].test.captions != splits[1].test.captions


def test_pseudo_classes_are_of_every_colour_of_the_words_or_of_both(monkeypatch):
    monkeypatch.setattr(picture_sets, "FEATURES", 12)
    whole = drawn(20, 3, [f"PATTERN {c}" for c in range(20)])
    grey = whole.images[:, :1, ::4, ::4]
    pictures = replace(whole, images=np.concatenate([grey, 255 - grey, 0 * grey + 7], axis=1))
    features = {kind: picture_sets._features(pictures, kind, 0) for kind in ("image", "text")}
    assert features["image"].shape == (120, 36)
    # The opposite colour has the same unsigned gradients, and where there are none is nothing.
    first, second, third = features["image"].split(12, dim=1)
    torch.testing.assert_close(first.abs(), second.abs(), rtol=1e-3, atol=1e-4)
    assert third.abs().max() < 1e-6
    joint = picture_sets._features(pictures, "joint", 0)
    torch.testing.assert_close(
        torch.cosine_similarity(joint[:1], joint[1:]),
        sum(torch.cosine_similarity(f[:1], f[1:]) for f in features.values()) / 2,
    )
    labelled, facts = picture_sets.labelled(pictures, "joint", 0)
    assert facts["classes"] == labelled.num_classes == 46
    assert facts["rows"] == 120
    assert facts["nmi"] > 0.5
    true, facts = picture_sets.labelled(pictures, "true", 0)
    assert true is pictures
    assert facts == {"classes": 20}


def package(folder, name, version):
    path = folder / f"{name.replace('/', '_')}@{version}" / "package"
    path.mkdir(parents=True)
    (path / "package.json").write_text(json.dumps({"name": name, "version": version}))
    return path


def test_emoji_are_read_from_packages(tmp_path):
    random = np.random.default_rng(0)
    # A shorter name, a skin tone, an emoji of too few vendors, and one without a caption.
    names = ["1f600", "0031-fe0f-20e3", "1f44d-1f3fd", "1f601", "1f602"]
    for number, ((name, major), pattern) in enumerate(emoji_pictures.VENDORS.items()):
        path = package(tmp_path, name, f"{major}.0.0")
        for code in names[: 3 if number > 1 else None]:
            stem = code.replace("-fe0f", "") if number % 2 else code
            file = path / pattern.replace("*", stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            alpha = np.zeros((64, 64, 4), np.uint8)
            alpha[16:48, 16:48] = [*random.integers(255, size=3), 255]
            Image.fromarray(alpha).save(file, lossless=True)
    with pytest.raises(click.ClickException, match="has no package emojilib@4"):
        emoji_pictures.build(tmp_path, tmp_path / "emoji.npz")
    captions = package(tmp_path, "emojilib", "4.0.3") / "dist" / "emoji-en-US.json"
    captions.parent.mkdir()
    words = {"😀": ["grinning_face", "smile"], "1️⃣": ["keycap_1"], "😁": ["beaming"]}
    captions.write_text(json.dumps(words))
    emoji_pictures.build(tmp_path, tmp_path / "emoji.npz")
    emoji = emoji_pictures.load(tmp_path / "emoji.npz")
    assert emoji.captions == ["keycap 1", "grinning face smile"]
    assert emoji.images.shape == (12, 3, 32, 32)
    assert emoji.labels.tolist() == [0] * 6 + [1] * 6
    assert emoji.fonts.tolist() == [*range(6)] * 2
    assert (emoji.images[:, :, :6, :6] == 0).all()
    assert emoji.images[:, :, 16, 16].any()
    assert len(set(emoji.codepoints.tolist())) == 2
