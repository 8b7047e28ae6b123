"""Stream more rows from disk than one wants in memory through one pass of k-means.

    python benchmarks/cluster_stream.py --rows 10000000

Three rates on the same rows, fp16 in shards that are dropped from the page cache first: reading
them alone, finding the nearest centroids of rows in memory alone, and a whole pass, which does both
and adds up the new centroids. Reading overlaps with the search, so a pass should be nearly as fast
as the slower of the two.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from clustering import RESULTS, SHARD_ROWS
from measure import describe_machine, load_average, status_bytes
from rich.console import Console
from rich.progress import track
from tables import Table

from unicom_ext.cluster import Centroids, ClusterConfig, cluster
from unicom_ext.data.source import Source

ALONE_SECONDS = 5.0  # that the search alone is timed, before the pass and after it


def make_rows(path: Path, rows: int, dim: int, clusters: int) -> None:
    """Rows around `clusters` directions; and as many initial centroids."""
    (path / "init").mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, dim, generator=generator)
    shards = list(enumerate(range(0, rows, SHARD_ROWS)))
    for number, start in track(shards, "making rows", console=Console(stderr=True)):
        count = min(SHARD_ROWS, rows - start)
        near = torch.randint(clusters, (count,), generator=generator)
        x = centres[near].add_(torch.randn(count, dim, generator=generator))
        with open(path / f"rows_{number:04d}.npy", "wb") as file:
            np.save(file, torch.nn.functional.normalize(x).half().numpy())
            file.flush()
            os.fsync(file.fileno())
    np.save(
        path / "init" / "init.npy",
        (centres + torch.randn(clusters, dim, generator=generator)).numpy(),
    )


def forget(path: Path) -> None:
    """Drop the files from the page cache."""
    for file in path.glob("*.npy"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(blocks: Iterator[int]) -> tuple[int, float]:
    """Rows, and seconds they took."""
    began = time.perf_counter()
    return sum(blocks), time.perf_counter() - began


def measure(data: Path, clusters: int, output: Path) -> dict[str, Any]:
    init = data / "init" / "init.npy"
    config = ClusterConfig(clusters=clusters, passes=1, tolerance=0, init=str(init))
    source = Source(data)
    load = [load_average()]
    forget(data)
    read = timed(len(block.rows) for block in source.blocks())
    centroids = Centroids(torch.from_numpy(np.load(init)))
    block = next(iter(source.blocks())).rows

    def searches() -> Iterator[int]:
        until = time.perf_counter() + ALONE_SECONDS
        while time.perf_counter() < until:
            yield len(centroids.nearest(block)[0])

    before = timed(searches())
    forget(data)
    result = cluster(config, data, output, overwrite=True, console=Console(stderr=True))
    after = timed(searches())
    search = (before[0] + after[0], before[1] + after[1])
    whole = (source.rows, result["passes"][0]["seconds"])
    load.append(load_average())
    return {
        "benchmark": "cluster_stream",
        "rows": source.rows,
        "dim": source.dim,
        "clusters": clusters,
        "machine": describe_machine(),
        "load_average": load,
        "rows_per_second": {
            name: rows / seconds
            for name, (rows, seconds) in (("read", read), ("search", search), ("pass", whole))
        },
        "pass_seconds": whole[1],
        "label_seconds": result["label_seconds"],
        "objective": result["objective"],
        "peak_bytes": status_bytes("VmHWM"),
    }


def table(result: dict[str, Any]) -> Table:
    rates = result["rows_per_second"]
    dim, clusters = result["dim"], result["clusters"]
    names = {
        "read": "reading alone, from disk",
        "search": "nearest centroids alone, rows in memory",
        "pass": "a whole pass, from disk",
    }
    lines = [
        [
            title,
            f"{rates[name]:,.0f}",
            f"{rates[name] * dim * 2 / 1e6:,.0f}" if name != "search" else "",
            f"{rates[name] * dim * clusters * 2 / 1e9:,.0f}" if name != "read" else "",
            f"{rates['pass'] / rates[name]:.2f}",
        ]
        for name, title in names.items()
    ]
    return Table(
        f"{result['rows']:,} x {dim} rows (fp16) into {clusters:,} clusters",
        ["", "rows / s", "MB / s", "GFLOP/s", "rate of the pass against it"],
        lines,
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rows", type=click.IntRange(min=1), default=10_000_000)
@click.option("--dim", type=click.IntRange(min=1), default=256)
@click.option("--clusters", type=click.IntRange(min=1), default=10_000)
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), default="build/cluster_stream",
    help="Where the rows are made, 2 bytes a value; deleted in the end unless --keep.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the rows for another time.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results",
)  # fmt: skip
@click.option("--name", default="cluster-stream", help="Of the files that are written.")
def main(
    rows: int, dim: int, clusters: int, data: Path, keep: bool, output: Path, name: str
) -> None:
    """Measure reading, searching, and a pass that does both. Writes NAME.json and NAME.md."""
    data = data / f"{rows}x{dim}-{clusters}"
    if not (data / "init" / "init.npy").exists():
        make_rows(data, rows, dim, clusters)
    result = measure(data, clusters, data / "out")
    shutil.rmtree(data / "out" if keep else data)
    shown = table(result)
    Console().print(shown.rich())
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    machine = result["machine"]
    (output / f"{name}.md").write_text(
        f"# Clustering from disk\n\n- {machine['cpu']}, {machine['cores']} cores, kernels for "
        f"{machine['capability']}; commit {machine['git_commit']}; {machine['date']}\n"
        f"- load average {result['load_average'][0]:.1f} before and "
        f"{result['load_average'][1]:.1f} after\n"
        f"- the pass took {result['pass_seconds']:.1f} s; peak memory of the process "
        f"{result['peak_bytes'] / 2**30:.2f} GiB\n\n{shown.markdown()}"
    )


if __name__ == "__main__":
    main()
