"""What a pipeline found, as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from unicom_ext.pipeline.steps import Finetune, Train

_ENCODERS = {Train.directory: "pseudo-classes (zero-shot)", Finetune.directory: "fine-tuned"}


def table(figures: dict[str, Any]) -> Table:
    """Recall@1 at each dimension, and mAP@R at the most, of the baselines and of each encoder.

    figures: as evaluation/figures.json has them.
    """
    rows = dict(figures["baselines"])
    rows |= {name: figures[key] for key, name in _ENCODERS.items() if key in figures}
    dims = [result["dim"] for result in figures[Train.directory]]
    asked = figures[Train.directory][0]["num_queries"]
    grid = Table(title="Recall@1 on unseen classes", caption=f"{asked:,} queries")
    grid.add_column("dimensions")
    for dim in dims:
        grid.add_column(str(dim), justify="right")
    grid.add_column(f"mAP@R at {dims[-1]}", justify="right")
    for name, results in rows.items():
        of_dim = {result["dim"]: result for result in results}
        recall = [of_dim[dim]["recall"]["1"] if dim in of_dim else None for dim in dims]
        precision = of_dim[dims[-1]]["map_at_r"] if dims[-1] in of_dim else None
        cells = ("-" if value is None else f"{value:.3f}" for value in (*recall, precision))
        grid.add_row(name, *cells)
    return grid
