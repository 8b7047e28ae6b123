"""The figures of a comparison as tables, for the terminal and in Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rich.table


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]  # the first column is text, the others are figures

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            # The spread goes below its median: five such columns fit a terminal then.
            table.add_row(row[0], *(cell.replace(" (", "\n(") for cell in row[1:]))
        return table

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.header) - 1)
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Times, ratios and memory of a result as `head_step` writes it in JSON."""
    timed = [c for c in result["candidates"] if c["skipped"] is None]
    spans = list(timed[0]["summary"])
    times = Table(
        "Milliseconds: median (min to max)",
        ["", *spans],
        [[c["label"], *(_spread(c["summary"][s], 1e3) for s in spans)] for c in timed],
    )
    by_name = {c["name"]: c["label"] for c in timed}
    tables = [times]
    for ours, peers in result["ratios"].items():
        if not peers:
            continue
        columns = list(next(iter(peers.values())))
        tables.append(
            Table(
                f"Times as long as {by_name[ours]}: median (min to max) of the pairs",
                ["", *columns],
                [
                    [by_name[peer], *(_spread(spans[s], 1) for s in columns)]
                    for peer, spans in peers.items()
                ],
            )
        )
    measured = [c for c in timed if c["memory"] is not None]
    if measured:
        gradient = result["shape"]["weight_bytes"]
        tables.append(
            Table(
                f"Peak extra memory in MB; the dense gradient is {gradient / 1e6:.1f} MB of it",
                ["", "forward+backward", "beyond the gradient", "step"],
                [[c["label"], *_memory(c["memory"], gradient)] for c in measured],
            )
        )
    return tables


def describe(result: dict[str, Any]) -> list[str]:
    """What was measured, on what and with which reservations: one line each."""
    shape, machine, (before, after) = result["shape"], result["machine"], result["load_average"]
    lines = [
        f"C = {shape['classes']}, B = {shape['batch']}, d = {shape['dim']}: "
        f"{shape['num_sampled']} classes and {shape['num_features']} dimensions sampled per step",
        f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} threads, kernels for "
        f"{machine['capability']}; torch {machine['torch']}; commit {machine['git_commit']}; "
        f"{machine['date']}",
        f"{result['rounds']} interleaved rounds; load average {_load(before)} before and "
        f"{_load(after)} after",
    ]
    if after is not None and after > 1.25 * machine["cores"]:
        lines.append("NOISY: other programs were running")
    if machine["environment"]:
        settings = " ".join(f"{k}={v}" for k, v in machine["environment"].items())
        lines.append(f"environment: {settings}")
    for c in result["candidates"]:
        lines.append(f"{c['label']}: {c['description']}")
        if c["skipped"] is not None:
            lines.append(f"SKIPPED {c['label']}: {c['skipped']}")
    return lines


def markdown(result: dict[str, Any]) -> str:
    lines = "\n".join(f"- {line}" for line in describe(result))
    tables = "\n".join(table.markdown() for table in make_tables(result))
    return f"# Head step, {result['name']}\n\n{lines}\n\n{tables}"


def _memory(memory: dict[str, int] | str, gradient: int) -> list[str]:
    if isinstance(memory, str):
        return [memory, "", ""]
    forward_backward, step = memory["forward+backward"], memory["step"]
    return [f"{b / 1e6:.1f}" for b in (forward_backward, forward_backward - gradient, step)]


def _spread(values: dict[str, float], unit: float) -> str:
    median, low, high = (_figure(unit * values[key]) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _load(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
