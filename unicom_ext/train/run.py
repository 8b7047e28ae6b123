"""A training from its settings to its report: data, trainer, evaluation, checkpoints.

On several ranks each takes its part of every batch and its share of the classes and of the
evaluation; rank 0 writes. A checkpoint does not tell how many ranks there were, so a run can go on
at another number of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from unicom_ext import checkpoint
from unicom_ext.data import glyphs
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.labels import read_positives
from unicom_ext.distributed.failures import agree
from unicom_ext.train import checkpoints, report
from unicom_ext.train.config import Config
from unicom_ext.train.evaluation import evaluate, evaluate_baselines
from unicom_ext.train.interrupt import Interrupted, StopRequest
from unicom_ext.train.progress import TrainingProgress
from unicom_ext.train.trainer import EXAMPLES, Trainer, random_numbers
from unicom_ext.utils.files import CheckpointError, write_atomically
from unicom_ext.utils.settings import ConfigError
from unicom_ext.utils.versions import versions


def train(
    config: Config,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: tuple[Glyphs, Glyphs] | None = None,
    console: Console | None = None,
    on_step: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Train, evaluate, and write config.toml, checkpoints, metrics.json and report.html.

    output     directory for the files, made if need be
    resume     go on from the checkpoint there, which must be of the same config and data
    overwrite  begin anew although there is one
    data       (training classes, test classes); None: the bundled glyphs, split by the config
    on_step    called after each step with the number of steps done
    group      the ranks that train together and all call this; the first one writes

    Returns what metrics.json holds. The last model counts: nothing is chosen by looking at the test
    classes. Raises CheckpointError if the output directory does not fit `resume`, and Interrupted
    after SIGINT or SIGTERM, when everything needed to resume has been saved.
    """
    output = Path(output)
    first = group is None or dist.get_rank(group) == 0
    console = (console or Console()) if first else Console(quiet=True)
    began = time.perf_counter()
    saved, failure = None, None
    try:
        saved = checkpoints.to_resume(output, config, resume, overwrite)
        if data is None:
            data = glyphs.split(glyphs.load(), config.seed, config.test_fraction)
        train_set, test_set = data
        if config.labels:
            labels = read_positives("labels", config.labels, len(train_set), config.positives)
            train_set = glyphs.relabelled(train_set, labels)
        if config.multi_label != "average" and train_set.labels.ndim == 1:
            raise ConfigError(
                f"multi_label: got {config.multi_label!r}, but the images have one label each"
            )
    except Exception as error:
        failure = error
    agree({"the checkpoint": str(saved)}, failure, group)
    if config.threads:
        torch.set_num_threads(config.threads)
    facts = _facts(train_set, test_set)
    several = train_set.labels[0].size
    console.print(
        f"Training on {facts['train_images']:,} images of {facts['train_classes']:,} characters, "
        + (f"up to {several} of them each, " if several > 1 else "")
        + f"testing on {facts['test_images']:,} images of {facts['test_classes']:,} others."
    )
    trainer = Trainer(config, train_set, group)
    metrics: dict[str, Any] = {
        "config": config.to_dict(),
        "data": facts,
        "versions": versions(),
        "step": 0,
        "steps": trainer.steps,
        "loss": trainer.losses,
        "baselines": {},
        "evaluations": [],
        "seconds": {"data": time.perf_counter() - began, "baselines": 0.0, "training": 0.0,
                    "evaluation": 0.0},
    }  # fmt: skip

    failure = None
    if saved is None and first:
        try:
            output.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            # They may refuse the settings, so before anything is removed.
            metrics["baselines"] = evaluate_baselines(config, train_set, test_set, console)
            metrics["seconds"]["baselines"] = time.perf_counter() - began
            checkpoints.remove_earlier(output)
            write_atomically(
                output / checkpoints.CONFIG, lambda file: file.write(config.to_toml().encode())
            )
        except Exception as error:
            failure = error
    agree({}, failure, group)  # the others wait here for the first
    if saved is not None:
        there = checkpoint.read_about(saved)["extra"]["data"]
        if there != facts:
            raise CheckpointError(
                f"{saved}: the checkpoint is of other data: {there} there, {facts} here"
            )
        metrics.update(trainer.load(saved)["metrics"], loss=trainer.losses)
        console.print(f"Resuming after step {trainer.step} of {trainer.steps}.")

    _run(trainer, metrics, test_set, output, console, on_step)
    embeddings = trainer.embed(test_set.images)
    if first:
        report.write(
            output, metrics, test_set, embeddings, random_numbers(config.seed, EXAMPLES, 0)
        )
    return metrics


def _run(
    trainer: Trainer,
    metrics: dict[str, Any],
    test_set: Glyphs,
    output: Path,
    console: Console,
    on_step: Callable[[int], object] | None,
) -> None:
    """Train up to the last step, with evaluations and checkpoints on the way."""
    config, seconds = trainer.config, metrics["seconds"]
    every = config.evaluate_every * trainer.steps_per_epoch
    start, trained = trainer.step, 0.0
    with TrainingProgress(console, start, trainer.steps) as progress, StopRequest() as stop:
        while trainer.step < trainer.steps:
            began = time.perf_counter()
            loss = trainer.step_once()
            took = time.perf_counter() - began
            trained += took
            seconds["training"] += took
            images = trainer.images_before(trainer.step) - trainer.images_before(start)
            progress.advance(trainer.step, loss, images, trained)
            if on_step is not None:
                on_step(trainer.step)

            last = trainer.step == trainer.steps
            if last or (every and trainer.step % every == 0):
                began = time.perf_counter()
                # On the way the longest embedding is enough.
                dims = config.dims if last else config.dims[-1:]
                embeddings = trainer.embed(test_set.images)
                results = evaluate(embeddings, test_set, dims, trainer.group)
                metrics["evaluations"].append(
                    {
                        "step": trainer.step,
                        "epoch": trainer.step / trainer.steps_per_epoch,
                        "results": results,
                    }
                )
                seconds["evaluation"] += time.perf_counter() - began
                console.print(
                    f"epoch {trainer.step / trainer.steps_per_epoch:g}: Recall@1 "
                    f"{results[-1]['recall']['1']:.3f} on the test characters "
                    f"({results[-1]['dim']} dimensions)"
                )
            stopping = trainer.any_rank(stop.requested)
            if last or stopping or trainer.step % config.checkpoint_every == 0:
                path = checkpoints.save(output, trainer, metrics)
            if stopping and not last:
                raise Interrupted(trainer.step, trainer.steps, path)


def _facts(train_set: Glyphs, test_set: Glyphs) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in (train_set, test_set):
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(np.ascontiguousarray(part.labels).data)
    return {
        "train_images": len(train_set),
        "train_classes": train_set.num_classes,
        "test_images": len(test_set),
        "test_classes": test_set.num_classes,
        "sha256": digest.hexdigest(),
    }
