"""Time spherical k-means: ours streaming from disk, faiss with all rows in memory.

    python benchmarks/clustering.py --rounds 2
    python benchmarks/clustering.py --rows 100000 --clusters 1000

Both start from the same centroids and make the same number of whole passes over the same rows; the
objectives of both results are then measured by the same exact search. Each runs in a process of its
own, because the BLAS that faiss brings chooses its kernels when it is loaded: it is timed as it
chooses by itself, and with each of the instruction sets it can be told to use (--blas).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measure import describe_machine, load_average, status_bytes
from rich.console import Console
from tables import Table

from unicom_ext.utils.files import list_files

RESULTS = Path(__file__).parent / "results"
SHARD_ROWS = 250_000
# What the BLAS in faiss' wheel can be told to use, by OPENBLAS_CORETYPE; "" is its own choice.
BLAS = {"": "its own choice", "Haswell": "AVX2", "SkylakeX": "AVX-512"}


def make_rows(path: Path, rows: int, dim: int, clusters: int, seed: int = 0) -> None:
    """Rows around `clusters` directions, as many at each on average, in shards; and as many initial
    centroids, drawn from the rows."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator)
    first = []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        near = torch.randint(clusters, (count,), generator=generator)
        x = centres[near] + torch.randn(count, dim, generator=generator)
        x = torch.nn.functional.normalize(x)
        np.save(path / f"rows_{number:04d}.npy", x.numpy())
        first.append(x[: -(-clusters * count // rows)])
    (path / "init").mkdir(exist_ok=True)
    np.save(path / "init" / "init.npy", torch.cat(first)[:clusters].numpy())


# ---- in processes of their own -------------------------------------------------------------------


def run_ours(data: Path, clusters: int, passes: int, output: Path) -> dict[str, Any]:
    from unicom_ext.cluster import ClusterConfig, cluster

    config = ClusterConfig(
        clusters=clusters, passes=passes, tolerance=0, init=str(data / "init" / "init.npy")
    )
    result = cluster(config, data, output, overwrite=True, console=Console(stderr=True))
    return {
        "seconds": [p["seconds"] for p in result["passes"]],
        "label_seconds": result["label_seconds"],
        "device": result["device"],
        "objective": result["objective"],
        "peak_bytes": status_bytes("VmHWM"),
    }


def run_faiss(data: Path, clusters: int, passes: int, output: Path) -> dict[str, Any]:
    import faiss

    files = list_files(data, ".npy")
    rows = np.concatenate([np.load(file) for file in files])
    k_means = faiss.Kmeans(
        rows.shape[1], clusters, niter=passes, spherical=True, verbose=False,
        max_points_per_centroid=len(rows), min_points_per_centroid=1,
    )  # fmt: skip
    began = time.perf_counter()
    k_means.train(rows, init_centroids=np.load(data / "init" / "init.npy"))
    total = time.perf_counter() - began
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "centroids.npy", k_means.centroids)
    after = np.array([s["time"] for s in k_means.iteration_stats])  # since the beginning
    return {
        "seconds": np.diff(after, prepend=0).tolist(),
        "total_seconds": total,
        "options": faiss.get_compile_options(),
        "version": faiss.__version__,
        "peak_bytes": status_bytes("VmHWM"),
    }


def in_process(which: str, blas: str, *arguments: object) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    if blas:
        environment["OPENBLAS_CORETYPE"] = blas
    command = [sys.executable, __file__, "--only", which, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def objective_of(data: Path, centroids: Path) -> float:
    """Mean cosine of all rows to their nearest centroid."""
    from unicom_ext.cluster import Centroids

    found = Centroids(torch.from_numpy(np.load(centroids)))
    total, rows = 0.0, 0
    for file in list_files(data, ".npy"):
        for block in torch.from_numpy(np.load(file)).split(65536):
            total += float(found.nearest(block)[1].sum(dtype=torch.float64))
            rows += len(block)
    return total / rows


# ---- the comparison ------------------------------------------------------------------------------


def compare(
    data: Path, rows: int, dim: int, clusters: int, passes: int, rounds: int, blas: list[str]
) -> dict[str, Any]:
    console = Console(stderr=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    load = [load_average()]
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        output = Path(folder)
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}: ours")
            run = in_process("ours", "", data, clusters, passes, output / "ours")
            runs.setdefault("ours", []).append(run)
            for name in blas:
                console.print(f"round {number + 1} of {rounds}: faiss, {BLAS[name]}")
                run = in_process("faiss", name, data, clusters, passes, output / f"faiss{name}")
                runs.setdefault(f"faiss, BLAS {BLAS[name]}", []).append(run)
        load.append(load_average())
        for name in blas:
            runs[f"faiss, BLAS {BLAS[name]}"][-1]["objective"] = objective_of(
                data, output / f"faiss{name}" / "centroids.npy"
            )
    return {
        "benchmark": "clustering",
        "rows": rows,
        "dim": dim,
        "clusters": clusters,
        "passes": passes,
        "machine": describe_machine(),
        "load_average": load,
        "runs": runs,
    }


def table(result: dict[str, Any]) -> Table:
    ours = result["runs"]["ours"]
    best = ours[-1]["objective"]
    flops = 2 * result["rows"] * result["dim"] * result["clusters"]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def ratios(runs: list[dict[str, Any]], of: Callable[[list[float]], float]) -> str:
        pairs = zip(runs, ours, strict=True)
        return spread([of(run["seconds"]) / of(own["seconds"]) for run, own in pairs])

    lines = []
    for name, runs in result["runs"].items():
        first = [run["seconds"][0] for run in runs]
        means = [statistics.mean(run["seconds"]) for run in runs]
        objective = runs[-1]["objective"]
        lines.append(
            [
                name,
                spread(first),
                ratios(runs, lambda seconds: seconds[0]),
                spread(means),
                ratios(runs, statistics.mean),
                f"{flops / statistics.median(means) / 1e9:,.0f}",
                f"{objective:.6f}",
                f"{100 * (objective / best - 1):+.4f} %",
                f"{max(run['peak_bytes'] for run in runs) / 2**30:.2f}",
            ]
        )
    return Table(
        f"{result['rows']:,} x {result['dim']} rows into {result['clusters']:,} clusters, "
        f"{result['passes']} passes",
        [
            "", "s, first pass", "times ours", "s, mean pass", "times ours", "GFLOP/s",
            "objective", "against ours", "peak GiB",
        ],
        lines,
    )  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds of each pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="pass", ylabel="seconds", xticks=range(1, result["passes"] + 1),
        title=f"{result['rows']:,} x {result['dim']} rows, {result['clusters']:,} clusters",
    )  # fmt: skip
    for name, runs in result["runs"].items():
        seconds = np.median([run["seconds"] for run in runs], axis=0)
        axes.plot(range(1, len(seconds) + 1), seconds, "o-", label=name)
        for number, value in enumerate(seconds, start=1):
            axes.annotate(f"{value:.1f}", (number, value), (0, 5), textcoords="offset points")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=130)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rows", type=click.IntRange(min=1), default=1_000_000)
@click.option("--dim", type=click.IntRange(min=1), default=256)
@click.option("--clusters", type=click.IntRange(min=1), default=10_000)
@click.option("--passes", type=click.IntRange(min=1), default=3, help="Passes of each run.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Runs of each.")
@click.option(
    "--blas", multiple=True, type=click.Choice(list(BLAS)), default=["SkylakeX"],
    help="OPENBLAS_CORETYPE for faiss; an empty word for its own choice. Can be repeated.",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), default="build/clustering",
    help="Where the rows are made; those of the same size are used again.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results",
)  # fmt: skip
@click.option("--name", default="clustering", help="Of the files that are written.")
def main(
    rows: int, dim: int, clusters: int, passes: int, rounds: int, blas: tuple[str, ...],
    data: Path, output: Path, name: str,
) -> None:  # fmt: skip
    """Compare time per pass, objective and peak memory. Writes NAME.json, NAME.md and NAME.png."""
    data = data / f"{rows}x{dim}-{clusters}"
    if not (data / "init" / "init.npy").exists():
        make_rows(data, rows, dim, clusters)
    result = compare(data, rows, dim, clusters, passes, rounds, list(blas))
    shown = table(result)
    Console().print(shown.rich())
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, output / f"{name}.png")
    machine = result["machine"]
    (output / f"{name}.md").write_text(
        f"# Clustering\n\n- {machine['cpu']}, {machine['cores']} cores, kernels for "
        f"{machine['capability']}; commit {machine['git_commit']}; {machine['date']}\n"
        f"- load average {result['load_average'][0]:.1f} before and "
        f"{result['load_average'][1]:.1f} after\n\n{shown.markdown()}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        run = {"ours": run_ours, "faiss": run_faiss}[sys.argv[2]]
        folder, k, count, place = sys.argv[3:]
        print(json.dumps(run(Path(folder), int(k), int(count), Path(place))))
    else:
        main()
