"""Retrieval of the test classes: by the model, and by what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from unicom_ext import retrieval
from unicom_ext.data import baselines
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.train.config import Config
from unicom_ext.utils.settings import ConfigError

RECALL_AT = (1, 5, 10)


def evaluate(
    embeddings: Tensor,
    test_set: Glyphs,
    dims: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Results of embeddings [n, d] of the images of `test_set`, one for each of dims, for JSON."""
    labels = torch.from_numpy(test_set.labels)
    results = retrieval.evaluate(
        embeddings, labels, dims=list(dims), ks=RECALL_AT, process_group=group
    )
    return [_plain(r) for r in results]


def _plain(result: retrieval.Result) -> dict[str, Any]:
    """With strings for keys, as JSON has them."""
    by_k = {
        name: {str(k): value for k, value in getattr(result, name).items()}
        for name in ("recall", "map_at_k")
    }
    return {**result._asdict(), **by_k}


def evaluate_baselines(
    config: Config, train_set: Glyphs, test_set: Glyphs, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """What the images can be retrieved by without our model: results by name."""
    found = {}
    for name in config.baselines:
        try:
            embeddings = baselines.BASELINES[name](
                train_set.images, train_set.first_labels, test_set.images, config.dims[-1]
            )
        except ValueError as error:
            raise ConfigError(f"baselines: {name} is not possible here: {error}") from error
        found[name] = evaluate(embeddings, test_set, config.dims)
        best = max(result["recall"]["1"] for result in found[name])
        console.print(f"To beat: {name}, Recall@1 {best:.3f} at its best dimension")
    return found
