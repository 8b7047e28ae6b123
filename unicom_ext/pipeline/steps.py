"""The steps of a pipeline. Each writes what the single command writes, to a directory of its own.

A step can be killed at any moment and called again: it goes on, as the single command does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from unicom_ext import checkpoint, report
from unicom_ext.cluster import driver as clustering
from unicom_ext.cluster import outputs
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts
from unicom_ext.data.images.settings import DataSettings
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.encoders import dump, registry
from unicom_ext.encoders import extract as extraction
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.pipeline.config import PipelineConfig, SharedSettings
from unicom_ext.pipeline.page import page
from unicom_ext.pipeline.record import key_of
from unicom_ext.retrieval.files import evaluate_files
from unicom_ext.train import checkpoints, run
from unicom_ext.train.config import Config
from unicom_ext.train.evaluation import RECALL_AT, RESAMPLES
from unicom_ext.train.images import check_parts
from unicom_ext.utils.files import write_file
from unicom_ext.utils.settings import ConfigError, Settings

FIGURES = "figures.json"
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a pipeline works, and on what.

    config  all settings
    parts   the images
    output  the directory, absolute, so that names in settings of steps are of any working directory
    """

    config: PipelineConfig
    parts: Parts
    output: Path

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the images of each part."""
        found = {}
        for part in dataclasses.fields(Parts):
            images: ImageSet | None = getattr(self.parts, part.name)
            if images is not None:
                digest = hashlib.sha256()
                images.digest(digest)
                found[part.name] = digest.hexdigest()
        return found

    @property
    def captions(self) -> bool:
        """Whether there are features of captions."""
        text = self.config.extract.text_encoder
        return self.parts.train.pictures.has_captions and text != "none"

    @property
    def labelled(self) -> bool:
        """Whether there are true classes to train on."""
        return bool((self.parts.train.labels >= 0).any())


class Step:
    """One step.

    Args:
        place: where, and on what.
        inputs: the keys of the steps before it, by name.

    Raises ConfigError where images and settings do not go together.
    """

    name: ClassVar[str]
    directory: ClassVar[str]
    result: ClassVar[str]  # the file that is written last
    kind: ClassVar[type[Settings]] = Settings  # of its settings
    version: ClassVar[int] = 1  # raise it where the same settings make something else

    def __init__(self, place: Place, inputs: Mapping[str, str]) -> None:
        self.place, self.config = place, place.config
        self.before = [step for step in STEPS if step.name in inputs]
        self.output = place.output / self.directory
        self.key = key_of(self.name, self.version, self.settings(), {**self.data(), **inputs})

    def settings(self) -> dict[str, Any]:
        """Those that decide the result."""
        raise NotImplementedError

    def data(self) -> dict[str, str]:
        """Digests of what decides it of the images."""
        return {}

    def purpose(self) -> str:
        """What it does, for the user."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError where it could not run, as far as that is known before the first."""

    def clear(self) -> None:
        """Remove what it would go on from, and that other settings have left."""

    def run(self, console: Console, ranks: Ranks) -> None:
        """All ranks call it. Raises what the command raises."""
        raise NotImplementedError


class Extract(Step):
    name, directory, result = "extract", "features", dump.FACTS
    kind = ExtractConfig

    def settings(self) -> dict[str, Any]:
        return _without(self.config.extract, dump.FREE_TO_CHANGE)

    def data(self) -> dict[str, str]:
        found = {"train": self.place.digests["train"]}
        if self.place.captions:
            found["captions"] = self.place.parts.train.digest_of_captions()
        return found

    def purpose(self) -> str:
        config, images = self.config.extract, self.place.parts.train
        text = f", and of their captions by {config.text_encoder}" if self.place.captions else ""
        return f"features of {len(images):,} images by {config.encoder}{text}"

    def clear(self) -> None:
        shutil.rmtree(self.output / dump.NEW, ignore_errors=True)

    def run(self, console: Console, ranks: Ranks) -> None:
        facts = extraction.extract(
            self.config.extract, self.place.parts.train, self.output, overwrite=True,
            console=console, group=ranks.group,
        )  # fmt: skip
        if facts["unreadable"]:
            console.print(
                f"{facts['unreadable']:,} images could not be read: they are in no cluster, and "
                f"{self.output / 'metadata'} says why.",
                soft_wrap=True,
                markup=False,
            )


class Cluster(Step):
    name, directory, result = "cluster", "clusters", outputs.CLUSTERS
    kind = ClusterConfig

    def __init__(self, place: Place, inputs: Mapping[str, str]) -> None:
        images = place.parts.train
        self.clustering = place.config.cluster(len(images), place.captions)
        if self.clustering.joint != "image" and not place.captions:
            raise ConfigError(
                f"joint: got {self.clustering.joint!r}, but there are no features of "
                "captions, must be image"
            )
        if self.clustering.clusters > len(images):
            raise ConfigError(
                f"clusters: got {self.clustering.clusters}, but there are {len(images)} "
                "images to train on"
            )
        super().__init__(place, inputs)

    def settings(self) -> dict[str, Any]:
        return _without(self.clustering, ("device", "threads"))

    def purpose(self) -> str:
        return f"{self.clustering.clusters:,} clusters by their {self.clustering.joint} features"

    def clear(self) -> None:
        (self.output / outputs.STATE / outputs.STATE_FILE).unlink(missing_ok=True)

    def run(self, console: Console, ranks: Ranks) -> None:
        features = self.place.output / Extract.directory
        labels, images = features / dump.LABELS, features / dump.THUMBNAILS
        resume = ranks.of_first((self.output / outputs.STATE / outputs.STATE_FILE).exists())
        found = clustering.cluster(
            self.clustering,
            features,
            self.output,
            true_labels=labels if self.place.labelled else None,
            images=images if self.config.extract.thumbnails else None,
            resume=resume,
            overwrite=not resume,
            console=console,
        )
        rows = found["rows"]
        if left := sum(rows.values()) - rows["clustered"]:
            console.print(
                f"{left:,} images are in no cluster, and not trained on: {rows['zero']:,} without "
                f"features, {rows['dissolved']:,} in clusters that were dissolved."
            )


class _Training(Step):
    result, kind = checkpoints.METRICS, Config
    classes: ClassVar[str]  # that are trained on

    def __init__(self, place: Place, inputs: Mapping[str, str]) -> None:
        super().__init__(place, inputs)
        check_parts(self.training(), place.parts)

    def training(self) -> Config:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        # What the others of a pipeline make is known by their keys.
        made = ("labels", "weights") if self.name == "finetune" else ("labels",)
        return _without(self.training(), (*checkpoints.FREE_TO_CHANGE, *made))

    def data(self) -> dict[str, str]:
        return self.place.digests

    def clear(self) -> None:
        checkpoints.remove_earlier(self.output)

    def run(self, console: Console, ranks: Ranks) -> None:
        there = checkpoint.latest(self.output / checkpoints.CHECKPOINTS) is not None
        resume = ranks.of_first(there)
        run.train(
            self.training(), self.output, data=self.place.parts, console=console, resume=resume,
            overwrite=not resume, group=ranks.group,
        )  # fmt: skip


class Train(_Training):
    name, directory = "train", "pretrained"
    classes = "pseudo-classes"

    def training(self) -> Config:
        labels = self.place.output / Cluster.directory
        return dataclasses.replace(self.config.train, labels=str(labels))

    def check(self) -> None:
        with torch.random.fork_rng(devices=[]):
            registry.create(self.config.train, self.config.train.embedding_size)

    def purpose(self) -> str:
        return f"{self.config.train.encoder} on the clusters, for {self.config.train.epochs} epochs"


class Finetune(_Training):
    name, directory = "finetune", "finetuned"
    classes = "true classes"

    def training(self) -> Config:
        assert self.config.finetune is not None
        weights = self.place.output / Train.directory / checkpoints.CHECKPOINTS
        return dataclasses.replace(self.config.finetune, weights=str(weights))

    def purpose(self) -> str:
        return f"the same encoder on true classes, for {self.training().epochs} epochs"


class Evaluate(Step):
    """Features of the test images by each encoder, and how well they are retrieved by these."""

    name, directory, result = "evaluate", "evaluation", FIGURES

    def settings(self) -> dict[str, Any]:
        return {"dims": list(self.config.dims)}

    def data(self) -> dict[str, str]:
        return self.place.digests

    def purpose(self) -> str:
        parts = self.place.parts
        assert parts.query is not None
        among = "each other" if parts.gallery is None else f"{len(parts.gallery):,}"
        return f"{len(parts.query):,} images of unseen classes are searched among {among}"

    def clear(self) -> None:
        for directory in self.output.glob(f"*/*/{dump.NEW}"):
            shutil.rmtree(directory)

    def run(self, console: Console, ranks: Ranks) -> None:
        trained = [step for step in self.before if issubclass(step, _Training)]
        for step in trained:
            self._extract(step, console, ranks)
        with ranks.together():
            if ranks.is_first:
                self._evaluate(trained)

    def _extract(self, step: type[_Training], console: Console, ranks: Ranks) -> None:
        for part in ("query", "gallery"):
            images = getattr(self.place.parts, part)
            if images is not None:
                extraction.extract(
                    self._extraction(step, part), images, self._features(step, part),
                    overwrite=True, console=console, group=ranks.group,
                )  # fmt: skip

    def _features(self, step: type[_Training], part: str) -> Path:
        return self.output / step.directory / part

    def _evaluate(self, trained: list[type[_Training]]) -> None:
        figures = {step.directory: self._evaluated(step) for step in trained}
        baselines: dict[str, Any] = {}
        for step in trained:
            metrics = json.loads((self.place.output / step.directory / step.result).read_text())
            for name, results in metrics["baselines"].items():
                # What has learned classes has learned those of the training.
                learned = f" on {step.classes}" if "LDA" in name else ""
                baselines.setdefault(name + learned, results)
        text = json.dumps({"baselines": baselines, **figures}, indent=1)
        write_file(self.output / FIGURES, lambda file: file.write(text.encode()))

    def _evaluated(self, step: type[_Training]) -> list[dict[str, Any]]:
        parts, query = self.place.parts, self._features(step, "query")
        gallery = None if parts.gallery is None else self._features(step, "gallery")
        assert parts.query is not None
        results = evaluate_files(
            query, query / dump.LABELS,
            gallery, None if gallery is None else gallery / dump.LABELS,
            options={
                "dims": self.config.dims,
                "ks": RECALL_AT,
                "bootstrap": RESAMPLES * (parts.query.num_classes > 1),
            },
        )  # fmt: skip
        return [result._asdict() for result in results]

    def _extraction(self, step: type[_Training], part: str) -> ExtractConfig:
        train = self.config.train
        return ExtractConfig(
            **self.config.data.to_dict(),
            part=part,
            encoder=train.encoder,
            image_size=train.image_size,
            width=train.width,
            weights=str(self.place.output / step.directory / checkpoints.CHECKPOINTS),
            text_encoder="none",
            thumbnails=0,
            device=train.device,
            workers=train.workers,
        )


class Report(Step):
    name, directory, result = "report", ".", REPORT

    def settings(self) -> dict[str, Any]:
        return {}

    def data(self) -> dict[str, str]:
        """Names of classes too: the page has them, and nothing before it depends on them."""
        parts = (getattr(self.place.parts, part.name) for part in dataclasses.fields(Parts))
        names = json.dumps([None if images is None else [*images.class_names] for images in parts])
        return {"classes": hashlib.sha256(names.encode()).hexdigest()}

    def purpose(self) -> str:
        return "one page of what was found"

    def run(self, console: Console, ranks: Ranks) -> None:
        with ranks.together():
            if ranks.is_first:
                self._write()

    def _write(self) -> None:
        *_, last = (step for step in self.before if issubclass(step, _Training))
        output, evaluation = self.place.output, self.place.output / Evaluate.directory
        shown = page(
            json.loads((output / last.directory / last.result).read_text()),
            json.loads((evaluation / FIGURES).read_text()),
            self.place.parts,
            output / Cluster.directory,
            evaluation / last.directory,
        )
        report.write(self.output / REPORT, shown)


STEPS: tuple[type[Step], ...] = (Extract, Cluster, Train, Finetune, Evaluate, Report)
NAMES = tuple(step.name for step in STEPS)


def left_out(place: Place) -> dict[str, str]:
    """The steps that this pipeline does not have, and why."""
    reasons = {}
    if place.config.finetune is None:
        reasons[Finetune.name] = "there is no table [finetune]"
    elif not place.labelled:
        reasons[Finetune.name] = "the images to train on have no classes"
    if place.parts.query is None:
        reasons[Evaluate.name] = "there are no images of classes that are not trained on"
        reasons[Report.name] = "nothing is evaluated"
    return reasons


def planned(place: Place) -> list[Step]:
    """The steps of this pipeline in their order.

    Raises ConfigError, with the name of the table, where images and settings do not go together.
    """
    without, steps = left_out(place), list[Step]()
    for kind in STEPS:
        if kind.name not in without:
            with names_its_table(kind):
                steps.append(kind(place, {step.name: step.key for step in steps}))
    return steps


@contextmanager
def names_its_table(kind: type[Step]) -> Iterator[None]:
    """A ConfigError on a setting of the step has the name of its table in front."""
    try:
        yield
    except ConfigError as error:
        name = str(error).partition(":")[0]
        if name not in [f.name for f in dataclasses.fields(kind.kind)]:
            raise
        shared = name in [f.name for f in dataclasses.fields(SharedSettings)]
        raise ConfigError(f"{'data' if shared else kind.name}.{error}") from error


def _without(settings: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    """The settings by name, but for these, and for those of where images lie: the digests of the
    images say which they are."""
    left = (*names, *(f.name for f in dataclasses.fields(DataSettings)))
    return {name: v for name, v in settings.to_dict().items() if name not in left}
