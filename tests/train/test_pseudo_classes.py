"""From clusters to training: features of the glyphs, prototypes, and pseudo-classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from support.training import DATA, TINY, run

from unicom_ext import PartialMarginSoftmax
from unicom_ext.cli.main import main
from unicom_ext.data import glyphs
from unicom_ext.data.dump import captions, name_features
from unicom_ext.utils.settings import ConfigError

TRAIN = DATA[0]


def train_on(labels, output):
    return run(output, config=replace(TINY, epochs=1, labels=str(labels)))


def test_prototypes_start_at_the_centroids(tmp_path):
    centroids = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    loss = PartialMarginSoftmax.from_centroids(centroids, sample_rate=0.5, seed=3)
    assert (loss.num_classes, loss.embedding_size, loss.sample_rate, loss.seed) == (30, 16, 0.5, 3)
    torch.testing.assert_close(F.normalize(loss.weight), F.normalize(centroids))
    torch.testing.assert_close(loss.weight.norm(dim=1), torch.full((30,), 0.04))
    np.save(tmp_path / "centroids.npy", centroids.numpy())
    loaded = PartialMarginSoftmax.from_centroids(tmp_path / "centroids.npy")
    assert torch.equal(loaded.weight, loss.weight)
    # Rows at their centroids are right from the start.
    loss.eval()
    loss(centroids, torch.arange(30))
    assert loss.last_metrics.top1.all()


@pytest.mark.parametrize(
    ("centroids", "words"),
    [
        (torch.ones(3), "matrix [C, d], got torch.float32 of shape [3]"),
        (torch.ones(3, 2).long(), "torch.int64"),
        (torch.ones(0, 2), "[0, 2]"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), "row 1"),
        (torch.eye(3).to_sparse(), "a dense tensor with values, got a torch.sparse_coo tensor"),
        (torch.eye(3, device="meta"), "a dense tensor with values, got one on the meta device"),
    ],
)
def test_bad_centroids(centroids, words):
    with pytest.raises(ValueError, match="centroids must be") as caught:
        PartialMarginSoftmax.from_centroids(centroids)
    assert words in str(caught.value)


def test_relabelled_glyphs():
    labels = np.full(len(TRAIN), -1)
    labels[::2] = 7
    labels[1::4] = 3
    new = glyphs.relabelled(TRAIN, labels)
    assert len(new) == np.count_nonzero(labels >= 0)
    assert new.num_classes == 2
    assert new.captions == ["pseudo-class 3", "pseudo-class 7"]
    kept = np.flatnonzero(labels >= 0)
    assert np.array_equal(new.images, TRAIN.images[kept])
    assert np.array_equal(new.labels, (labels[kept] == 7).astype(int))


@pytest.mark.slow
def test_training_on_pseudo_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 5, len(TRAIN)).astype(np.int32)
    (tmp_path / "clusters").mkdir()
    np.save(tmp_path / "clusters" / "labels_0000.npy", labels[:20])
    np.save(tmp_path / "clusters" / "labels_0001.npy", labels[20:])
    np.save(tmp_path / "one.npy", labels)
    both = [train_on(tmp_path / name, tmp_path / f"of-{name}") for name in ("clusters", "one.npy")]
    assert both[0]["data"]["train_classes"] == 5
    assert both[0]["data"]["train_images"] == np.count_nonzero(labels >= 0)
    assert both[0]["loss"] == both[1]["loss"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(3, np.int64), ["labels", "[3]", f"[{len(TRAIN)}]"]),
        (np.zeros(len(TRAIN)), ["labels", "float64", "integers"]),
        (np.full(len(TRAIN), -1), ["labels", "not all negative"]),
        (None, ["labels", "cannot be read"]),
    ],
)
def test_bad_pseudo_classes(tmp_path, array, words):
    if array is not None:
        np.save(tmp_path / "l.npy", array)
    with pytest.raises(ConfigError) as caught:
        train_on(tmp_path / "l.npy", tmp_path / "run")
    for word in words:
        assert word in str(caught.value)


def test_names_that_share_words_are_near():
    names = [
        "GREEK SMALL LETTER ALPHA",
        "GREEK SMALL LETTER ALPHA WITH TONOS",
        "BLACK CHESS QUEEN",
        "GREEK SMALL LETTER ALPHA",
    ]
    found = name_features(names, 128)
    cosine = found @ found.T
    torch.testing.assert_close(cosine.diag(), torch.ones(4))
    assert torch.equal(found[0], found[3])
    assert cosine[0, 1] > cosine[0, 2] + 0.15


def test_captions_keep_some_words():
    whole = captions(TRAIN, 1.0, 0)
    assert whole == [TRAIN.captions[label] for label in TRAIN.labels]
    some = captions(TRAIN, 0.5, 0)
    assert some == captions(TRAIN, 0.5, 0)
    assert all(set(a.split()) <= set(b.split()) for a, b in zip(some, whole, strict=True))
    assert all(some)
    none = captions(TRAIN, 0.0, 0)
    assert all(len(text.split()) == 1 for text in none)


@pytest.mark.slow
def test_features_then_clusters(tmp_path, monkeypatch):
    """The two commands as a user gives them."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(glyphs, "load", lambda: TRAIN)
    monkeypatch.setattr("unicom_ext.data.dump.SHARD_ROWS", 30)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    dump, output = tmp_path / "dump", tmp_path / "clusters"
    text = invoke("extract", "--output", dump, "--dim", 8)
    assert f"cluster {dump}" in text
    said = invoke(
        "cluster", dump, "--joint", "concat", "--clusters", TRAIN.num_classes, "--passes", 4,
        "--true-labels", dump / "true_labels.npy", "--images", dump / "images.npy",
        "--output", output,
    )  # fmt: skip
    summary = invoke("report", output).splitlines()
    assert summary[0].startswith(f"{len(TRAIN):,} rows in ")
    assert all(line in said for line in summary)
    facts = json.loads((output / "clusters.json").read_text())
    assert facts["rows"]["clustered"] == len(TRAIN)
    assert len(facts["source"]["shards"]) > 1
    assert facts["quality"]["nmi"] > 0.3
    assert (output / "members.png").exists()
