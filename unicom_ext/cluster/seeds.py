"""Initial centroids, drawn from a sample of the rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster.engines import Engine
from unicom_ext.data.source import Rows
from unicom_ext.utils.arrays import SourceError

ROWS_PER_CLUSTER = 32  # of the sample, unless it would be larger than
SAMPLE_BYTES = 512 << 20
BATCH = 4096
SAME = 1e-7  # below, half a squared distance of fp32 rows is rounding


def unit_sample(source: Rows, count: int, rng: np.random.Generator) -> Tensor:
    """Unit rows fp32 [<= count, d], a random part of the rows; those without direction left out."""
    rows = np.arange(source.rows)
    if count < source.rows:
        rows = np.sort(rng.choice(source.rows, size=count, replace=False, shuffle=False))
    sample = source.take(rows)
    norm = torch.linalg.vector_norm(sample, dim=1)
    good = (norm > 0) & norm.isfinite()
    if not good.all():
        sample, norm = sample[good], norm[good]
    return sample.div_(norm[:, None])


def sample(source: Rows, k: int, per_cluster: int, rng: np.random.Generator) -> Tensor:
    """Unit rows fp32 [>= k, d] to draw k centroids from: `per_cluster` for each, unless that is too
    much for memory. Raises SourceError where there are fewer good rows than k."""
    wanted = min(per_cluster * k, SAMPLE_BYTES // (4 * source.dim))
    rows = unit_sample(source, max(wanted, 2 * k), rng)
    if len(rows) < k and source.rows > 2 * k:  # many rows are bad: look at all
        rows = unit_sample(source, source.rows, rng)
    if len(rows) < k:
        raise SourceError(f"clusters: got {k}, but only {len(rows)} rows are finite and not zero")
    return rows


def draw(kind: str, source: Rows, k: int, rng: np.random.Generator, engine: Engine) -> Tensor:
    """k initial centroids, fp32 [k, d], of a sample. kind: "random" or "kmeans++"."""
    return choose(kind, sample(source, k, ROWS_PER_CLUSTER, rng), k, rng, engine)


def choose(kind: str, rows: Tensor, k: int, rng: np.random.Generator, engine: Engine) -> Tensor:
    """k of the unit rows [n, d]; n is at least k."""
    if kind == "random":
        return rows[torch.from_numpy(rng.choice(len(rows), size=k, replace=False))]
    return kmeans_plus_plus(rows, k, rng, engine)


def kmeans_plus_plus(sample: Tensor, k: int, rng: np.random.Generator, engine: Engine) -> Tensor:
    """k of the unit rows [n, d], each drawn with probability proportional to its squared distance
    from those before it (Arthur, Vassilvitskii, SODA 2007).

    Many are drawn at a time, so that the n x k cosines come in few, large calls, and the result is
    distributed as if it were one by one: a row drawn by the distances before the batch is taken
    with probability (distance now) / (distance then). Twice as many are drawn as are wanted: where
    rows crowd, half of them are not taken, and one that is not costs little.
    """
    rows = [np.array([rng.integers(len(sample))])]
    count = 1
    # Squared distances of unit vectors, halved.
    nearest = engine(sample[rows[0]])
    there = sample.to(nearest.device)
    distance = 1 - nearest.nearest(there)[1].cpu().double().numpy()
    while count < k:
        distance[distance < SAME] = 0
        if not distance.any():
            raise SourceError(
                f"clusters: got {k}, but there are only {count} different rows in a sample of "
                f"{len(sample)}; ask for fewer clusters, or use init random"
            )
        drawn = rng.choice(
            len(sample), size=min(2 * (k - count), BATCH), p=distance / distance.sum()
        )
        near = (sample[drawn] @ sample[drawn].T).numpy()
        then, now = distance[drawn], distance[drawn]
        taken: list[int] = []
        for i in range(len(drawn)):
            if count + len(taken) < k and rng.random() * then[i] < now[i]:
                taken.append(i)
                now = np.minimum(now, 1 - near[i])
                now[now < SAME] = 0
        rows.append(drawn[taken])
        count += len(taken)
        closest = engine(sample[rows[-1]]).nearest(there)[1].cpu().double().numpy()
        np.minimum(distance, 1 - closest, out=distance)
        distance[rows[-1]] = 0
    return sample[np.concatenate(rows)]
