"""How a run shows itself: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20  # in all, where the output is not a terminal


class TrainingProgress:
    """Context manager; `advance` after each step, and `console.print` for anything else."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self.console = console
        self.total = total
        self._start = start
        self._every = math.ceil(total / LINES)
        self._loss: float | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} images/s, {task.fields[waiting]} of the time waiting"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        unknown: dict[str, Any] = {"loss": "-", "rate": "-", "waiting": "-"}
        self._task = self._bar.add_task("", total=total, completed=start, **unknown)

    def __enter__(self) -> TrainingProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)

    def advance(self, step: int, loss: float, images: int, seconds: float, waiting: float) -> None:
        """step: how many are done. images in `seconds`: what this process has trained on so far.
        waiting: share of these seconds in which it waited for images."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        rate = images / max(seconds, 1e-9)
        self._bar.update(
            self._task, completed=step, loss=f"{self._loss:.3f}", rate=f"{rate:,.0f}",
            waiting=f"{waiting:.0%}",
        )  # fmt: skip
        if not self.console.is_terminal and (step % self._every == 0 or step == self.total):
            left = (self.total - step) * seconds / (step - self._start)
            self.console.print(
                f"step {step}/{self.total}  loss {self._loss:.3f}  {rate:,.0f} images/s "
                f"({waiting:.0%} of the time waiting)  {timedelta(seconds=round(left))} left"
            )
