"""What a pipeline found, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

# By the directory of the step that trains it.
ENCODERS = {"pretrained": "pseudo-classes (zero-shot)", "finetuned": "fine-tuned"}


def rows(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Results by what found them: the baselines, then each encoder, the last one last.

    figures: as evaluation/figures.json has them.
    """
    encoders = {name: figures[key] for key, name in ENCODERS.items() if key in figures}
    return {**figures["baselines"], **encoders}


def table(figures: dict[str, Any]) -> Table:
    """Recall@1 at each dimension, and mAP@R at the most, of the baselines and of each encoder.

    figures: as evaluation/figures.json has them.
    """
    found = rows(figures)
    *_, last = found.values()
    dims, asked = [result["dim"] for result in last], last[0]["num_queries"]
    grid = Table(title="Recall@1 on unseen classes", caption=f"{asked:,} queries")
    grid.add_column("dimensions")
    for dim in dims:
        grid.add_column(str(dim), justify="right")
    grid.add_column(f"mAP@R at {dims[-1]}", justify="right")
    for name, results in found.items():
        of_dim = {result["dim"]: result for result in results}
        recall = [of_dim[dim]["recall"]["1"] if dim in of_dim else None for dim in dims]
        precision = of_dim[dims[-1]]["map_at_r"] if dims[-1] in of_dim else None
        cells = ("-" if value is None else f"{value:.3f}" for value in (*recall, precision))
        grid.add_row(name, *cells)
    return grid
