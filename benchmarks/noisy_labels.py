"""Do several positives and sub-centres help where labels are wrong? Recall@1 on the demo's glyphs.

    python benchmarks/noisy_labels.py --seeds 3

Two questions, with the demo's settings, its split of the characters by seed, and its measure, the
search among characters that were never trained on:

- pseudo-classes, clusters of the images' gradient histograms without a look at labels: the nearest
  cluster of each image as its class, or the four nearest;
- true classes of which some labels are replaced by another class's: one centre of each class, or
  three; and what Sub-center ArcFace makes of the three: samples far from the dominant centre of
  their class are left out, and one centre is trained from the beginning.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measure import describe_machine
from rich.console import Console
from tables import Table

from unicom_ext.cluster import ClusterConfig, cluster
from unicom_ext.data import baselines
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import open_images
from unicom_ext.subcenters import SubCenters
from unicom_ext.train.config import Config
from unicom_ext.train.evaluation import evaluate
from unicom_ext.train.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
CLUSTERS, POSITIVES, NOISE, CENTERS, FEATURES = 1500, 4, 0.2, 3, 128


def trained(config: Config, train_set: ImageSet) -> Trainer:
    trainer = Trainer(config, train_set)
    while trainer.step < trainer.steps:
        trainer.step_once()
    return trainer


def recall(trainer: Trainer, test_set: ImageSet) -> dict[str, float]:
    """Recall@1 by the number of leading dimensions."""
    found = evaluate(trainer.embed(test_set), None, trainer.config.dims)
    return {str(result["dim"]): result["recall"]["1"] for result in found}


def clusters_of(train_set: ImageSet, seed: int) -> np.ndarray:
    """int [n, POSITIVES], the nearest clusters of each image."""
    images = train_set.pictures.images[train_set.rows]  # type: ignore[attr-defined]
    features = baselines.hog(images, train_set.labels, images, FEATURES)
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory) / "features.npy", Path(directory) / "clusters"
        np.save(source, features.numpy())
        config = ClusterConfig(clusters=CLUSTERS, passes=10, positives=POSITIVES, seed=seed)
        cluster(config, source, output, console=Console(quiet=True))
        return np.concatenate([np.load(path) for path in sorted(output.glob("positives_*.npy"))])


def with_noise(train_set: ImageSet, seed: int) -> tuple[ImageSet, np.ndarray]:
    """With a share NOISE of the labels replaced by other classes', and which they are."""
    random = np.random.default_rng(seed)
    wrong = random.random(len(train_set)) < NOISE
    others = random.integers(1, train_set.num_classes, size=len(train_set))
    labels = np.where(wrong, (train_set.labels + others) % train_set.num_classes, train_set.labels)
    return replace(train_set, labels=labels), wrong


def clean_part(trainer: Trainer, train_set: ImageSet) -> np.ndarray:
    """Which training images lie near the dominant centre of their class."""
    embeddings, labels = trainer.embed(train_set).embeddings, torch.from_numpy(train_set.labels)
    centers = SubCenters(trainer.loss)
    centers.add(embeddings, labels)
    return centers.is_clean(embeddings, labels).numpy()


def run(config: Config, data: tuple[ImageSet, ImageSet], console: Console) -> dict[str, Any]:
    """Recall@1 of everything that is compared, by its name."""
    (train_set, test_set), seed = data, config.seed
    found: dict[str, Any] = {}

    def note(name: str, trainer: Trainer) -> None:
        found[name] = recall(trainer, test_set)
        console.print(f"seed {seed}, {name}: {found[name]}")

    several = clusters_of(train_set, seed)
    one = train_set.relabelled(several[:, 0])
    note("clusters, the nearest", trained(config, one))
    relabelled = train_set.relabelled(several)
    for form in ("average", "separate"):
        note(f"clusters, the 4 nearest, {form}",
             trained(replace(config, multi_label=form), relabelled))  # fmt: skip

    note("true labels", trained(config, train_set))
    noisy, wrong = with_noise(train_set, seed)
    note("20 % wrong, 1 centre", trained(config, noisy))
    trainer = trained(replace(config, num_centers=CENTERS), noisy)
    note("20 % wrong, 3 centres", trainer)
    clean = clean_part(trainer, noisy)
    found["cleaning"] = {
        "wrong left out": float((~clean)[wrong].mean()),
        "right left out": float((~clean)[~wrong].mean()),
    }
    labels = np.where(clean, noisy.labels, -1)
    note("20 % wrong, cleaned, 1 centre", trained(config, noisy.relabelled(labels)))
    return found


def table(runs: list[dict[str, Any]]) -> Table:
    dims = list(runs[0]["true labels"])
    rows = []
    for name in runs[0]:
        if name == "cleaning":
            continue
        columns = [[run[name][dim] for run in runs] for dim in dims]
        rows.append([name, *(f"{statistics.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})"
                             for c in columns)])  # fmt: skip
    return Table(f"Recall@1 at so many dimensions, mean of {len(runs)} seeds (least to most)",
                 ["", *dims], rows)  # fmt: skip


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=Config().epochs, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "noisy-labels")
def main(seeds: int, epochs: int, output: Path) -> None:
    console = Console()
    config = replace(Config(), epochs=epochs)
    started = time.perf_counter()
    runs = []
    for seed in range(seeds):
        parts = open_images(config, seed)
        assert parts.query is not None
        runs.append(run(replace(config, seed=seed), (parts.train, parts.query), console))
    shown = table(runs)
    console.print(shown.rich())
    cleaning = {
        name: statistics.mean(run["cleaning"][name] for run in runs) for name in runs[0]["cleaning"]
    }
    words = ", ".join(f"{name}: {100 * value:.1f} %" for name, value in cleaning.items())
    console.print(words)
    result = {"machine": describe_machine(), "epochs": epochs, "runs": runs,
              "seconds": time.perf_counter() - started}  # fmt: skip
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(
        f"# Wrong labels\n\n{shown.markdown()}\nCleaning, {words}\n"
    )


if __name__ == "__main__":
    main()
