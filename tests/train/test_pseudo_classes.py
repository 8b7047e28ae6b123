"""From clusters to training: features of the glyphs, prototypes, and pseudo-classes."""

from __future__ import annotations

import io
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from support.training import DATA, FLAT, TINY, assert_same_bits, run, saved

from unicom_ext import CombinedMargin, PartialMarginSoftmax, reference
from unicom_ext.cli.main import main
from unicom_ext.data.images.pictures import ArrayPictures
from unicom_ext.data.labels import read_labels, read_positives
from unicom_ext.encoders import registry
from unicom_ext.train import report
from unicom_ext.train.interrupt import Interrupted
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import CheckpointError
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
    new = TRAIN.relabelled(labels)
    assert len(new) == np.count_nonzero(labels >= 0)
    assert new.num_classes == 2
    assert new.class_names == ["pseudo-class 3", "pseudo-class 7"]
    kept = np.flatnonzero(labels >= 0)
    assert np.array_equal(new.rows, kept)
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


def test_a_run_goes_on_where_labels_and_weights_have_moved(tmp_path, monkeypatch):
    """What is in the files counts, and not where they lie."""
    monkeypatch.setattr(report, "write", lambda *arguments: None)
    labels, names = np.arange(len(TRAIN)) % 7, ("first", "second")
    (folder, moved), other = (tmp_path / name for name in names), tmp_path / "other"
    for path, state in ((folder, 0), (moved, 0), (other, 1)):
        path.mkdir()
        np.save(path / "labels.npy", labels + state * (np.arange(len(TRAIN)) == 5))
        torch.manual_seed(state)
        encoder = registry.create(TINY, TINY.embedding_size).module
        torch.save(encoder.state_dict(), path / "encoder.pt")

    def of(labels, weights):
        files = {"labels": str(labels / "labels.npy"), "weights": str(weights / "encoder.pt")}
        return replace(TINY, epochs=1, evaluate_every=0, **files)

    def stop(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    whole = run(tmp_path / "whole", config=of(folder, folder))
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config=of(folder, folder), on_step=stop)
    for config, words in (
        (of(other, folder), "the checkpoint is of other data"),
        (of(folder, other), "is of another config: weights: "),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(tmp_path / "run", config=config, resume=True)
    shutil.rmtree(folder)
    assert run(tmp_path / "run", config=of(moved, moved), resume=True)["loss"] == whole["loss"]


def test_the_page_shows_the_clusters_of_the_labels(tmp_path, monkeypatch):
    labels, pages = np.arange(len(TRAIN)) // 6 % 4, []
    several = np.full((len(TRAIN), 2), -1)
    several[:, 1] = labels
    several[::7] = -1
    for name, array in (("one", np.where(several[:, 1] < 0, -1, labels)), ("several", several)):
        np.save(tmp_path / f"{name}.npy", array)
        train_on(tmp_path / f"{name}.npy", tmp_path / name)
        pages.append((tmp_path / name / "report.html").read_text())
    images = np.count_nonzero(several[:, 1] >= 0)
    for page in pages:
        assert f"4 clusters of {images} images. Against the true classes: purity 0." in page
    run(tmp_path / "plain", config=replace(TINY, epochs=1))
    assert 'id="clusters"' not in (tmp_path / "plain" / "report.html").read_text()


def test_clusters_of_other_images_are_refused(tmp_path):
    """Of as many: each would get the label of another one."""
    np.save(tmp_path / "labels_0000.npy", np.arange(len(TRAIN)) % 7)
    other = TRAIN.take(np.arange(len(TRAIN))[::-1])
    for images, right in ((TRAIN.facts(), True), (None, True), (other.facts(), False)):
        (tmp_path / "clusters.json").write_text(json.dumps({"images": images}))
        if right:
            metrics = train_on(tmp_path, tmp_path / f"right {images is None}")
            assert metrics["data"]["train_classes"] == 7
            continue
        with pytest.raises(ConfigError) as caught:
            train_on(tmp_path, tmp_path / "run")
        assert str(caught.value) == (
            f"labels: {tmp_path}: are clusters of other images (120 of 20 classes) than these (120 "
            "of 20 classes); must be of features that were extracted with the same data, seed and "
            "fractions, and of the part train"
        )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kind", "file", "facts"),
    [
        ("labels_0000.npy", "clusters", "clusters.json", "images"),
        ("true_labels.npy", "classes", "extract.json", "data"),
    ],
)
def test_files_of_labels_of_other_images_are_refused(tmp_path, name, kind, file, facts):
    for path in (tmp_path / name, tmp_path / "mine.npy"):
        np.save(path, np.arange(len(TRAIN)) % 7)
    other = TRAIN.take(np.arange(len(TRAIN))[::-1])
    (tmp_path / file).write_text(json.dumps({facts: other.facts()}))
    with pytest.raises(ConfigError, match=f"{name}: are {kind} of other images .120 of 20 classes"):
        train_on(tmp_path / name, tmp_path / "run")
    train_on(tmp_path / "mine.npy", tmp_path / "mine")
    (tmp_path / file).write_text(json.dumps({facts: TRAIN.facts()}))
    train_on(tmp_path / name, tmp_path / "run")


def test_relabelled_with_several():
    labels = np.full((len(TRAIN), 3), -1)
    labels[0] = [7, -5, 3]
    labels[2] = [-1, 9, -1]
    labels[5] = [3, 3, 7]
    new = TRAIN.relabelled(labels)
    assert new.labels.tolist() == [[1, 0, -1], [2, -1, -1], [0, 0, 1]]
    assert new.first_labels.tolist() == [1, 2, 0]
    assert new.class_names == ["pseudo-class 3", "pseudo-class 7", "pseudo-class 9"]
    assert new.rows.tolist() == [0, 2, 5]


def several_labels(seed=0):
    """Of random classes, rows filled up with -1; some images have none."""
    rng = np.random.default_rng(seed)
    labels = rng.permuted(np.tile(np.arange(9), (len(TRAIN), 1)), axis=1)[:, :4].astype(np.int32)
    labels[rng.integers(5, size=len(TRAIN))[:, None] <= np.arange(4)] = -1
    return labels


def test_steps_have_the_loss_of_several_labels(tmp_path):
    """The driver's loss is that of the module with these labels; one label is as it was."""
    train_set = TRAIN.relabelled(several_labels())
    config = replace(TINY, labels="x", multi_label="separate", sample_rate=1.0, feature_rate=1.0)
    trainer = Trainer(config, train_set)
    (part,) = trainer.batches[0]
    images, labels = trainer._input(part), trainer.labels[part.indices]
    assert labels.shape == (16, 4)
    trainer.encoder.train()
    with torch.no_grad():
        embeddings = trainer.encoder(images)
    right = reference.partial_margin_softmax(
        embeddings.double(), labels, trainer.loss.weight.detach().double(),
        margin=CombinedMargin(config.m1, config.m2, config.m3), scale=config.scale,
        multi_label="separate", ignore_index=-1,
    )  # fmt: skip
    assert trainer.step_once() == pytest.approx(float(right), rel=1e-4)


@pytest.mark.slow
def test_training_on_several_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *arguments: None)  # it takes longer than training
    labels = several_labels()
    (tmp_path / "clusters").mkdir()
    for kind, array in (("positives", labels), ("labels", labels[:, 0])):
        np.save(tmp_path / "clusters" / f"{kind}_0000.npy", array[:20])
        np.save(tmp_path / "clusters" / f"{kind}_0001.npy", array[20:])
    np.save(tmp_path / "several.npy", labels)
    np.save(tmp_path / "one.npy", labels[:, 0])
    config = replace(TINY, epochs=2, evaluate_every=0, checkpoint_every=3)

    def losses(labels, output, text=None, **settings):
        settings = {"labels": str(tmp_path / labels), **settings}
        return run(tmp_path / output, config=replace(config, **settings), text=text)["loss"]

    text = io.StringIO()
    several = losses("clusters", "a", text)
    images = np.count_nonzero((labels >= 0).any(axis=1))
    said = f"Training on {images} images of 9 characters, up to 4 of them each, testing on"
    assert said in " ".join(text.getvalue().split())
    assert losses("several.npy", "b") == several
    assert losses("several.npy", "c", multi_label="separate") != several
    assert losses("clusters", "d", positives=2) != several
    assert losses("clusters", "e", positives=1) == losses("one.npy", "f")

    def stop(done):
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    settings = replace(config, labels=str(tmp_path / "clusters"))
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", config=settings, on_step=stop)
    assert run(tmp_path / "parts", config=settings, resume=True)["loss"] == several
    assert_same_bits(saved(tmp_path / "parts"), saved(tmp_path / "a"))


def train_on_several(group, path):
    """The losses of an epoch; its batches do not divide by the ranks."""
    labels = read_positives("labels", path, len(TRAIN))
    config = replace(TINY, batch_size=16, labels=str(path), encoder=FLAT)
    trainer = Trainer(config, TRAIN.relabelled(labels), group)
    return [trainer.step_once() for _ in range(trainer.steps_per_epoch)]


@pytest.mark.slow
def test_ranks_train_on_several_labels(ranks, tmp_path):
    np.save(tmp_path / "several.npy", several_labels())
    right = train_on_several(None, tmp_path / "several.npy")
    for losses in ranks.run(3, train_on_several, tmp_path / "several.npy"):
        assert losses == pytest.approx(right, rel=1e-4)


def test_several_labels_of_files(tmp_path):
    several = np.array([[1, 2], [3, -1], [-1, -1]], ">i2")
    path = tmp_path / "l.npy"
    np.save(path, several)
    assert read_positives("labels", path, 3).tolist() == several.tolist()
    assert read_positives("labels", path, 3, 1).tolist() == [1, 3, -1]
    np.save(path, several[:, :1])
    assert read_positives("labels", path, 3).tolist() == [1, 3, -1]
    np.save(tmp_path / "labels_0.npy", several[:, 0])
    assert read_positives("labels", tmp_path, 3).tolist() == [1, 3, -1]
    np.save(tmp_path / "positives_0.npy", several)
    assert read_positives("labels", tmp_path, 3).tolist() == several.tolist()
    assert read_labels("labels", tmp_path, 3).tolist() == [1, 3, -1]  # of `evaluate`


@pytest.mark.parametrize(
    ("arrays", "most", "message"),
    [
        ([np.zeros((3, 2, 2), int)], 0, "0.npy: holds int64 [3, 2, 2], must be integers [n], one "
         "for each row, or [n, P], at least one for each row"),
        ([np.zeros((3, 0), int)], 0, "0.npy: holds int64 [3, 0], must be integers [n], one"),
        ([np.zeros((3, 2))], 0, "0.npy: holds float64 [3, 2], must be integers"),
        ([np.full((3, 2), -1)], 0, ": holds negative labels only, must be not all negative"),
        ([np.zeros((2, 2), int)], 0, ": holds 2 labels, must be 3, one for each row"),
        ([np.zeros((2, 2), int), np.zeros((1, 3), int)], 0,
         "1.npy: holds integers [1, 3], and {}/positives_0.npy [2, 2]; must be as many"),
        ([np.zeros((3, 2), int)], 4, "positives: got 4, but {} has 2 labels for each row"),
        ([np.array([[0, 1], [2, 2**63], [3, 4]], np.uint64)], 0,
         "0.npy: row 1 has the label 9223372036854775808, must be below 2^63"),
    ],
)  # fmt: skip
def test_bad_several_labels(tmp_path, arrays, most, message):
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"positives_{number}.npy", array)
    with pytest.raises(SourceError) as caught:
        read_positives("labels", tmp_path, 3, most)
    assert message.format(tmp_path) in str(caught.value)


def test_several_labels_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="positives: got 2, but no labels, which have several"):
        replace(TINY, positives=2)
    np.save(tmp_path / "l.npy", np.zeros(len(TRAIN), int))
    for settings in ({}, {"labels": str(tmp_path / "l.npy")}):
        config = replace(TINY, multi_label="separate", **settings)
        with pytest.raises(ConfigError) as caught:
            run(tmp_path / "run", config=config)
        assert str(caught.value) == (
            "multi_label: got 'separate', but the images have one label each"
        )
    assert not (tmp_path / "run").exists()


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


@pytest.mark.slow
def test_features_then_clusters(tmp_path, monkeypatch):
    """The two commands as a user gives them."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    captions = [TRAIN.class_name(i) for i in range(len(TRAIN))]
    pictures = ArrayPictures(TRAIN.pictures.images, captions=captions)
    images = replace(TRAIN, pictures=pictures)
    monkeypatch.setattr("unicom_ext.data.images.opening.open_part", lambda *arguments: images)
    monkeypatch.setattr("unicom_ext.encoders.extract.SHARD_ROWS", 30)

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
    assert facts["images"] == images.facts()
    assert len(facts["source"]["shards"]) > 1
    assert facts["quality"]["nmi"] > 0.3
    assert (output / "members.png").exists()
