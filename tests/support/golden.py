"""Results of a published implementation, and the problems that they answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from support.problems import Problem
from unicom_ext.margins import CombinedMargin

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.npz"))


def load(path: Path) -> tuple[Problem, dict[str, np.ndarray]]:
    golden = dict(np.load(path))
    problem = Problem(
        *(torch.from_numpy(golden[name]) for name in ("embeddings", "labels", "prototypes")),
        options={
            "margin": CombinedMargin(*(float(golden[name]) for name in ("m1", "m2", "m3"))),
            "scale": float(golden["scale"]),
            "class_index": torch.from_numpy(golden["class_index"]).sort().values,
            "feature_index": torch.from_numpy(golden["feature_index"]).sort().values,
            "interclass_filter": float(golden["filter_threshold"]) or None,
            "reduction": "none",
        },
    )
    return problem, golden
