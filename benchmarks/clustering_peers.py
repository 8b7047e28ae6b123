"""Peers of `clustering.py`, each in a process of its own that loads NumPy and the peer alone.

    python benchmarks/clustering_peers.py NAME DATA PASSES OUTPUT

The rows are in memory before the clock starts. Centroids go to OUTPUT/centroids.npy, and the last
line that is printed is JSON: seconds of training and of labelling all rows, of each pass where the
peer tells, the version; or why it cannot run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Result = tuple[np.ndarray, dict[str, Any]]  # centroids, figures


def timed(step: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    result = step(*arguments, **named)
    return result, time.perf_counter() - began


def faiss(rows: np.ndarray, init: np.ndarray, passes: int) -> Result:
    from faiss import Kmeans

    k_means = Kmeans(rows.shape[1], len(init), **_faiss_settings(rows, passes))
    _, train = timed(k_means.train, rows, init_centroids=init)
    _, assign = timed(k_means.assign, rows)
    since_start = [stats["time"] for stats in k_means.iteration_stats]
    seconds = np.diff(since_start, prepend=0).tolist()
    return k_means.centroids, _figures(train, assign, seconds, "faiss-cpu")


def faiss_super(rows: np.ndarray, init: np.ndarray, passes: int) -> Result:
    """faiss' own pruned k-means, which takes no initial centroids."""
    from faiss import SuperKmeans

    k_means = SuperKmeans(rows.shape[1], len(init), **_faiss_settings(rows, passes))
    _, train = timed(k_means.train, rows)
    _, assign = timed(k_means.assign, rows)
    seconds = [stats["time"] for stats in k_means.iteration_stats]
    return k_means.centroids, _figures(train, assign, seconds, "faiss-cpu")


def _faiss_settings(rows: np.ndarray, passes: int) -> dict[str, Any]:
    return {
        "niter": passes,
        "spherical": True,
        "max_points_per_centroid": len(rows),  # all rows
        "min_points_per_centroid": 1,
    }


def superkmeans(rows: np.ndarray, init: np.ndarray, passes: int, flat: bool) -> Result:
    """In float32; takes no initial centroids. Flat: every row in every pass, and all the passes;
    otherwise what it does by itself with more than 100,000 rows."""
    from superkmeans import SuperKMeans

    whole = {
        "iters": passes,
        "sampling_fraction": 1.0,
        "max_points_per_cluster": len(rows),
        "early_termination": False,
    }
    k_means = SuperKMeans(
        len(init), rows.shape[1], hierarchical=not flat, angular=True,
        verbose=True,  # a line after each pass, when it is done: costs nothing that can be measured
        **(whole if flat else {}),
    )  # fmt: skip
    centroids, train = timed(k_means.train, rows)
    # assign_training_points takes longer than assign here, and is less exact.
    _, assign = timed(k_means.assign, rows, centroids)
    return centroids, _figures(train, assign, [], "superkmeans")


def _figures(train: float, assign: float, passes: list[float], package: str) -> dict[str, Any]:
    return {
        "train_seconds": train,
        "assign_seconds": assign,
        "pass_seconds": passes,
        "version": f"{package} {version(package)}",
    }


PEERS = {
    "faiss": faiss,
    "faiss-super": faiss_super,
    "superkmeans": partial(superkmeans, flat=True),
    "superkmeans-default": partial(superkmeans, flat=False),
}


def read_rows(data: Path) -> np.ndarray:
    """All shards in one array; beside it there is one shard at a time."""
    files = sorted(data.glob("*.npy"))
    counts, dims = zip(*(np.load(file, mmap_mode="r").shape for file in files), strict=True)
    rows = np.empty((sum(counts), dims[0]), np.float32)
    at = 0
    for file, count in zip(files, counts, strict=True):
        rows[at : at + count] = np.load(file)
        at += count
    return rows


def main(name: str, data: Path, passes: int, output: Path) -> None:
    try:
        centroids, figures = PEERS[name](
            read_rows(data), np.load(data / "init" / "init.npy"), passes
        )
    except ImportError as error:
        figures = {"skipped": str(error)}
    else:
        output.mkdir(parents=True, exist_ok=True)
        np.save(output / "centroids.npy", centroids)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
