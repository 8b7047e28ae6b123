"""Initial centroids, drawn from a sample of the rows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.cluster.engines import Engine
from unicom_ext.cluster.source import Rows, SourceError

ROWS_PER_CLUSTER = 32  # of the sample, unless it would be larger than
SAMPLE_BYTES = 512 << 20


def unit_sample(source: Rows, count: int, rng: np.random.Generator) -> Tensor:
    """Unit rows fp32 [<= count, d], a random part of the rows; those without direction left out."""
    rows = np.arange(source.rows)
    if count < source.rows:
        rows = np.sort(rng.choice(source.rows, size=count, replace=False, shuffle=False))
    sample = source.take(rows)
    norm = torch.linalg.vector_norm(sample, dim=1)
    return F.normalize(sample[(norm > 0) & norm.isfinite()])


def draw(kind: str, source: Rows, k: int, rng: np.random.Generator, engine: Engine) -> Tensor:
    """k initial centroids, fp32 [k, d]. kind: "random" or "kmeans++"."""
    wanted = min(ROWS_PER_CLUSTER * k, SAMPLE_BYTES // (4 * source.dim))
    sample = unit_sample(source, max(wanted, 2 * k), rng)
    if len(sample) < k and source.rows > 2 * k:  # many rows are bad: look at all
        sample = unit_sample(source, source.rows, rng)
    if len(sample) < k:
        raise SourceError(f"clusters: got {k}, but only {len(sample)} rows are finite and not zero")
    if kind == "random":
        return sample[torch.from_numpy(rng.choice(len(sample), size=k, replace=False))]
    return kmeans_plus_plus(sample, k, rng, engine)


def kmeans_plus_plus(sample: Tensor, k: int, rng: np.random.Generator, engine: Engine) -> Tensor:
    """k of the unit rows [n, d], each drawn with probability proportional to its squared distance
    from those before (Arthur, Vassilvitskii, SODA 2007).

    From the ninth on several are drawn at a time, an eighth of the number so far, as k-means||
    does (Bahmani et al., arXiv:1203.6402): the n x k cosines are then computed in few, large calls.
    """
    chosen = [torch.tensor([int(rng.integers(len(sample)))])]
    # Squared distance of unit vectors, halved.
    distance = 1 - engine(sample[chosen[0]]).nearest(sample)[1].double()
    count = 1
    while count < k:
        # The smallest of -log(u) / p are draws without replacement with weights p.
        distance[chosen[-1]] = 0
        weight = distance.clamp(min=0).numpy()
        # Below, a row is a copy of a centroid up to rounding.
        weight[weight < 1e-7] = 0
        size = min(max(1, count // 8), k - count)
        if np.count_nonzero(weight) < size:
            found = count + np.count_nonzero(weight)
            raise SourceError(
                f"clusters: got {k}, but there are only {found} different rows in a sample of "
                f"{len(sample)}; ask for fewer clusters, or use init random"
            )
        with np.errstate(divide="ignore"):
            keys = rng.exponential(size=len(sample)) / weight
        picked = torch.from_numpy(np.sort(np.argpartition(keys, size - 1)[:size]))
        chosen.append(picked)
        count += size
        torch.minimum(
            distance, 1 - engine(sample[picked]).nearest(sample)[1].double(), out=distance
        )
    return sample[torch.cat(chosen)]
