"""How a clustering shows itself: a bar for each pass on a terminal, a line for it anywhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from unicom_ext.cluster.lloyd import Totals


class PassProgress:
    """Context manager of one pass; `watch` takes the totals of this process after each block.

    rows: that this process will see. passes_left: like it, for the estimate of the time.
    """

    def __init__(self, console: Console, title: str, rows: int, passes_left: int) -> None:
        self._console, self._title, self._rows, self._left = console, title, rows, passes_left
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]} rows/s  objective {task.fields[objective]}"),
            TextColumn("{task.fields[changed]}"),
            TextColumn("{task.fields[left]} left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            title, total=rows, rate="-", objective="-", changed="", left="-"
        )

    def __enter__(self) -> PassProgress:
        self._began = time.perf_counter()
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.__exit__(*exception)
        self.seconds = time.perf_counter() - self._began

    def watch(self, totals: Totals) -> None:
        rate = totals.seen / (time.perf_counter() - self._began)
        todo = self._rows - totals.seen + self._left * self._rows
        self._bar.update(
            self._task,
            completed=totals.seen,
            rate=f"{rate:,.0f}",
            objective=f"{totals.objective:.5f}" if totals.score else "-",
            changed=changed_text(totals),
            left=str(timedelta(seconds=round(todo / rate))) if rate else "-",
        )

    def report(self, totals: Totals, note: str = "") -> None:
        """A line about the finished pass, from the totals of all processes."""
        parts = [
            f"{self._title}:" + (f" objective {totals.objective:.6f}" if totals.score else ""),
            changed_text(totals),
            f"{totals.seen / max(self.seconds, 1e-9):,.0f} rows/s",
            f"{self.seconds:.1f} s",
            note,
        ]
        self._console.print("  ".join(part for part in parts if part), highlight=False)


def changed_text(totals: Totals) -> str:
    fraction = totals.changed_fraction
    return "" if fraction is None else f"{100 * fraction:.2f} % changed"
