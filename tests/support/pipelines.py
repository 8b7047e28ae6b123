"""A folder of small photographs, and a pipeline over it that is over in a second."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from unicom_ext.pipeline import run
from unicom_ext.pipeline.config import PipelineConfig


def photographs(
    root: Path, classes: int = 6, of_each: int = 6, captions: bool = False, labelled: bool = True
) -> None:
    """JPEGs of 32 pixels: a colour for each class, with noise. Classes are folders."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        colour = rng.integers(40, 216, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        for i in range(of_each):
            pixels = np.clip(colour + rng.integers(-120, 121, colour.shape), 0, 255)
            path = root / (f"class {c}/{i}.jpg" if labelled else f"{c}-{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if captions:
                path.with_suffix(".txt").write_text(f"picture of colour number {c}")


def tables(root: Path, **changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of a pipeline over `photographs`, with those of some tables added or changed."""
    found: dict[str, dict[str, Any]] = {
        "data": {"data": str(root), "test_fraction": 0.34},
        "extract": {"encoder": "pixels", "dim": 4, "thumbnails": 0, "workers": 0},
        "cluster": {"clusters": 5, "passes": 2, "threads": 1},
        "train": {
            "encoder": "small-rgb", "embedding_size": 8, "width": 2, "epochs": 1, "batch_size": 12,
            "dims": [4, 8], "baselines": [], "evaluate_every": 0, "checkpoint_every": 1,
            "workers": 0, "threads": 1,
        },
        "finetune": {"learning_rate": 1e-3},
    }  # fmt: skip
    for table, values in changed.items():
        found[table] = {**found.get(table, {}), **values}
    return found


def run_pipeline(output: Path, settings: dict[str, Any], **options: Any) -> tuple[Any, str]:
    """What `run.run` returns, and what it has printed."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    found = run.run(PipelineConfig.from_mapping(settings), output, console=console, **options)
    return found, text.getvalue()
