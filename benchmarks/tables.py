"""The figures of a comparison as tables, for the terminal and in Markdown."""

from __future__ import annotations

import statistics
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
                f"Peak extra memory in MB; a dense gradient is {gradient / 1e6:.1f} MB",
                ["", "forward+backward", "step"],
                [[c["label"], *_memory(c["memory"])] for c in measured],
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


def cuda_table(result: dict[str, Any]) -> Table:
    """One shape of `cuda_step`: times, how much of each is the floor, memory."""
    columns = ("forward", "backward", "optimizer", "step")
    rows = []
    for c in result["candidates"]:
        if c["skipped"] is not None:
            continue
        times, memory = c["summary"], c["memory"]
        shares = (
            f"{c['floor'][s] / times[s]['median']:.2f}"
            if times[s]["median"] > 0 and (c["phases_apart"] or s not in ("forward", "backward"))
            else ""
            for s in ("forward", "backward", "forward+backward", "step")
        )
        rows.append(
            [
                c["label"],
                *(_spread(times[s], 1e3) for s in columns),
                *shares,
                _spread(c["ratios"]["step"], 1) if "ratios" in c else "1",
                f"{memory['step'] / 1e6:.0f}" if memory else "",
            ]
        )
    shape = result["shape"]
    title = (
        f"B = {shape['batch']}, |S| = {shape['num_sampled']} of C = {shape['classes']}, "
        f"d' = {shape['num_features']} of {shape['dim']}: ms, median (min to max)"
    )
    first = result["candidates"][0]["label"]
    shares = [f"floor of {s}" for s in ("forward", "backward", "both", "step")]
    return Table(title, ["", *columns, *shares, f"step, times {first}", "peak MB"], rows)


def _plain_table(records: list[dict[str, Any]]) -> Table:
    rows = []
    for r in records:
        if r["skipped"] is None:
            pairs = [theirs / ours for ours, theirs in zip(r["ours_seconds"], r["seconds"],
                                                           strict=True)]  # fmt: skip
            rows.append(
                [
                    r["label"],
                    _spread(_summary(r["seconds"]), 1e3),
                    _spread(_summary(pairs), 1),
                    f"{r['memory'] / 1e6:.0f}",
                ]
            )
    title = "Plain softmax over all of these classes, forward + backward"
    return Table(title, ["", "ms", "times ours", "peak MB"], rows)


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cuda_markdown(results: list[dict[str, Any]]) -> str:
    machine, rates = results[-1]["machine"], results[-1]["ceilings"]
    products = ", ".join(f"{n} {rates[n] / 1e12:.0f}" for n in ("fp16", "bf16", "fp32"))
    lines = [
        "# Head step on a GPU\n",
        *(f"- {key}: {value}" for key, value in machine["gpu"].items()),
        f"- torch {machine['torch']}, commit {machine['git_commit']}, {machine['date']}",
        f"- ceilings: products {products} TFLOP/s, copy {rates['copy'] / 1e12:.2f} TB/s",
        f"- {results[-1]['rounds']} rounds; each candidate takes turns with the first one; the "
        "last columns are ratios of these pairs and peak memory beyond what is there between steps",
        "- a floor is the arithmetic of the step at the ceilings; a share of 1 would be the floor",
        "",
    ]
    for result in results:
        lines.append(cuda_table(result).markdown())
        skipped = [c for c in result["candidates"] if c["skipped"] is not None]
        if plain := result.get("plain_softmax"):
            lines.append(_plain_table(plain).markdown())
            skipped += [r for r in plain if r["skipped"] is not None]
        lines += [f"- SKIPPED {c['label']}: {c['skipped']}" for c in skipped] + [""]
    return "\n".join(lines)


def sweep_markdown(result: dict[str, Any]) -> str:
    """Milliseconds per step at each value of a sweep, and the ratios to our fp32."""
    points = result["points"]
    labels = {c["name"]: c["label"] for p in points for c in p["result"]["candidates"]}
    times, ratios = [], []
    for point in points:
        by_name = {c["name"]: c for c in point["result"]["candidates"]}
        spans = {n: by_name[n]["summary"]["step"] for n in labels if "summary" in by_name[n]}
        times.append(
            [f"{point['value']:g}", *(_spread(spans[n], 1e3) if n in spans else "" for n in labels)]
        )
        pairs = point["result"]["ratios"]["ours-fp32"]
        ratios.append(
            [f"{point['value']:g}", *(_spread(pairs[n]["step"], 1) if n in pairs else ""
                                      for n in labels if not n.startswith("ours"))]
        )  # fmt: skip
    head = [result["label"]]
    tables = [Table("Milliseconds per step: median (min to max)", [*head, *labels.values()], times)]
    peers = [label for name, label in labels.items() if not name.startswith("ours")]
    if peers:
        title = "Step, times as long as unicom_ext fp32: median (min to max) of the pairs"
        tables.append(Table(title, [*head, *peers], ratios))
    lines = "\n".join(f"- {line}" for line in describe(points[-1]["result"]))
    text = "\n".join(table.markdown() for table in tables)
    return (
        f"# Sweep over {result['label']}\n\n![](sweep-{result['axis']}.png)\n\n{text}\n"
        f"The last point:\n\n{lines}\n"
    )


def part_tables(results: list[dict[str, Any]]) -> list[Table]:
    """One table for each result of `parts`."""
    return [
        Table(
            result["title"],
            ["", "ms", f"times as long as {next(iter(result['seconds']))}"],
            [
                [
                    label,
                    _spread(values, 1e3),
                    _spread(result["ratios"][label], 1) if label in result["ratios"] else "1",
                ]
                for label, values in result["summary"].items()
            ],
        )
        for result in results
    ]


def parts_markdown(results: list[dict[str, Any]]) -> str:
    lines = ["# Parts of the head step\n", "Median (min to max); ratios within a round.\n"]
    for result, table in zip(results, part_tables(results), strict=True):
        machine, (before, after) = result["machine"], result["load_average"]
        lines.append(table.markdown())
        lines += [f"- {note}" for note in result["notes"]]
        lines.append(
            f"- {result['rounds']} rounds, {result['threads']} threads, {machine['cpu']}, "
            f"{machine['capability']}; load average {_load(before)} before and {_load(after)} "
            f"after; {machine['date']}\n"
        )
    return "\n".join(lines)


def _memory(memory: dict[str, int] | str) -> list[str]:
    if isinstance(memory, str):
        return [memory, ""]
    return [f"{memory[span] / 1e6:.1f}" for span in ("forward+backward", "step")]


def _spread(values: dict[str, float], unit: float) -> str:
    median, low, high = (_figure(unit * values[key]) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _load(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
