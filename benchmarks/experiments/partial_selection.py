"""Does it help to compare with a random part of the prototypes and of the dimensions?

    python benchmarks/experiments/partial_selection.py --data glyphs
    python benchmarks/experiments/partial_selection.py --data glyphs --summary

UNICOM (An et al., ICLR 2023) says that where pseudo-classes are in conflict a random part of the
class prototypes in each step (r1, `sample_rate`) makes training robust, and a random part of the
dimensions (r2, `feature_rate`) makes embeddings compact. Here a grid of both is compared with full
softmax and with rivals (methods.py), on true classes and on clusters of pictures, of their names
and of both (picture_sets.py), over several seeds. A seed moves the split of the classes, the
weights and every draw; within a seed all methods have the same.

Knobs are tuned for each method and kind of labels with a seed of its own, by the mean Recall@1 over
dimensions on classes that no seed trains or tests on. Results are those of the last step, on test
classes. Sets of pictures, candidates and numbers of clusters were fixed before any result was
looked at, and so was the question that is asked first: r1 = 0.3 with r2 = 0.5 (which a single run
had suggested) against full softmax, joint labels, at 16 dimensions.

Each run is a line of the results file. Runs that are in it are not run again. First come the
methods of --quick, for one kind of labels after the other, each with all its seeds; then the rest
of the grid. So whatever there is when it stops is balanced over methods.
Training is as long as the demo's, as its length turns results around: in a first trial of 2 epochs
full softmax was ahead at 8 dimensions, in one of 14 it was behind. --epochs has a file of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent.parent))

import picture_sets
import selection_tables
from measure import describe_machine
from methods import FULL, GRID, QUICK, SMALL_SCALE, Method
from one_run import Recipe, run, tune
from records import Records, read

RESULTS = Path(__file__).parent.parent / "results" / "partial-selection"
RECIPES = {"glyphs": Recipe(epochs=14), "emoji": Recipe(epochs=42)}  # as many steps
TUNING_SEED = 1000  # no seed of a test


@dataclass(frozen=True)
class Task:
    """A run: of a test, or of tuning (half as long) where there is a candidate."""

    labels: str
    method: Method
    seed: int
    candidate: str | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What a record is known by, but for its set of pictures."""
        stage = "test" if self.candidate is None else "tuning"
        return {"labels": self.labels, **asdict(self.method), "stage": stage, "seed": self.seed,
                "candidate": self.candidate}  # fmt: skip

    @property
    def weight(self) -> float:
        return 1.0 if self.candidate is None else 0.5


Plan = list[tuple[str, list[Method]]]  # kinds of labels and what is run with them, in order


def plan(quick: bool) -> Plan:
    """Joint labels before other kinds, and the methods of QUICK before the rest of the grid."""
    if quick:
        return [("joint", QUICK)]
    rest = [method for method in GRID if method not in QUICK]
    return [
        ("joint", QUICK),
        ("true", QUICK),
        ("joint", SMALL_SCALE),
        ("image", QUICK),
        ("text", QUICK),
        *((kind, rest) for kind in picture_sets.LABELS),
    ]


def tasks(plan: Plan, seeds: int) -> Iterator[Task]:
    """Seed by seed; what is tuned comes first."""
    for kind, methods in plan:
        for method in methods:
            for candidate in method.candidates:
                yield Task(kind, method, TUNING_SEED, candidate)
        for seed in range(seeds):
            yield from (Task(kind, method, seed) for method in methods)


class Experiment:
    """Runs tasks on one set of pictures, with what the records say about earlier ones."""

    def __init__(self, name: str, emoji_cache: Path, recipe: Recipe, records: Records) -> None:
        self.name, self.recipe, self.records = name, recipe, records
        self.pictures = picture_sets.load(name, emoji_cache)
        self.machine = describe_machine()
        # The order of tasks asks for each of these many times in a row.
        self.split = lru_cache(1)(lambda seed: picture_sets.split(self.pictures, seed))
        self.labelled = lru_cache(1)(
            lambda labels, seed: picture_sets.labelled(self.split(seed).train, labels, seed)
        )

    def find(self, task: Task) -> dict[str, Any] | None:
        """The record of a task, if it has been run."""
        wanted = {"data": self.name, **task.key}
        for record in self.records.all:
            if wanted.items() <= record.items():
                if record["recipe"] != asdict(self.recipe):
                    raise click.ClickException(
                        f"the results file has runs on {self.name} with {record['recipe']}, must "
                        f"be {asdict(self.recipe)}: give another file"
                    )
                return record
        return None

    def chosen(self, labels: str, method: Method) -> str:
        """The candidate with the best mean Recall@1 over dimensions, of equals the first."""

        def quality(candidate: str) -> float:
            record = self.find(Task(labels, method, TUNING_SEED, candidate))
            assert record is not None, "tuning comes before the test"
            recall = record["results"]["leading"]["recall"].values()
            return sum(recall) / len(recall)

        return max(method.candidates, key=quality)

    def run(self, task: Task) -> dict[str, Any]:
        began = time.perf_counter()
        split = self.split(task.seed)
        train, facts = self.labelled(task.labels, task.seed)
        settings = self._settings(task)
        if task.candidate is None:
            found = run(self.recipe, train, split.test, task.method, settings, task.seed)
        else:
            found = tune(self.recipe, train, split.validation, task.method, settings, task.seed)
        record = {
            "data": self.name,
            **task.key,
            "settings": settings,
            **found,
            "classes": facts,
            "recipe": asdict(self.recipe),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - began,
            "machine": self.machine,
        }
        self.records.append(record)
        return record

    def _settings(self, task: Task) -> dict[str, Any]:
        of_full = self.chosen(task.labels, FULL) if task.method.name == "filter" else None
        candidate = task.candidate
        if candidate is None:
            candidate = self.chosen(task.labels, task.method)
        return task.method.settings(candidate, of_full)


def run_all(experiment: Experiment, todo: list[Task], console: Console) -> None:
    left = [task for task in todo if experiment.find(task) is None]
    console.print(f"{experiment.name}: {len(todo)} runs, {len(left)} of them to do")
    total, done, began = sum(task.weight for task in left), 0.0, time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=total)
        for number, task in enumerate(left, 1):
            record = experiment.run(task)
            done += task.weight
            progress.advance(bar, task.weight)
            hours = (time.perf_counter() - began) / done * (total - done) / 3600
            recall = " ".join(f"{r:.3f}" for r in record["results"]["leading"]["recall"].values())
            what = "test" if task.candidate is None else f"tuning {task.candidate}"
            progress.console.print(
                f"{number}/{len(left)} {task.labels}, {task.method.title}, {what}, seed "
                f"{task.seed}: {recall}; {record['seconds']:.1f} s, {hours:.1f} h left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


@click.command()
@click.option("--data", type=click.Choice(picture_sets.SETS), default="glyphs", show_default=True)
@click.option("--emoji-cache", type=click.Path(path_type=Path), default="emoji.npz",
              help="What emoji_pictures.py has written.", show_default=True)  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False),
              help="Of the runs; default benchmarks/results/partial-selection/DATA.jsonl."
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1, TUNING_SEED), help="5, or 2 with --quick.")
@click.option("--quick", is_flag=True, help="Few methods, joint labels, half an hour.")
@click.option("--epochs", type=click.IntRange(1), help="Of a run, for a file of its own; "
              + ", ".join(f"{r.epochs} on the {name}" for name, r in RECIPES.items()) + ".",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Of torch; its own choice.")
@click.option("--summary", is_flag=True, help="Run nothing: tables and plots of what is there.")
def main(
    data: str,
    emoji_cache: Path,
    results: Path | None,
    seeds: int | None,
    quick: bool,
    epochs: int | None,
    threads: int | None,
    summary: bool,
) -> None:
    console = Console()
    results = results or RESULTS / f"{data}.jsonl"
    if summary:
        if not results.exists():
            raise click.ClickException(f"{results}: there is no such file")
        for path in selection_tables.write(read(results), results.with_suffix("")):
            console.print(str(path), soft_wrap=True)
        return
    if threads:
        torch.set_num_threads(threads)
    todo = tasks(plan(quick), seeds or (2 if quick else 5))
    with Records(results) as records:
        recipe = replace(RECIPES[data], epochs=epochs or RECIPES[data].epochs)
        experiment = Experiment(data, emoji_cache, recipe, records)
        run_all(experiment, list(todo), console)


if __name__ == "__main__":
    main()
