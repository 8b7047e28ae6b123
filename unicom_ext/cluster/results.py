"""What a clustering leaves behind: labels, centroids, clusters.json and pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unicom_ext.cluster import pictures
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.cluster.labels import LabelFiles, sha256
from unicom_ext.cluster.lloyd import Totals
from unicom_ext.cluster.outputs import CLUSTERS
from unicom_ext.cluster.quality import quality
from unicom_ext.data.source import Source
from unicom_ext.utils.files import write_file
from unicom_ext.utils.versions import versions

MEMBERS = 2  # stream of random numbers that chooses the clusters to show


def write(
    output: Path,
    source: Source,
    config: ClusterConfig,
    labels: LabelFiles,
    centroids: Tensor,
    totals: Totals,
    sizes: Tensor,
    scores: Tensor,
    numbers: np.ndarray,
    positives: LabelFiles | None,
    facts: dict[str, Any],
    true_labels: np.ndarray | None,
    images: np.ndarray | None,
    console: Console,
) -> dict[str, Any]:
    """Write every file, and return clusters.json.

    labels     of every row, by centroid; sizes and scores [k] float64: rows, and sum of cosines
    numbers    the new number of each centroid, -1 for those that are dissolved
    positives  where they were written, by the new numbers; they are moved from there
    facts      goes into clusters.json as it is
    """
    kept = torch.from_numpy(numbers >= 0)
    final = LabelFiles(output)
    checksums = {}
    own_positives = LabelFiles(output, config.positives)
    for shard in source.shards:  # of other labels, where a run goes on
        own_positives.path(shard).unlink(missing_ok=True)
    for shard in source.shards:
        own = labels.read(shard)
        own = np.where(own >= 0, numbers[own], -1).astype(own.dtype)
        path = final.path(shard)
        write_file(path, partial(np.save, arr=own))
        checksums[path.name] = sha256(path)
        if positives is not None:
            path = positives.path(shard).replace(own_positives.path(shard))
            checksums[path.name] = sha256(path)
    values = centroids[kept].numpy()
    write_file(output / "centroids.npy", lambda file: np.save(file, values))
    checksums["centroids.npy"] = sha256(output / "centroids.npy")

    whole_sizes = sizes[kept].long()
    clustered = int(whole_sizes.sum())
    result = {
        "config": config.to_dict(),
        "source": source.describe(),
        "images": source.images,
        "rows": {
            "clustered": clustered,
            "zero": totals.zero,
            "not_finite": totals.not_finite,
            "dissolved": totals.rows - clustered,
        },
        "clusters": len(whole_sizes),
        "dissolved": int((~kept).sum()),
        "empty": int((whole_sizes == 0).sum()),
        "objective": float(scores[kept].sum()) / max(clustered, 1),
        **facts,
        "quality": _quality(source, final, true_labels),
        "pictures": _pictures(
            output, source, final, whole_sizes.numpy(), facts["passes"], images, config, console
        ),
        "sizes": whole_sizes.tolist(),
        "versions": versions(),
        "sha256": checksums,
    }
    text = json.dumps(result, indent=1).encode()
    write_file(output / CLUSTERS, lambda file: file.write(text))
    return result


def summary(result: dict[str, Any]) -> list[str]:
    """A result as `cluster` returns it, in a few lines."""
    rows, k = result["rows"], result["clusters"]
    bad = [f"{rows[name]:,} {name.replace('_', ' ')}" for name in rows if name != "clustered"]
    lines = [
        f"{rows['clustered']:,} rows in {k:,} clusters; labelled -1: {', '.join(bad)}",
        f"objective {result['objective']:.6f} after {len(result['passes'])} passes"
        + (", converged" if result["converged"] else ""),
    ]
    if (several := result["config"].get("positives", 1)) > 1:
        lines.append(f"the {several} nearest clusters of each row: positives_*.npy")
    if result["config"].get("rows_per_cluster", 0) and result["passes"]:
        lines.append(f"trained on a sample of {result['passes'][-1]['rows']:,} rows")
    if "loss" in (two := result["two_level"] or {}):
        lines.append(
            f"two levels: {100 * two['loss']:.3f} % below the nearest of all centroids, measured "
            f"on {two['rows']:,} rows"
        )
    if (found := result["quality"]) is not None:
        lines.append(
            f"NMI {found['nmi']:.4f}, purity {found['purity']:.4f}, conflict "
            f"{found['conflict']:.4f} on {found['rows']:,} rows with true labels"
        )
    return lines


def _quality(
    source: Source, labels: LabelFiles, true: np.ndarray | None
) -> dict[str, float] | None:
    if true is None:
        return None
    pieces = ((labels.read(s), np.asarray(true[s.first : s.first + s.rows])) for s in source.shards)
    found = quality(pieces)
    return found._asdict() if found.rows else None  # no row has both, and JSON has no NaN


def _pictures(
    output: Path,
    source: Source,
    labels: LabelFiles,
    sizes: np.ndarray,
    passes: list[dict[str, Any]],
    images: np.ndarray | None,
    config: ClusterConfig,
    console: Console,
) -> list[str]:
    members = None
    if images is not None:
        members = _members(source, labels, sizes, images, config.seed)
    try:
        return pictures.draw(output, sizes, passes, members)
    except ModuleNotFoundError as error:
        console.print(f"No pictures: {error.name} is not installed.")
        return []


def _members(
    source: Source, labels: LabelFiles, sizes: np.ndarray, images: np.ndarray, seed: int
) -> list[tuple[int, np.ndarray]]:
    """Images of the first members of some random clusters."""
    rng = np.random.default_rng([seed, MEMBERS])
    some = np.flatnonzero(sizes > 0)
    some = np.sort(rng.choice(some, min(pictures.SHOWN_CLUSTERS, len(some)), replace=False))
    rows: dict[int, list[int]] = {int(c): [] for c in some}
    for shard in source.shards:
        own = labels.read(shard)
        for at in np.flatnonzero(np.isin(own, some)).tolist():
            if len(rows[int(own[at])]) < pictures.SHOWN_MEMBERS:
                rows[int(own[at])].append(shard.first + at)
        if all(len(r) == pictures.SHOWN_MEMBERS for r in rows.values()):
            break
    return [(c, np.asarray(images[r])) for c, r in rows.items()]
