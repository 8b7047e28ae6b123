"""Time the search for the nearest centroid and the sums of a clustering on a GPU.

    python benchmarks/cuda_nearest.py --quick

Rows lie around the centroids, which are random directions. The share is that of a bare fp16 product
of the same size at the rate measured on 8192 x 8192 x 8192. The labels of some rows are compared
with those that the CPU finds.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from device import Cuda
from measure import describe_machine
from rich.console import Console
from tables import Table

from unicom_ext.cluster import Centroids, UnitSums

RESULTS = Path(__file__).parent / "results"
# Rows, centroids, dimensions.
QUICK = ["131072x10000x256", "131072x100000x768"]
SHAPES = ["131072x1000x256", *QUICK, "131072x100000x256", "65536x1000000x768"]
COMPARED = 256  # rows


def measure(shape: str, place: Any, rounds: int) -> dict[str, Any]:
    """Seconds of each part by round, and how many of some labels are not the CPU's."""
    n, k, d = map(int, shape.split("x"))
    generator = torch.Generator(place.device).manual_seed(0)
    values = torch.randn(k, d, device=place.device, generator=generator)
    near = torch.randint(k, (n,), device=place.device, generator=generator)
    rows = values[near] + torch.randn(n, d, device=place.device, generator=generator)
    centroids = Centroids(values)
    label = centroids.nearest(rows)[0]
    sums = UnitSums(k, d, rows=1 << 30, device=place.device)
    parts = {
        "pack": lambda: Centroids(values),
        "search": lambda: centroids.nearest(rows),
        "search, labels guessed": lambda: centroids.nearest(rows, label),
        "sums": lambda: sums.add(rows, label),
    }
    seconds = [place.time(*parts.values()) for _ in range(rounds)]
    right = Centroids(values.cpu()).nearest(rows[:COMPARED].cpu())[0]
    return {
        "shape": shape,
        "operations": 2 * n * k * d,
        "seconds": dict(zip(parts, zip(*seconds, strict=True), strict=True)),
        "wrong": int((label[:COMPARED].cpu() != right).sum()),
    }


def table(results: list[dict[str, Any]], rate: float) -> Table:
    lines = []
    for result in results:
        for part, seconds in result["seconds"].items():
            median = statistics.median(seconds)
            speed = result["operations"] / median if part.startswith("search") else None
            lines.append(
                [
                    result["shape"],
                    part,
                    f"{1e3 * median:.3f} ({1e3 * min(seconds):.3f} to {1e3 * max(seconds):.3f})",
                    f"{speed / 1e12:.1f}" if speed else "",
                    f"{100 * speed / rate:.0f} %" if speed else "",
                    str(result["wrong"]),
                ]
            )
    columns = ["rows x k x d", "", "ms", "TFLOP/s", "of fp16", "labels unlike the CPU's"]
    return Table("The nearest centroid", columns, lines)


def run(place: Any, shapes: list[str], rounds: int, output: Path) -> list[dict[str, Any]]:
    rates = place.ceilings()
    results = [measure(shape, place, rounds) for shape in shapes]
    Console().print(table(results, rates["fp16"]).rich())
    record = {
        "machine": describe_machine(),
        "gpu": place.describe(),
        "ceilings": rates,
        "results": results,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    return results


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--quick", is_flag=True, help="Two shapes only.")
@click.option("--shape", "shapes", multiple=True, help="ROWSxKxD. Can be repeated.")
@click.option("--rounds", type=click.IntRange(min=1), default=7)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              default=RESULTS / "cuda-nearest.json")  # fmt: skip
def main(quick: bool, shapes: tuple[str, ...], rounds: int, output: Path) -> None:
    """Writes OUTPUT; the exit status is 1 where a label is not the CPU's."""
    results = run(Cuda(), list(shapes) or (QUICK if quick else SHAPES), rounds, output)
    if any(result["wrong"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
