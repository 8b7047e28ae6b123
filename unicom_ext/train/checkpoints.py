"""Checkpoints of a run: one at a time in its output directory, beside metrics.json."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from unicom_ext import checkpoint
from unicom_ext.encoders.contents import contents
from unicom_ext.train.config import Config
from unicom_ext.train.trainer import Trainer
from unicom_ext.utils.files import CheckpointError, write_atomically

CONFIG, METRICS = "config.toml", "metrics.json"
CHECKPOINTS = "checkpoints"  # directory in the output directory
BEST = "best.pt"  # the best encoder on the validation classes so far
UNREADABLE = "unreadable.txt"
ON_THE_WAY = (BEST, UNREADABLE)  # of a run, which it may write before its first checkpoint
# Of the metrics: what a run that goes on must know.
KEPT = ("baselines", "evaluations", "best", "stopped_early", "unreadable", "seconds", "step")
# Settings that may differ when a run goes on: they do not change what it computes.
FREE_TO_CHANGE = ("workers", "checkpoint_every", "tensorboard")
OF_DATA = ("labels",)  # likewise: what they name is a part of the data, which must be the same


def save(output: Path, trainer: Trainer, metrics: dict[str, Any]) -> Path:
    """Write a checkpoint and metrics.json; the checkpoints before it are removed then."""
    metrics["step"] = trainer.step
    kept = {name: metrics[name] for name in KEPT}
    path = output / CHECKPOINTS / f"step-{trainer.step}"
    facts = {name: metrics[name] for name in ("config", "data", "contents")}
    trainer.save(path, {**facts, "metrics": kept})
    if trainer.rank == 0:
        write_beside(output, path, metrics)
    return path


def write_beside(output: Path, path: Path, metrics: dict[str, Any]) -> None:
    """What belongs to a checkpoint that is whole, if it is not there yet. May be repeated after a
    kill."""
    text = json.dumps(metrics, indent=1).encode()
    there = output / METRICS
    if not there.exists() or there.read_bytes() != text:
        write_atomically(there, lambda file: file.write(text))
    _remove_steps(path.parent, path)
    if metrics["unreadable"]:
        write_unreadable(output, metrics["unreadable"])


def remove_earlier(output: Path) -> None:
    """Remove what an earlier run has written there, and nothing else: a run that is killed before
    its first checkpoint must not seem to have this one."""
    _remove_steps(output / CHECKPOINTS)
    for name in (METRICS, "report.html", *ON_THE_WAY):
        (output / name).unlink(missing_ok=True)


def write_best(output: Path, state: dict[str, Any]) -> None:
    write_atomically(output / BEST, lambda file: torch.save(state, file))


def read_best(output: Path) -> dict[str, Any]:
    try:
        return torch.load(output / BEST, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{output / BEST}: cannot be read: {error}") from None


def write_unreadable(output: Path, unreadable: dict[str, str]) -> None:
    """One line for each image that could not be read: its name, and why."""
    lines = "".join(f"{name}\t{why}\n" for name, why in unreadable.items())
    write_atomically(
        output / UNREADABLE, lambda file: file.write(lines.encode(errors="surrogateescape"))
    )


def _remove_steps(directory: Path, kept: Path | None = None) -> None:
    """Remove the checkpoints of the run, whole or not, but one."""
    for path in directory.glob("step-*"):
        if path != kept and re.fullmatch(r"step-[0-9]+(\.tmp)?", path.name):
            shutil.rmtree(path)


def to_resume(output: Path, config: Config, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, None to begin; CheckpointError where neither is right."""
    directory = output / CHECKPOINTS
    path = checkpoint.latest(directory)
    if not resume:
        if path is not None and not overwrite:
            raise CheckpointError(f"{path}: is there already; resume it, or overwrite it")
        # A run that was killed before its first checkpoint has left its settings, and what it wrote
        # on the way.
        settings = output / CONFIG
        begun = settings.is_file() and settings.read_bytes() == config.to_toml().encode()
        for name in (METRICS, "report.html", *(() if begun else (CONFIG, *ON_THE_WAY))):
            if (output / name).exists() and not overwrite:
                raise CheckpointError(f"{output / name}: is there already; overwrite it")
        return None
    if path is None:
        raise CheckpointError(f"{directory}: there is no checkpoint")
    saved = checkpoint.read_about(path)["extra"]
    if "config" not in saved:
        raise CheckpointError(f"{path}: is not a checkpoint of this driver")
    free = [*FREE_TO_CHANGE, *OF_DATA]
    weights = saved.get("contents", {}).get("weights")
    if weights is not None and weights == contents(config.to_dict()).get("weights"):
        free.append("weights")  # the same ones, wherever they lie now
    differences = config.differences(Config.from_mapping(saved["config"]), free)
    if differences:
        raise CheckpointError(f"{path}: is of another config: {'; '.join(differences)}")
    return path
