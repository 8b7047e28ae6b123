"""A training from its settings to its report: data, trainer, evaluation, checkpoints.

On several ranks each takes its part of every batch and its share of the classes and of the
evaluation; rank 0 writes. A checkpoint does not tell how many ranks there were, so a run can go on
at another number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from unicom_ext import checkpoint
from unicom_ext.data.images.batches import killed_workers_named
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.opening import Parts
from unicom_ext.distributed.failures import agree
from unicom_ext.encoders.contents import contents
from unicom_ext.train import checkpoints, curves, report
from unicom_ext.train.config import Config
from unicom_ext.train.curves import Curves
from unicom_ext.train.evaluation import RESAMPLES, evaluate, evaluate_baselines
from unicom_ext.train.images import facts_of, has_relevant, labelled, opened
from unicom_ext.train.interrupt import Interrupted, StopRequest
from unicom_ext.train.progress import TrainingProgress
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.devices import device_of
from unicom_ext.utils.files import (
    CheckpointError,
    natural_name_key,
    only_writer,
    write_atomically,
)
from unicom_ext.utils.settings import ConfigError
from unicom_ext.utils.versions import cpu_model, versions


@killed_workers_named()
def train(
    config: Config,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: Parts | None = None,
    console: Console | None = None,
    on_step: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Train, evaluate, and write config.toml, checkpoints, metrics.json and report.html.

    output     directory for the files, made if need be
    resume     go on from the checkpoint there, which must be of the same config and data
    overwrite  begin anew although there is one
    data       the images; None: those that the config names
    on_step    called after each step with the number of steps done
    group      the ranks that train together and all call this; the first one writes

    Returns what metrics.json holds. Nothing is chosen by looking at the test classes: the last
    model counts, or with `patience` the best one on the validation classes. Raises CheckpointError
    if the output directory does not fit `resume`, OSError if another process writes to it,
    ChildProcessError if a process that reads images was killed, and Interrupted after SIGINT or
    SIGTERM, when everything needed to resume has been saved.
    """
    output = Path(output)
    first = group is None or dist.get_rank(group) == 0
    console = (console or Console()) if first else Console(quiet=True)
    began = time.perf_counter()
    saved, facts, failure = None, {}, None
    try:
        device_of(config.device)
        saved = checkpoints.to_resume(output, config, resume, overwrite)
        if config.tensorboard:
            curves.check_installed()
        given = opened(config, config.seed) if data is None else data
        parts = labelled(config, given)
        facts = facts_of(parts)
    except Exception as error:
        failure = error
    agree({"the checkpoint": str(saved), "the data": facts}, failure, group)
    if config.threads:
        torch.set_num_threads(config.threads)
    _announce(config, facts, parts, console)
    trainer = Trainer(config, parts.train, group)
    metrics: dict[str, Any] = {
        "config": config.to_dict(),
        "data": facts,
        "contents": contents(config.to_dict()),
        "versions": versions(),
        "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads(),
                    "device": _device_name(trainer.device)},
        "step": 0,
        "steps": trainer.steps,
        "loss": trainer.losses,
        "baselines": {},
        "evaluations": [],
        "best": None,
        "stopped_early": False,
        "unreadable": {},
        "seconds": {"data": time.perf_counter() - began, "baselines": 0.0, "training": 0.0,
                    "waiting": 0.0, "evaluation": 0.0},
    }  # fmt: skip

    with ExitStack() as held:  # the output directory, from here on
        failure = None
        if first:
            try:
                held.enter_context(only_writer(output))
                if saved is None:
                    began = time.perf_counter()
                    # They may refuse the settings, so before anything is removed.
                    metrics["baselines"] = evaluate_baselines(config, parts, console)
                    metrics["seconds"]["baselines"] = time.perf_counter() - began
                    checkpoints.remove_earlier(output)
                    text = config.to_toml().encode()
                    write_atomically(output / checkpoints.CONFIG, lambda file: file.write(text))
            except Exception as error:
                failure = error
        agree({}, failure, group)  # the others wait here for the first
        if saved is not None:
            there = checkpoint.read_about(saved)["extra"]["data"]
            if there != facts:
                raise CheckpointError(
                    f"{saved}: the checkpoint is of other data: {there} there, {facts} here"
                )
            earlier = trainer.load(saved)["metrics"]
            seconds = {**metrics["seconds"], **earlier.pop("seconds")}
            metrics.update(earlier, loss=trainer.losses, seconds=seconds)
            console.print(f"Resuming after step {trainer.step} of {trainer.steps}.")
            if first:  # it may have been killed as soon as its checkpoint was whole
                checkpoints.write_beside(output, saved, metrics)

        run = _Run(trainer, metrics, parts, output, console)
        run.to_the_end(on_step)
        if metrics["unreadable"]:
            console.print(
                f"{len(metrics['unreadable']):,} of {len(parts.train):,} images could not be read; "
                f"{output / checkpoints.UNREADABLE} says why.",
                soft_wrap=True,
            )
        query, gallery = run.tested()
        if first:
            clusters = report.clusters(config, given.train)
            report.write(output, metrics, parts.train, query, gallery, clusters)
        return metrics


def _announce(config: Config, facts: dict[str, Any], parts: Parts, console: Console) -> None:
    several = parts.train.labels[0].size
    noun = config.noun
    console.print(
        f"Training on {facts['train_images']:,} images of {facts['train_classes']:,} {noun}, "
        + (f"up to {several} of them each, " if several > 1 else "")
        + (
            f"testing on {facts['test_images']:,} images of {facts['test_classes']:,} others."
            if parts.query is not None
            else "without a test."
        )
    )


_Tested = tuple[Embedded | None, Embedded | None]  # queries, and a gallery of their own


class _Run:
    """What `to_the_end` works on."""

    def __init__(
        self,
        trainer: Trainer,
        metrics: dict[str, Any],
        parts: Parts,
        output: Path,
        console: Console,
    ) -> None:
        self.trainer, self.metrics, self.parts = trainer, metrics, parts
        self.output, self.console = output, console
        self.first = trainer.rank == 0
        self._tested: _Tested | None = None

    def to_the_end(self, on_step: Callable[[int], object] | None) -> None:
        """Train up to the last step, with evaluations and checkpoints on the way."""
        trainer, config, metrics = self.trainer, self.trainer.config, self.metrics
        seconds, batches = metrics["seconds"], trainer.batches
        every = config.evaluate_every * trainer.steps_per_epoch
        start, trained = trainer.step, 0.0
        events = self.output / "tensorboard" if config.tensorboard and self.first else None
        with (
            TrainingProgress(self.console, start, trainer.steps) as progress,
            StopRequest() as stop,
            Curves(events, start) as drawn,
        ):
            while trainer.step < trainer.steps and not metrics["stopped_early"]:
                began, waited = time.perf_counter(), trainer.seconds_waited
                loss = trainer.step_once()
                took, waited = time.perf_counter() - began, trainer.seconds_waited - waited
                trained += took
                seconds["training"] += took
                seconds["waiting"] += waited
                images = batches.images_before(trainer.step) - batches.images_before(start)
                progress.advance(
                    trainer.step, loss, images, trained, trainer.seconds_waited / trained
                )
                drawn.add("loss", loss, trainer.step)
                drawn.add("images per second", images / trained, trainer.step)
                drawn.add("learning rate", trainer.optimizer.param_groups[0]["lr"], trainer.step)
                if on_step is not None:
                    on_step(trainer.step)

                if trainer.step == trainer.steps_per_epoch:
                    self._check_readable()
                last = trainer.step == trainer.steps
                began = time.perf_counter()
                if last or (every and trainer.step % every == 0):
                    last = self._evaluate_on_the_way(last) or last
                    for result in metrics["evaluations"][-1:]:
                        recall = result["results"][-1]["recall"]["1"]
                        drawn.add(f"Recall@1/{result['part']}", recall, trainer.step)
                seconds["evaluation"] += time.perf_counter() - began
                stopping = trainer.any_rank(stop.requested)
                if last or stopping or trainer.step % config.checkpoint_every == 0:
                    path = self._save()
                if stopping and not last:
                    raise Interrupted(trainer.step, trainer.steps, path)

    def tested(self) -> _Tested:
        """The test images by the final encoder."""
        if self._tested is None:
            self._tested = self._embedded()
        return self._tested

    def _embedded(self) -> _Tested:
        """The test images by the encoder as it is; None where there is nothing to find among those
        that can be read, which is no reason to lose the encoder."""
        if self.parts.query is None:
            return None, None
        query = self.trainer.embed(self.parts.query)
        gallery = None if self.parts.gallery is None else self.trainer.embed(self.parts.gallery)
        if not has_relevant(query.images, None if gallery is None else gallery.images):
            self.console.print(self._nothing_to_find("test", query), soft_wrap=True, markup=False)
            return None, None
        return query, gallery

    def _nothing_to_find(self, part: str, found: Embedded) -> str:
        return (
            f"data: {len(found.images):,} {part} images of {self.trainer.config.data} can be read, "
            "and none of them has another one of its class to be found"
        )

    def _check_readable(self) -> None:
        """ConfigError where an epoch was spent on nothing."""
        found, count = self._unreadable(), len(self.parts.train)
        if len(found) == count:
            raise ConfigError(
                f"data: none of the {count:,} images to train on of {self.trainer.config.data} can "
                f"be read: {next(iter(found.values()))}"
            )

    def _evaluate_on_the_way(self, last: bool) -> bool:
        """Evaluate; returns whether training ends here because it does not get better.

        Before the end on the longest embedding, and on the validation classes where there are some.
        """
        trainer, config = self.trainer, self.trainer.config
        if self.parts.validation is not None:
            found = trainer.embed(self.parts.validation)
            if not has_relevant(found.images, None):
                raise ConfigError(self._nothing_to_find("validation", found))
            recall = self._note("validation", found, None, config.dims[-1:])
            if config.patience:
                last = self._compare(recall) or last
        elif not last:
            self._note_test(self._embedded(), config.dims[-1:])
        if last:
            if config.patience:
                agree({}, None, trainer.group)  # the first has written it
                trainer.load_encoder(checkpoints.read_best(self.output))
            self._note_test(self.tested(), config.dims, bootstrap=RESAMPLES)
        return last

    def _note_test(self, tested: _Tested, dims: Sequence[int], bootstrap: int = 0) -> None:
        query, gallery = tested
        if query is not None:
            self._note("test", query, gallery, dims, bootstrap)

    def _note(
        self,
        part: str,
        query: Embedded,
        gallery: Embedded | None,
        dims: Sequence[int],
        bootstrap: int = 0,
    ) -> float:
        """Evaluate and keep the results; returns Recall@1 at the most dimensions."""
        trainer = self.trainer
        results = evaluate(query, gallery, dims, trainer.group, bootstrap=bootstrap)
        epoch = trainer.step / trainer.steps_per_epoch
        self.metrics["evaluations"].append(
            {"step": trainer.step, "epoch": epoch, "part": part, "results": results}
        )
        recall = results[-1]["recall"]["1"]
        self.console.print(
            f"epoch {epoch:g}: Recall@1 {recall:.3f} on the {part} {trainer.config.noun} "
            f"({results[-1]['dim']} dimensions)"
        )
        return recall

    def _compare(self, recall: float) -> bool:
        """Keep the encoder if it is the best so far; returns whether none was for too long."""
        trainer, metrics = self.trainer, self.metrics
        best = metrics["best"]
        if best is None or recall > best["recall"]:
            metrics["best"] = {"step": trainer.step, "recall": recall, "since": 0}
            if self.first:
                checkpoints.write_best(self.output, trainer.evaluated.state_dict())
            return False
        best["since"] += 1
        if best["since"] < trainer.config.patience:
            return False
        metrics["stopped_early"] = True
        self.console.print(
            f"Not better than after step {best['step']} ({best['recall']:.3f}) in {best['since']} "
            "evaluations: training ends here."
        )
        return True

    def _save(self) -> Path:
        trainer, metrics = self.trainer, self.metrics
        metrics["unreadable"] = self._unreadable()
        return checkpoints.save(self.output, trainer, metrics)

    def _unreadable(self) -> dict[str, str]:
        """The training images that could not be read so far, by their names, and why."""
        # Those of before a run was resumed are not known to the trainer.
        found = self.metrics["unreadable"] | self.trainer.all_unreadable()
        return {name: found[name] for name in sorted(found, key=natural_name_key)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
