"""Time a training step of the head: ours, PartialFC v2, and the bare matrix products.

    python benchmarks/head_step.py --quick
    python benchmarks/head_step.py --preset 1m-b256 --rounds 20

See README.md beside this file for what is compared and how.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from candidates import CANDIDATES, PEERS, Candidate, Problem, Shape, Unavailable
from measure import (
    describe_machine,
    load_average,
    peak_memory,
    prepare,
    ratios,
    spans,
    summary,
    time_rounds,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import describe, make_tables, markdown

PRESETS = {
    "quick": Shape(20_000, 128, 256, sample_rate=0.1, feature_rate=0.5),
    "100k-b256": Shape(100_000, 256, 512, sample_rate=0.1, feature_rate=1.0),
    "100k-b4096": Shape(100_000, 4096, 512, sample_rate=0.1, feature_rate=1.0),
    "1m-b256": Shape(1_000_000, 256, 512, sample_rate=0.1, feature_rate=0.5),
}
RESULTS = Path(__file__).parent / "results"


def compare(
    name: str, shape: Shape, chosen: list[Candidate], rounds: int, threads: int, memory: bool
) -> dict[str, Any]:
    """Everything that is known of the candidates at a shape, as it goes into the JSON."""
    torch.set_num_threads(threads)
    steps = len(chosen) * (2 + rounds if memory else 1 + rounds)
    records = {
        c.name: {
            "name": c.name,
            "label": c.label,
            "description": c.description,
            "skipped": None,
            "memory": None,
        }
        for c in chosen
    }
    with _progress() as progress:
        bar = progress.add_task("", total=steps)

        def advance(what: str) -> None:
            progress.update(bar, description=what)
            progress.advance(bar)

        progress.update(bar, description="making prototypes")
        problem, heads = Problem(shape), {}
        for candidate in chosen:
            advance(f"preparing {candidate.name}")
            try:
                heads[candidate.name] = prepare(candidate, problem)
            except Unavailable as reason:
                records[candidate.name]["skipped"] = str(reason)

        load = [load_average()]
        seconds = time_rounds(heads, rounds, lambda name: advance(f"timing {name}"))
        load.append(load_average())
        del heads, problem
        gc.collect()

        for candidate in chosen:
            record = records[candidate.name]
            if memory and record["skipped"] is None and candidate.name != "gemm":
                advance(f"memory of {candidate.name}")
                record["memory"] = peak_memory(shape, candidate.name, threads)
        progress.update(bar, description="done", completed=steps)

    for key, phases in seconds.items():
        records[key]["seconds"] = phases
        records[key]["summary"] = {span: summary(v) for span, v in spans(phases).items()}
    peers = [c.name for c in chosen if not c.ours and c.name in seconds]
    return {
        "benchmark": "head_step",
        "name": name,
        "shape": shape.record(),
        "rounds": rounds,
        "threads": threads,
        "machine": describe_machine(),
        "load_average": load,
        "candidates": list(records.values()),
        "ratios": {
            c.name: {peer: ratios(seconds[c.name], seconds[peer]) for peer in peers}
            for c in chosen
            if c.ours
        },
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def parse_peers(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    names = PEERS if value == "all" else [name for name in value.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PEERS)}, or all")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="100k-b256",
    help="Sizes to begin with; the options below override them.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="The preset quick with 5 rounds: under two minutes.")
@click.option("--classes", type=click.IntRange(min=2), help="C, number of classes.")
@click.option("--batch", type=click.IntRange(min=1), help="B, embeddings per step.")
@click.option("--dim", type=click.IntRange(min=1), help="d, embedding size.")
@click.option(
    "--sample-rate", type=click.FloatRange(0, 1, min_open=True), help="Share of the classes."
)
@click.option(
    "--feature-rate", type=click.FloatRange(0, 1, min_open=True), help="Share of the dimensions."
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds to time.  [default: 10]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of torch.  [default: torch's own]"
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu",
    help="cuda: a grid of sizes on a GPU, see README.md; of the options --plan, --quick, "
    "--minutes, --rounds and --output count then.",
)  # fmt: skip
@click.option(
    "--plan", type=click.Choice(["all", "first", "peers", "rest", "chunk"]), default="all",
    help="On CUDA: which of the grid's sizes and peers.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=60.0,
    help="On CUDA: begin no further shape after this time.",
)  # fmt: skip
@click.option(
    "--peers", callback=parse_peers, default="all", metavar="LIST",
    help=f"Whom to compare with: a comma-separated list of {', '.join(PEERS)}.",
)  # fmt: skip
@click.option("--memory/--no-memory", default=True, help="Measure peak memory too.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results", help="Directory for the JSON and the Markdown.",
)  # fmt: skip
def main(
    preset: str,
    quick: bool,
    rounds: int | None,
    threads: int | None,
    device: str,
    plan: str,
    minutes: float,
    peers: list[str],
    memory: bool,
    output: Path,
    **sizes: float | None,
) -> None:
    """Time forward, backward and optimizer of our loss against PartialFC v2 and bare GEMMs.

    The candidates take turns in every round, and ratios are formed within a round. Writes
    NAME.json (every raw figure) and NAME.md to the output directory.
    """
    if device == "cuda":
        plan = "first" if quick and plan == "all" else plan
        return _on_cuda(output, plan, minutes, rounds or (10 if plan == "all" else 5))
    preset = "quick" if quick else preset
    sizes = {key: value for key, value in sizes.items() if value is not None}
    try:
        shape = Shape(**{**asdict(PRESETS[preset]), **sizes})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    name = preset if shape == PRESETS[preset] else _name(shape)
    chosen = [c for c in CANDIDATES if c.ours or c.name in peers]
    output.mkdir(parents=True, exist_ok=True)

    result = compare(
        name,
        shape,
        chosen,
        rounds or (5 if quick else 10),
        threads or torch.get_num_threads(),
        memory,
    )

    console = Console()
    for line in describe(result):
        console.print(line, highlight=False, markup=False)
    for table in make_tables(result):
        console.print(table.rich())
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / f"{name}.md").write_text(markdown(result))
    console.print(f"Written: {output / name}.json and {name}.md", highlight=False)


def _on_cuda(output: Path, plan: str, minutes: float, rounds: int) -> None:
    if not torch.cuda.is_available():
        raise click.UsageError("--device cuda needs a GPU, and torch finds none")
    import cuda_step
    from device import Cuda

    results = cuda_step.run(
        output,
        plan=cuda_step.PLANS[plan],
        minutes=minutes,
        rounds=rounds,
        where=Cuda(),
        say=lambda line: click.echo(line),
    )
    click.echo(f"Written: {output}/cuda.md, and a JSON file for each of {len(results)} runs")
    if failures := cuda_step.failures(results):
        raise click.ClickException("; ".join(failures))


def _name(shape: Shape) -> str:
    return (
        f"c{shape.classes}-b{shape.batch}-d{shape.dim}"
        f"-r{shape.sample_rate:g}-f{shape.feature_rate:g}"
    )


if __name__ == "__main__":
    main()
