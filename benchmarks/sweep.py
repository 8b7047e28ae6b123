"""Step time of the head while one size changes, as JSON, Markdown and pictures.

    python benchmarks/sweep.py --axis batch
    python benchmarks/sweep.py --axis fixed-sample --peers ""

Each value on the axis is a run of `head_step`, with its rounds and its interleaving.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from candidates import CANDIDATES, Shape
from head_step import RESULTS, compare, parse_peers
from rich.console import Console
from tables import describe, sweep_markdown

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASE = Shape(200_000, 256, 512, sample_rate=0.1, feature_rate=0.5)
# What changes, its label, and the shapes.
AXES: dict[str, tuple[str, dict[int | float, Shape]]] = {
    "classes": (
        "classes C",
        {c: replace(BASE, classes=c) for c in (50_000, 100_000, 200_000, 500_000, 1_000_000)},
    ),
    "batch": ("batch B", {b: replace(BASE, batch=b) for b in (32, 64, 128, 256, 512, 1024, 2048)}),
    "features": (
        "sampled dimensions d'",
        {d: replace(BASE, feature_rate=d / 512) for d in (64, 128, 256, 512)},
    ),
    "sample-rate": (
        "sampled share of classes r1",
        {r: replace(BASE, sample_rate=r) for r in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
    ),
    "fixed-sample": (
        "classes C, always 20 000 sampled",
        {
            c: Shape(c, 256, 64, sample_rate=20_000 / c, feature_rate=1.0)
            for c in (100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000)
        },
    ),
}


def plot(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, label in _labels(result).items():
        points = [
            (point["value"], candidate["summary"]["step"])
            for point in result["points"]
            for candidate in point["result"]["candidates"]
            if candidate["name"] == name and candidate["skipped"] is None
        ]
        x, spread = zip(*points, strict=True)
        median = [1e3 * s["median"] for s in spread]
        below = [1e3 * (s["median"] - s["min"]) for s in spread]
        above = [1e3 * (s["max"] - s["median"]) for s in spread]
        ours = name.startswith("ours")
        axes.errorbar(
            x, median, [below, above], label=label, marker="o", markersize=4, capsize=2,
            linestyle="-" if ours else "--",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=result["label"], ylabel="ms per step")
    axes.set_ylim(bottom=0.7 * axes.get_ylim()[0])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    shape = result["points"][0]["result"]["shape"]
    axes.set_title(f"Forward, backward and update; d = {shape['dim']}", fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _labels(result: dict[str, Any]) -> dict[str, str]:
    return {c["name"]: c["label"] for p in result["points"] for c in p["result"]["candidates"]}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--axis", type=click.Choice(list(AXES)), required=True, help="What changes.")
@click.option("--values", help="Some values of the axis only, comma-separated.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Rounds at each value.")
@click.option(
    "--peers", callback=parse_peers, default="partialfc,gemm", metavar="LIST",
    help="Whom to compare with.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results", help="Directory for the files.",
)  # fmt: skip
def main(axis: str, values: str | None, rounds: int, peers: list[str], output: Path) -> None:
    """Time the head at each value of an axis.

    Writes sweep-AXIS.json, .md and .png. With --values, points that the JSON has at other values
    stay, so that a long sweep can be run in pieces.
    """
    label, shapes = AXES[axis]
    wanted = {float(v) for v in values.split(",")} if values else set(shapes)
    unknown = wanted - set(shapes)
    if unknown:
        raise click.BadParameter(
            f"{', '.join(f'{v:g}' for v in sorted(unknown))} not among "
            f"{', '.join(f'{v:g}' for v in shapes)}",
            param_hint="--values",
        )
    chosen = [c for c in CANDIDATES if c.name in ("ours-fp32", "ours-bf16") or c.name in peers]
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"sweep-{axis}.json"
    points = {}
    if values and path.exists():
        points = {point["value"]: point for point in json.loads(path.read_text())["points"]}
    for value, shape in shapes.items():
        if value in wanted:
            result = compare(
                f"{axis} {value:g}", shape, chosen, rounds, torch.get_num_threads(), memory=False
            )
            points[value] = {"value": value, "result": result}
    result = {"axis": axis, "label": label, "points": [points[v] for v in sorted(points)]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(sweep_markdown(result))
    plot(result, path.with_suffix(".png"))
    console = Console()
    for line in describe(result["points"][-1]["result"]):
        console.print(line, highlight=False, markup=False)
    console.print(f"Written: {path.with_suffix('')}.json, .md and .png", highlight=False)


if __name__ == "__main__":
    main()
