"""Time spherical k-means: our whole command from disk, faiss and superkmeans with rows in memory.

    python benchmarks/clustering.py --kind clip
    python benchmarks/clustering.py --kind noise --rows 1000000 --dim 256 --clusters 10000

The peers are optional: pip install faiss-cpu superkmeans==0.2. Those that are not there are
skipped. All make the same number of passes over the same rows, ours and faiss from the same
centroids; the objective of each result is measured by the same exact search over all rows.
Of ours the time of the process counts, from its start to its end; of a peer that of training and
labelling alone. benchmarks/README.md says who is compared.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from clustering_peers import PEERS
from measure import describe_machine, load_average, status_bytes
from rich.console import Console
from tables import Table
from torch import Tensor

from unicom_ext.utils.files import list_files

RESULTS = Path(__file__).parent / "results"
SHARD_ROWS = 250_000
# Each of our methods, and the peers that do the same kind of work.
ALIKE = {
    "ours-lloyd": ["faiss", "faiss-super", "superkmeans"],
    "ours-two-level": ["superkmeans-default"],
}
TITLES = {"ours-lloyd": "All rows in every pass", "ours-two-level": "Coarse clusters first"}
# What the BLAS in faiss' wheel can be told to use, by OPENBLAS_CORETYPE; "" is its own choice.
BLAS = ("", "Haswell", "SkylakeX")
TRIAL_ROWS = 50_000  # on which the fastest of them is found

# Rows like CLIP's: a narrow cone, and variances that fall as a power of the axis' number.
CONE = 0.45  # squared cosine to the mean direction
POWER, FLAT_AXES = 1.2, 8


# ---- rows ----------------------------------------------------------------------------------------


def drawing(
    kind: str, dim: int, clusters: int, generator: torch.Generator
) -> Callable[..., Tensor]:
    """What draws n more rows [n, dim], not yet of unit length."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "clip":
        mean = F.normalize(normal(dim), dim=0)
        rotation = torch.linalg.qr(normal(dim, dim)).Q
        scale = (torch.arange(dim) + FLAT_AXES) ** (-POWER / 2)
        axes = math.sqrt(1 - CONE) * F.normalize(scale, dim=0)[:, None] * rotation
        return lambda n: math.sqrt(CONE) * mean + normal(n, dim) @ axes
    if kind == "centres":
        centres = normal(clusters, dim)
        return lambda n: (
            centres[torch.randint(clusters, (n,), generator=generator)] + normal(n, dim)
        )
    return lambda n: normal(n, dim)


def make_rows(path: Path, kind: str, rows: int, dim: int, clusters: int) -> None:
    """Unit rows in shards; and initial centroids, drawn from the rows."""
    (path / "init").mkdir(parents=True, exist_ok=True)
    draw = drawing(kind, dim, clusters, torch.Generator().manual_seed(0))
    first = []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        x = F.normalize(draw(count))
        np.save(path / f"rows_{number:04d}.npy", x.numpy())
        first.append(x[: -(-clusters * count // rows)].clone())
    np.save(path / "init" / "init.npy", torch.cat(first)[:clusters].numpy())


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


# ---- in processes of their own -------------------------------------------------------------------


def run_process(command: list[object], blas: str = "") -> dict[str, Any]:
    """Lines that a command prints, with the seconds since its start; its time and peak memory."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    if blas:
        environment["OPENBLAS_CORETYPE"] = blas
    arguments = [sys.executable, *map(str, command)]
    lines, peak = [], 0
    began = time.perf_counter()
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - began, line.rstrip()))
            with suppress(KeyError):  # it has ended meanwhile
                peak = max(peak, status_bytes("VmHWM", process.pid))
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return {"process_seconds": seconds, "peak_bytes": peak, "lines": lines}


def run_ours(name: str, data: Path, clusters: int, passes: int, output: Path) -> dict[str, Any]:
    method = {
        "ours-lloyd": [
            "--passes", passes, "--tolerance", 0, "--init", data / "init" / "init.npy",
        ],
        "ours-two-level": [
            "--method", "two-level", "--passes", 2, "--refine-passes", 1, "--init", "random",
        ],
    }  # fmt: skip
    run = run_process(
        ["-m", "unicom_ext", "cluster", data, "--output", output, "--overwrite", "--clusters",
         clusters, *method[name]],
    )  # fmt: skip
    result = json.loads((output / "clusters.json").read_text())
    # The first line comes when everything is open; one with a rate when a pass is done.
    ready = run["lines"][0][0]
    done = [seconds for seconds, line in run["lines"] if "rows/s" in line][-1]
    labels = result["label_seconds"]
    run["stages"] = {
        "start-up": ready,
        "k-means": done - labels - ready,
        "labels": labels,
        "results": run["process_seconds"] - done,
    }
    run["seconds"] = run["process_seconds"]
    run["passes"] = result["passes"]
    whole = name == "ours-lloyd"  # passes are alike, and nothing else is in "k-means"
    run["pass_seconds"] = [p["seconds"] for p in result["passes"]] if whole else []
    shares = [p.get("products") for p in result["passes"]]
    run["products"] = [share for share in shares if share is not None]
    return run


def run_peer(name: str, data: Path, passes: int, output: Path, blas: str = "") -> dict[str, Any]:
    script = Path(__file__).with_name("clustering_peers.py")
    run = run_process([script, name, data, passes, output], blas)
    run |= json.loads(run["lines"].pop()[1])
    if "skipped" in run:
        return run
    run["seconds"] = run["train_seconds"] + run["assign_seconds"]
    run["stages"] = {
        "start-up": run["process_seconds"] - run["seconds"],
        "k-means": run["train_seconds"],
        "labels": run["assign_seconds"],
    }
    if name == "superkmeans":  # it tells of a pass when it is done
        passed = [i for i, (_, line) in enumerate(run["lines"]) if line.startswith("Iteration ")]
        after = [run["lines"][i][0] for i in (passed[0] - 1, *passed)]
        run["pass_seconds"] = np.diff(after).tolist()
    return run


def try_blas(data: Path, folder: Path) -> dict[str, float]:
    """Seconds that faiss takes for two passes over some rows with each choice that works here."""
    rows = np.load(list_files(data, ".npy")[0], mmap_mode="r")[:TRIAL_ROWS]
    (folder / "init").mkdir(parents=True)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "init" / "init.npy", rows[: -(-len(rows) // 50)])
    seconds = {}
    for blas in BLAS:
        # A set of instructions that the CPU does not have ends the process.
        with suppress(subprocess.CalledProcessError):
            run = run_peer("faiss", folder, 2, folder / "out", blas)
            if "seconds" in run:
                seconds[blas] = run["seconds"]
    return seconds


# ---- the comparison ------------------------------------------------------------------------------


def compare(
    data: Path, clusters: int, passes: int, rounds: int, peers: list[str]
) -> dict[str, Any]:
    console = Console(stderr=True)
    names = [name for ours, alike in ALIKE.items() for name in (ours, *alike)]
    names = [name for name in names if name in (*ALIKE, *peers)]
    runs: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    load = [load_average()]
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        blas = try_blas(data, Path(folder) / "blas") if "faiss" in peers else {}
        best = min(blas, key=blas.__getitem__, default="")
        for number in range(rounds):
            for name in names:
                if name in skipped:
                    continue
                console.print(f"round {number + 1} of {rounds}: {name}")
                output = Path(folder) / name
                if name in ALIKE:
                    run = run_ours(name, data, clusters, passes, output)
                else:
                    is_faiss = name.startswith("faiss")
                    run = run_peer(name, data, passes, output, best if is_faiss else "")
                if "skipped" in run:
                    skipped[name] = run["skipped"]
                    continue
                del run["lines"]  # what they tell has been read, and they name folders
                run["objective"] = objective_of(data, output / "centroids.npy")
                runs.setdefault(name, []).append(run)
    load.append(load_average())
    return {
        "benchmark": "clustering",
        "clusters": clusters,
        "passes": passes,
        "rounds": rounds,
        "machine": describe_machine(),
        "load_average": load,
        "blas_seconds": blas,
        "blas": best,
        "skipped": skipped,
        "runs": runs,
    }


# ---- tables and picture --------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def share(run: dict[str, Any]) -> float | None:
    """Of all products, those that the passes have done; None where a result does not tell."""
    return statistics.mean(run["products"]) if run.get("products") else None


def tables(result: dict[str, Any]) -> list[Table]:
    """Who takes how long beside those of its kind, and where the time goes."""
    shown = []
    for ours, alike in ALIKE.items():
        own = result["runs"][ours]
        best = statistics.median(run["objective"] for run in own)
        lines = []
        for name in (ours, *alike):
            if not (runs := result["runs"].get(name)):
                continue
            pairs = zip(runs, own, strict=True)
            objective = statistics.median(run["objective"] for run in runs)
            shares = [s for run in runs if (s := share(run)) is not None]
            lines.append(
                [
                    name,
                    spread([run["seconds"] for run in runs]),
                    spread([run["seconds"] / mine["seconds"] for run, mine in pairs]),
                    spread([statistics.mean(s) for run in runs if (s := run["pass_seconds"])]),
                    f"{100 * statistics.median(shares):.1f} %" if shares else "",
                    f"{objective:.6f}",
                    f"{100 * (objective / best - 1):+.4f} %",
                    f"{max(run['peak_bytes'] for run in runs) / 2**30:.2f}",
                ]
            )
        header = [
            "", "s in all", "times ours", "s, mean pass", "products done", "objective",
            "against ours", "peak GiB",
        ]  # fmt: skip
        shown.append(Table(TITLES[ours], header, lines))
    stages = ["start-up", "k-means", "labels", "results"]
    lines = [
        [
            name,
            *(spread([run["stages"][s] for run in runs if s in run["stages"]]) for s in stages),
            spread([run["process_seconds"] for run in runs]),
        ]
        for name, runs in result["runs"].items()
    ]
    return [*shown, Table("Where the seconds go", ["", *stages, "whole process"], lines)]


def describe(result: dict[str, Any]) -> list[str]:
    """What was measured, on what and with which reservations: one line each."""
    machine, (before, after) = result["machine"], result["load_average"]
    versions = {run["version"] for runs in result["runs"].values() for run in runs[-1:]
                if "version" in run}  # fmt: skip
    lines = [
        title(result),
        f"{machine['cpu']}, {machine['cores']} cores, kernels for {machine['capability']}; "
        f"commit {machine['git_commit']}; {machine['date']}",
        f"interleaved rounds: {result['rounds']}, medians (min to max); load average {before:.1f} "
        f"before and {after:.1f} after",
        *sorted(versions),
    ]
    if after > 1.25 * machine["cores"]:
        lines.append("NOISY: other programs were running")
    if result["blas_seconds"]:
        tried = ", ".join(
            f"{b or 'its own choice'} {s:.2f}" for b, s in result["blas_seconds"].items()
        )
        lines.append(f"BLAS of faiss: {result['blas'] or 'its own choice'}; s in a trial: {tried}")
    lines += [f"SKIPPED {name}: {reason}" for name, reason in result["skipped"].items()]
    return lines


def title(result: dict[str, Any]) -> str:
    return (
        f"{result['kind']}: {result['rows']:,} x {result['dim']} rows into {result['clusters']:,} "
        f"clusters, {result['passes']} passes"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds of each pass; and the share of products that were done, where a result tells."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs = {n: r for n, r in result["runs"].items() if r[0]["pass_seconds"]}
    pruned = {n: r for n, r in runs.items() if r[0].get("products")}
    figure = Figure(figsize=(7, 7 if pruned else 4), layout="constrained")
    figure.suptitle(title(result))
    panels = figure.subplots(2 if pruned else 1, sharex=True, squeeze=False)[:, 0]
    ways = [("seconds", "pass_seconds", runs), ("share of products done", "products", pruned)]
    for axes, (label, key, drawn) in zip(panels, ways, strict=False):
        for name, values in drawn.items():
            median = np.median([run[key] for run in values], axis=0)
            axes.plot(range(1, len(median) + 1), median, "o-", label=name)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()
    panels[-1].set_xlabel("pass")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)


def parse_peers(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    peers = list(PEERS) if value == "all" else [name for name in value.split(",") if name]
    if unknown := [name for name in peers if name not in PEERS]:
        raise click.BadParameter(f"{', '.join(unknown)} not among {', '.join(PEERS)}")
    return peers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--kind", type=click.Choice(["clip", "centres", "noise"]), default="clip",
    help="Rows: a narrow cone with a power-law spectrum as CLIP's, isotropic around as many "
    "centres as clusters, or isotropic noise.",
)  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), default=200_000)
@click.option("--dim", type=click.IntRange(min=1), default=512)
@click.option("--clusters", type=click.IntRange(min=1), default=2_000)
@click.option("--passes", type=click.IntRange(min=1), default=10, help="Passes of each run.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Runs of each.")
@click.option(
    "--peers", callback=parse_peers, default="all", metavar="LIST",
    help=f"Of {', '.join(PEERS)}.",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), default="build/clustering",
    help="Where the rows are made; those of the same kind and size are used again.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results",
)  # fmt: skip
@click.option("--name", help="Of the files that are written.  [default: clustering-KIND]")
def main(
    kind: str, rows: int, dim: int, clusters: int, passes: int, rounds: int, peers: list[str],
    data: Path, output: Path, name: str | None,
) -> None:  # fmt: skip
    """Compare time, objective and peak memory. Writes NAME.json, NAME.md and NAME.png."""
    data = data / f"{kind}-{rows}x{dim}-{clusters}"
    if not (data / "init" / "init.npy").exists():
        make_rows(data, kind, rows, dim, clusters)
    result = {"kind": kind, "rows": rows, "dim": dim}
    result |= compare(data, clusters, passes, rounds, peers)
    shown = tables(result)
    for table in shown:
        Console().print(table.rich())
    name = name or f"clustering-{kind}"
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, output / f"{name}.png")
    lines = "\n".join(f"- {line}" for line in describe(result))
    text = "\n".join(table.markdown() for table in shown)
    (output / f"{name}.md").write_text(f"# Clustering\n\n{lines}\n\n{text}\n![]({name}.png)\n")


if __name__ == "__main__":
    main()
