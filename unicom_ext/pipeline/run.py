"""A pipeline from its settings to its report, step after step; what is whole is not made again."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import Console

from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks, default_group
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

    Where torch.distributed is initialised every process calls this with the same arguments, on a
    file system that they share. Features and clusters are those of one process bit for bit; in
    training each has its part of the batches. An error on one process is raised on all.

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
    if default_group() is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this is one of several processes, which work together only where torch.distributed is "
            "initialised"
        )
    ranks, output = Ranks(default_group()), Path(output).absolute()
    console = (console or Console()) if ranks.is_first else Console(quiet=True)
    plan, failure = None, None
    try:
        plan = _Plan.of(config, output, until, begin_at)
    except Exception as error:
        failure = error
    agree({"settings, images and output": plan and plan.keys()}, failure, ranks.group)
    assert plan is not None
    with ExitStack() as held:
        with ranks.together():
            if ranks.is_first:
                held.enter_context(only_writer(output))
                plan.record.keep(plan.kept)
                write_file(output / CONFIG, lambda file: file.write(config.to_toml().encode()))
        for step in plan.steps:
            _do(step, plan.record, ranks, console)
    for name, why in plan.without.items():
        if until is None:
            _say(console, f"{name}: left out, as {why}.")
    figures = output / Evaluate.directory / Evaluate.result
    evaluated = ranks.is_first and Evaluate.name in [step.name for step in plan.steps]
    return ranks.of_first(json.loads(figures.read_text()) if evaluated else None)


class _Plan(NamedTuple):
    record: Record
    steps: list[Step]  # to do, or to find done
    without: dict[str, str]  # steps that are left out, and why
    kept: list[str]  # steps of which what is whole counts
    output: Path

    @classmethod
    def of(
        cls, config: PipelineConfig, output: Path, until: str | None, begin_at: str | None
    ) -> Self:
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
        return cls(record, steps, without, kept, output)

    def keys(self) -> list[str]:
        """What must be the same on all ranks."""
        return [str(self.output), *(step.key for step in self.steps)]


def _do(step: Step, record: Record, ranks: Ranks, console: Console) -> None:
    """The first rank alone knows and writes what is done."""
    result = _result(step)
    if ranks.of_first(ranks.is_first and record.is_whole(step.name, step.key, result)):
        _say(console, f"{step.name}: is there already, {result}")
        return
    _say(console, f"{step.name}: {step.purpose()}", style="bold")
    with ranks.together():
        if ranks.is_first and not record.is_begun(step.name, step.key):
            again = record.is_of(step.name, step.key)
            record.keep([name for name in NAMES if name != step.name])
            if not again:
                _forget_later(step, record)
            step.clear()
            record.begin(step.name, step.key)
    began = time.perf_counter()
    with names_its_table(type(step)):
        step.run(console, ranks)
    seconds = time.perf_counter() - began
    with ranks.together():
        if ranks.is_first:
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
