"""A pipeline from its settings to its report, step after step; what is whole is not made again."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from unicom_ext.pipeline.config import PipelineConfig
from unicom_ext.pipeline.record import RECORD, Record
from unicom_ext.pipeline.steps import (
    NAMES,
    STEPS,
    Evaluate,
    Finetune,
    Place,
    Report,
    Step,
    Train,
    left_out,
    names_its_table,
    planned,
)
from unicom_ext.train.images import opened
from unicom_ext.utils.files import only_writer, write_file
from unicom_ext.utils.settings import ConfigError

CONFIG = "pipeline.toml"
_OWN_DIRECTORIES = tuple(step.directory for step in STEPS if step.directory != ".")


def run(
    config: PipelineConfig,
    output: str | Path,
    *,
    until: str | None = None,
    begin_at: str | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Extract features, cluster them, train on the clusters, fine-tune on true classes, evaluate.

    Each step writes to a directory of its own in the output directory. What is whole there, and of
    the same settings and images, is left as it is; a step that was killed is gone on with.

    Args:
        config: what to do.
        output: the directory, made if need be.
        until: the last step to do.
        begin_at: do this step and those after it again, from their beginning.
        console: for what is done.

    Returns:
        What evaluation/figures.json holds: results by encoder and of the baselines; None where
        nothing is evaluated.

    Raises:
        ConfigError: settings that cannot be used, images that are not there, or other files in the
        way; before anything is changed. And what the steps raise: CheckpointError, OSError
        (another process writes to the directory, for one), Interrupted.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a pipeline runs in one process, without torchrun; `unicom-ext cluster` and "
            "`unicom-ext train` take several"
        )
    console = console or Console()
    output = Path(output).absolute()
    record = Record(output, _OWN_DIRECTORIES)
    place = Place(config, opened(config.data, config.data.seed), output)
    steps, without = planned(place), left_out(place)
    for argument, name in (("until", until), ("from", begin_at)):
        _check_step(argument, name, without)
    names = [step.name for step in steps]
    kept = names if begin_at is None else names[: names.index(begin_at)]
    last = names.index(until) if until is not None else len(steps) - 1
    steps = steps[: last + 1]
    for step in steps:
        if step.name not in kept or not record.is_whole(step.name, step.key, _result(step)):
            with names_its_table(type(step)):
                step.check()
    with only_writer(output):
        record.keep(kept)
        write_file(output / CONFIG, lambda file: file.write(config.to_toml().encode()))
        for step in steps:
            _do(step, record, console)
    for name, why in without.items():
        if until is None:
            _say(console, f"{name}: left out, as {why}.")
    done = Evaluate.name in [step.name for step in steps]
    return json.loads((output / Evaluate.directory / Evaluate.result).read_text()) if done else None


def _do(step: Step, record: Record, console: Console) -> None:
    result = _result(step)
    if record.is_whole(step.name, step.key, result):
        _say(console, f"{step.name}: is there already, {result}")
        return
    _say(console, f"{step.name}: {step.purpose()}", style="bold")
    if not record.is_begun(step.name, step.key):
        again = record.is_of(step.name, step.key)
        record.keep([name for name in NAMES if name != step.name])
        if not again:
            _forget_later(step, record)
        step.clear()
        record.begin(step.name, step.key)
    began = time.perf_counter()
    with names_its_table(type(step)):
        step.run(console)
    seconds = time.perf_counter() - began
    record.finish(step.name, result, seconds)
    _say(console, f"{step.name}: took {timedelta(seconds=round(seconds))}")


def _forget_later(step: Step, record: Record) -> None:
    """The steps after one that makes something else, of which theirs are no more: there is no
    encoder of theirs to export, and no page to look at."""
    at = NAMES.index(step.name)
    record.keep(NAMES[:at])
    for kind in STEPS[at + 1 :]:
        if kind in (Evaluate, Report):
            (step.place.output / kind.directory / kind.result).unlink(missing_ok=True)


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _result(step: Step) -> Path:
    return step.output / step.result


def _check_step(argument: str, name: str | None, without: dict[str, str]) -> None:
    if name is None:
        return
    if name not in NAMES:
        raise ConfigError(f"{argument}: got {name!r}, must be {' or '.join(NAMES)}")
    if name in without:
        raise ConfigError(f"{argument}: got {name!r}, which is left out, as {without[name]}")


def final_run(output: Path) -> Path | None:
    """The output of the last training that a pipeline has finished there; None where there is no
    pipeline. Raises ConfigError where none is finished."""
    if not (output / RECORD).exists():
        return None
    last = Record(output, ()).last_whole([Train.name, Finetune.name])
    if last is None:
        raise ConfigError(f"{output}: has finished no training yet")
    return output / (Train if last == Train.name else Finetune).directory
