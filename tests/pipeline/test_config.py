"""Settings of a pipeline: tables, what they hand on, and messages."""

from __future__ import annotations

import importlib.resources
import tomllib

import pytest
from support.images import exactly

from unicom_ext.pipeline.config import PipelineConfig
from unicom_ext.utils.settings import ConfigError

made = PipelineConfig.from_mapping


def test_settings_of_all_steps():
    config = made(
        {
            "data": {"data": "pictures", "seed": 7, "test_fraction": 0.25},
            "extract": {"encoder": "pixels"},
            "train": {"epochs": 3, "m2": 0.2, "multi_label": "separate", "dims": [8, 16]},
            "finetune": {"epochs": 2},
        }
    )
    for step in (config.extract, config.train, config.finetune):
        assert (step.data, step.seed, step.test_fraction) == ("pictures", 7, 0.25)
    assert config.extract.part == "train"
    assert (config.train.epochs, config.finetune.epochs) == (3, 2)
    assert config.finetune.m2 == 0.2
    # What belongs to clusters, or was computed before, is not handed on.
    assert (config.train.multi_label, config.finetune.multi_label) == ("separate", "average")
    assert (config.train.baselines, config.finetune.baselines) == (("auto",), ())
    assert config.cluster(100, captions=False).seed == 7
    assert config.dims == (8, 16)
    assert made({"evaluate": {"dims": [4]}}).dims == (4,)
    assert made({}).finetune is None
    assert made(tomllib.loads(config.to_toml())) == config
    assert tomllib.loads(config.to_toml()) == config.tables


@pytest.mark.parametrize(
    ("given", "images", "captions", "clusters", "joint"),
    [
        ({}, 1000, True, 50, "concat"),
        ({"clusters": 0}, 1000, False, 50, "image"),
        ({}, 30, False, 2, "image"),
        ({"clusters": 7, "joint": "text"}, 1000, True, 7, "text"),
    ],
)
def test_what_the_clustering_leaves_open(given, images, captions, clusters, joint):
    found = made({"cluster": given}).cluster(images, captions)
    assert (found.clusters, found.joint) == (clusters, joint)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"clusters": {}},
         "clusters: no such table; did you mean cluster? There are data, extract, cluster, train, "
         "finetune, evaluate"),
        ({"train": 3}, "train: got 3, must be a table of settings"),
        ({"evaluate": {"dim": [3]}},
         "evaluate.dim: no such setting; did you mean dims? There are dims"),
        ({"train": {"epochs": 0}}, "train.epochs: got 0, must be a whole number >= 1"),
        ({"data": {"seed": -1}}, "data.seed: got -1, must be 0 .. 2^32 - 1"),
        ({"cluster": {"passes": "2"}}, "cluster.passes: got '2', must be a whole number >= 1"),
        ({"cluster": {"clusters": 3, "positives": 4}},
         "cluster.positives: got 4, must be from 1 to clusters = 3"),
        ({"cluster": {"seed": 1}}, "cluster.seed: is a setting of [data], for all steps"),
        ({"train": {"data": "x"}}, "train.data: is a setting of [data], for all steps"),
        ({"extract": {"part": "query"}},
         "extract.part: cannot be set: features are of the images that are trained on"),
        ({"train": {"labels": "x"}}, "train.labels: cannot be set: they are the clusters"),
        ({"finetune": {"encoder": "small"}},
         "finetune.encoder: cannot be set: it is the encoder of [train]"),
        ({"finetune": {"positives": 2}},
         "finetune.positives: cannot be set: labels are the true classes"),
        ({"finetune": {"epochs": 0}}, "finetune.epochs: got 0, must be a whole number >= 1"),
        ({"evaluate": {"dims": [8, 4]}},
         "evaluate.dims: got [8, 4], must be increasing whole numbers from 1 to "
         "train.embedding_size"),
        ({"evaluate": {"dims": [256]}},
         "evaluate.dims: got [256], must not go beyond train.embedding_size, which is 128"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(tables, message):
    with pytest.raises(ConfigError, match=exactly(message)):
        made(tables)


def test_the_bundled_settings():
    file = importlib.resources.files("unicom_ext.pipeline") / "glyphs.toml"
    config = made(tomllib.loads(file.read_text()))
    assert config.data.data == "glyphs"
    assert config.finetune is not None
    assert config.cluster(14_000, captions=True).clusters == 1500
