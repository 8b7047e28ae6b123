"""The training loop: data, encoder, `PartialMarginSoftmax`, optimizer, schedule, evaluation.

Everything random in a step is a function of (seed, step), and the learning rate one of the step
alone. So a checkpoint is the step and the tensors that training changes, and a run that was
interrupted and resumed is bit for bit the run that was not.

On several ranks each takes its part of every batch and its share of the classes and of the
evaluation; rank 0 writes. A checkpoint does not tell how many ranks there were, so a run can go on
at another number of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import unicom_ext
from unicom_ext import CombinedMargin, PartialMarginSoftmax, checkpoint
from unicom_ext.data import baselines, glyphs
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.labels import read_labels
from unicom_ext.distributed.failures import agree
from unicom_ext.optim import RowAdamW
from unicom_ext.retrieval import Result, evaluate
from unicom_ext.utils.files import CheckpointError, write_atomically
from unicom_ext.utils.settings import ConfigError

from . import report
from .augment import distort
from .config import Config
from .model import Encoder
from .progress import TrainingProgress

RECALL_AT = (1, 5, 10)
CHECKPOINTS = "checkpoints"  # directory in the output directory
# What a random number is for; keeps the streams of one seed apart.
ORDER, DISTORTION, EXAMPLES = range(3)


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself after `step` of `steps` steps."""

    def __init__(self, step: int, steps: int, path: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}; saved in {path}")
        self.step, self.steps, self.path = step, steps, path


class Trainer:
    """The state of a run and what moves it: `step_once`, `save`, `load`."""

    def __init__(
        self, config: Config, train_set: Glyphs, group: dist.ProcessGroup | None = None
    ) -> None:
        self.config = config
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.images = torch.from_numpy(train_set.images)
        self.labels = torch.from_numpy(train_set.labels)
        self.batch_size = min(config.batch_size, len(train_set))
        if self.batch_size < 2 * self.world_size:
            raise ConfigError(
                f"batch_size: got {self.batch_size}, must be at least 2 for each of the "
                f"{self.world_size} ranks"
            )
        # The last batch of an epoch is the rest. A single image, which batch normalisation cannot
        # do with, joins the batch before it.
        full, rest = divmod(len(train_set), self.batch_size)
        self.steps_per_epoch = full + (rest > 1)
        self.steps = config.epochs * self.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = Encoder(config.embedding_size, config.width)
            self.loss = PartialMarginSoftmax(
                config.embedding_size,
                train_set.num_classes,
                margin=CombinedMargin(config.m1, config.m2, config.m3),
                scale=config.scale,
                sample_rate=config.sample_rate,
                feature_rate=config.feature_rate,
                precision=config.precision,
                sparse_grad=config.prototype_update == "rows",
                seed=config.seed,
                process_group=group,
            )
        self.encoder.to(memory_format=torch.channels_last)
        self.model = self.encoder
        if group is not None:
            # Without a search for unused parameters DDP puts gradients into other buckets after
            # its first step: a resumed run would sum them in another order, and differ in bits.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.model = DistributedDataParallel(
                self.encoder, process_group=group, find_unused_parameters=True
            )
        optimizer = RowAdamW if self.loss.sparse_grad else torch.optim.AdamW
        self.optimizer = optimizer(
            [
                {"params": list(self.encoder.parameters()), "weight_decay": config.weight_decay},
                # Only the directions of prototypes count, so shrinking them would do nothing.
                {"params": list(self.loss.parameters()), "weight_decay": 0.0},
            ],
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def step_once(self) -> float:
        """One step of training; returns its loss."""
        images, labels = self._batch(self.step, self.rank, self.world_size)
        self._set_learning_rates(self.step)
        self.encoder.train()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(images)[: len(labels)], labels)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> Tensor:
        """uint8 [n, 32, 32] -> fp32 [n, embedding_size]; each rank embeds a part of them."""
        self.encoder.eval()
        self._share_buffers()
        part = -(-len(images) // self.world_size)
        own = torch.from_numpy(images[self.rank * part : (self.rank + 1) * part])
        blocks = [self.encoder(_as_input(block)) for block in own.split(512) if len(block)]
        embeddings = torch.zeros(part, self.config.embedding_size)
        if blocks:
            embeddings[: len(own)] = torch.cat(blocks)
        if self.group is None:
            return embeddings
        parts = [torch.empty_like(embeddings) for _ in range(self.world_size)]
        dist.all_gather(parts, embeddings, group=self.group)
        return torch.cat(parts)[: len(images)]

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        self._share_buffers()
        checkpoint.save(
            path, **self._parts(), extra={**extra, "step": self.step, "losses": self.losses}
        )

    def load(self, path: Path) -> dict[str, Any]:
        """What `save` was given."""
        extra = checkpoint.load(path, **self._parts())
        self.step, self.losses = extra.pop("step"), extra.pop("losses")
        return extra

    def any_rank(self, condition: bool) -> bool:
        if self.group is None:
            return condition
        flag = torch.tensor(int(condition))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _parts(self) -> dict[str, Any]:
        return {
            "modules": {"encoder": self.encoder, "loss": self.loss},
            "optimizers": {"main": self.optimizer},
            "process_group": self.group,
        }

    def _share_buffers(self) -> None:
        """The running statistics of the first rank count: DDP hands them on before each step."""
        if self.group is not None:
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, group=self.group, group_src=0)

    def _batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Images float [b, 1, 32, 32] and labels int64 [b]: a rank's part of the step's batch.

        A rank without a part has no labels, but two images all the same: its encoder must run for
        the gradients to be exchanged.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            shuffled = _random(self.config.seed, ORDER, epoch).permutation(len(self.labels))
            self._order = (epoch, torch.from_numpy(shuffled))
        last = position == self.steps_per_epoch - 1
        stop = None if last else (position + 1) * self.batch_size
        rows = self._order[1][position * self.batch_size : stop]
        part = share(len(rows), rank, world_size)
        labels = self.labels[rows[part]]
        if len(labels) == 0:
            part = slice(0, 2)
        random = _random(self.config.seed, DISTORTION, step)
        images = _as_input(self.images[rows[part]])
        images = distort(images, self.config.augment, random, part=part, of=len(rows))
        return images.contiguous(memory_format=torch.channels_last), labels

    def images_before(self, step: int) -> int:
        """How many images all ranks have trained on in the steps before this one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * len(self.labels) + position * self.batch_size

    def _set_learning_rates(self, step: int) -> None:
        factor = schedule(step, self.steps, self.config.warmup)
        encoder, prototypes = self.optimizer.param_groups
        encoder["lr"] = factor * self.config.learning_rate
        prototypes["lr"] = factor * self.config.prototype_learning_rate


def share(size: int, rank: int, world_size: int) -> slice:
    """A rank's part of a batch. Sizes differ by one where the batch does not divide by the ranks;
    where it is too small for two images each, which batch normalisation needs, the last ranks have
    none."""
    ranks = min(world_size, size // 2)
    if rank >= ranks:
        return slice(size, size)
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _random(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, number])


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rates: a linear rise in warmup * steps steps, then half a cosine."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


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
    saved, failure = None, None
    try:
        saved = _checkpoint_to_resume(output, config, resume, overwrite, first)
    except Exception as error:
        failure = error
    agree({"the checkpoint": str(saved)}, failure, group)
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    if data is None:
        data = glyphs.split(glyphs.load(), config.seed, config.test_fraction)
    train_set, test_set = data
    if config.labels:
        train_set = glyphs.relabelled(
            train_set, read_labels("labels", config.labels, len(train_set))
        )
    facts = _facts(train_set, test_set)
    console.print(
        f"Training on {facts['train_images']:,} images of {facts['train_classes']:,} characters, "
        f"testing on {facts['test_images']:,} images of {facts['test_classes']:,} others."
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
            write_atomically(
                output / "config.toml", lambda file: file.write(config.to_toml().encode())
            )
            began = time.perf_counter()
            metrics["baselines"] = _baselines(config, train_set, test_set, console)
            metrics["seconds"]["baselines"] = time.perf_counter() - began
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
        report.write(output, metrics, test_set, embeddings, _random(config.seed, EXAMPLES, 0))
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
    with TrainingProgress(console, start, trainer.steps) as progress, _StopRequest() as stop:
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
                results = _evaluate(embeddings, test_set, dims, trainer.group)
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
                path = _save(output, trainer, metrics)
            if stopping and not last:
                raise Interrupted(trainer.step, trainer.steps, path)


def _save(output: Path, trainer: Trainer, metrics: dict[str, Any]) -> Path:
    """Write a checkpoint and metrics.json; the checkpoints before it are removed then."""
    metrics["step"] = trainer.step
    kept = {name: metrics[name] for name in ("baselines", "evaluations", "seconds", "step")}
    path = output / CHECKPOINTS / f"step-{trainer.step}"
    trainer.save(path, {"config": metrics["config"], "data": metrics["data"], "metrics": kept})
    if trainer.rank == 0:
        text = json.dumps(metrics, indent=1).encode()
        write_atomically(output / "metrics.json", lambda file: file.write(text))
        for other in path.parent.iterdir():
            if other != path:
                shutil.rmtree(other)
    return path


def _checkpoint_to_resume(
    output: Path, config: Config, resume: bool, overwrite: bool, first: bool
) -> Path | None:
    """The checkpoint to go on from, None to begin; CheckpointError where neither is right."""
    directory = output / CHECKPOINTS
    path = checkpoint.latest(directory)
    if not resume:
        if path is not None and not overwrite:
            raise CheckpointError(f"{path}: is there already; resume it, or overwrite it")
        # A run that is killed before its first checkpoint must not seem to have this one.
        if first:
            shutil.rmtree(directory, ignore_errors=True)
        return None
    if path is None:
        raise CheckpointError(f"{directory}: there is no checkpoint")
    saved = checkpoint.read_about(path)["extra"]
    if "config" not in saved:
        raise CheckpointError(f"{path}: is not a checkpoint of this driver")
    differences = config.differences(Config.from_mapping(saved["config"]))
    if differences:
        raise CheckpointError(f"{path}: is of another config: {'; '.join(differences)}")
    return path


class _StopRequest:
    """Within the block the first SIGINT or SIGTERM sets `requested`; a second one does as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> _StopRequest:
        self.requested = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])


def _as_input(images: Tensor) -> Tensor:
    """uint8 [B, 32, 32] -> float [B, 1, 32, 32] in [0, 1]."""
    scaled = images[:, None].float() / 255
    return scaled.contiguous(memory_format=torch.channels_last)


def _evaluate(
    embeddings: Tensor,
    test_set: Glyphs,
    dims: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    labels = torch.from_numpy(test_set.labels)
    results = evaluate(embeddings, labels, dims=list(dims), ks=RECALL_AT, process_group=group)
    return [_plain(r) for r in results]


def _plain(result: Result) -> dict[str, Any]:
    """For JSON, whose keys are strings."""
    recall = {str(k): value for k, value in result.recall.items()}
    return {"dim": result.dim, "recall": recall, "map_at_r": result.map_at_r}


def _facts(train_set: Glyphs, test_set: Glyphs) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in (train_set, test_set):
        digest.update(np.ascontiguousarray(part.images))
        digest.update(np.ascontiguousarray(part.labels))
    return {
        "train_images": len(train_set),
        "train_classes": train_set.num_classes,
        "test_images": len(test_set),
        "test_classes": test_set.num_classes,
        "sha256": digest.hexdigest(),
    }


def _baselines(
    config: Config, train_set: Glyphs, test_set: Glyphs, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """What the images can be retrieved by without our model: results by name."""
    found = {}
    for name in config.baselines:
        try:
            embeddings = baselines.BASELINES[name](
                train_set.images, train_set.labels, test_set.images, config.dims[-1]
            )
        except ValueError as error:
            raise ConfigError(f"baselines: {name} is not possible here: {error}") from error
        found[name] = _evaluate(embeddings, test_set, config.dims)
        best = max(result["recall"]["1"] for result in found[name])
        console.print(f"To beat: {name}, Recall@1 {best:.3f} at its best dimension")
    return found


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "unicom_ext": unicom_ext.__version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }
