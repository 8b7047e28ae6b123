"""Retrieval of the test images: by the model, and by what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from unicom_ext import retrieval
from unicom_ext.data import baselines
from unicom_ext.data.images.batches import ImageBatches, in_order
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts
from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.train.config import BASELINES, Config
from unicom_ext.utils.settings import ConfigError

RECALL_AT = (1, 5, 10)
RESAMPLES = 1000  # for the intervals of what counts
MOST_IMAGES = 50_000  # that baselines are computed of where the settings leave it open
GREY = Preprocessing(32, "L", (0.0,), (1.0,))  # what baselines look at
BLOCK = 512


def evaluate(
    query: Embedded,
    gallery: Embedded | None,
    dims: Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    bootstrap: int = 0,
) -> list[dict[str, Any]]:
    """Results at each of dims, for JSON; without a gallery each query among the others.

    bootstrap: resamples of the classes for 95 % intervals of the results; 0 for none.
    """
    if len(np.unique(query.images.labels)) < 2:
        bootstrap = 0  # nothing varies
    results = retrieval.evaluate(
        query.embeddings,
        torch.from_numpy(query.images.labels),
        None if gallery is None else gallery.embeddings,
        None if gallery is None else torch.from_numpy(gallery.images.labels),
        dims=list(dims),
        ks=RECALL_AT,
        process_group=group,
        bootstrap=bootstrap,
    )
    return [_plain(r) for r in results]


def _plain(result: retrieval.Result) -> dict[str, Any]:
    """With strings for keys and lists, as JSON has them."""
    by_k = {
        name: {str(k): value for k, value in getattr(result, name).items()}
        for name in ("recall", "map_at_k")
    }
    intervals = None
    if result.intervals is not None:
        intervals = {name: list(interval) for name, interval in result.intervals.items()}
    return {**result._asdict(), **by_k, "intervals": intervals}


def evaluate_baselines(
    config: Config, parts: Parts, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """What the images can be retrieved by without our model: results by name."""
    if parts.query is None or not config.baselines:
        return {}
    names, chosen = config.baselines, config.baselines != ("auto",)
    sets = [parts.train, parts.query, *([] if parts.gallery is None else [parts.gallery])]
    if not chosen:
        names = BASELINES
        count = sum(map(len, sets))
        if count > MOST_IMAGES:
            console.print(f"No baselines: {count:,} images are many to compute them of.")
            return {}
    pixels, sets = zip(*(_pixels(config, images) for images in sets), strict=True)
    found = {}
    for name in names:
        try:
            features = baselines.BASELINES[name](
                pixels[0], sets[0].first_labels, np.concatenate(pixels[1:]), config.dims[-1]
            )
        except ValueError as error:
            if chosen:
                raise ConfigError(f"baselines: {name} is not possible here: {error}") from error
            console.print(f"No {name}: {error}")
            continue
        query, *gallery = _cut(features, sets[1:])
        found[name] = evaluate(
            query, gallery[0] if gallery else None, config.dims, bootstrap=RESAMPLES
        )
        best = max(result["recall"]["1"] for result in found[name])
        console.print(f"To beat: {name}, Recall@1 {best:.3f} at its best dimension")
    return found


def _pixels(config: Config, images: ImageSet) -> tuple[np.ndarray, ImageSet]:
    """uint8 [n, 32, 32] of the images that can be read, and these."""
    batches = ImageBatches(images, GREY, BLOCK)
    pixels, indices = [], []
    for batch in in_order(batches, range(len(batches)), config.workers):
        pixels.append(batch.images[:, 0])
        indices.append(batch.indices)
    kept = torch.cat(indices).numpy()
    return torch.cat(pixels).numpy(), images if len(kept) == len(images) else images.take(kept)


def _cut(features: Tensor, sets: Sequence[ImageSet]) -> list[Embedded]:
    rows = features.split([len(images) for images in sets])
    return [Embedded(*each) for each in zip(rows, sets, strict=True)]
