"""The length of a nested selection of dimensions: a prefix, drawn by (seed, step) on the host."""

from __future__ import annotations

import torch

_MASK = 2**64 - 1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_STREAM = 0x6E65737465642121  # this draw's own, apart from those of classes and dimensions


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a graph has no integers of more than 64 bits"
)
def prefix_length(dim: int, mean: int, seed: int, step: int) -> int:
    """A length in [shortest, dim] whose mean over steps is `mean`, in [1, dim].

    shortest + (dim - shortest) u^a with u uniform in (0, 1) has the mean shortest + (dim -
    shortest) / (1 + a), for which a is chosen. It is rounded at random, up or down by how near it
    is, which keeps the mean.
    """
    low = shortest(mean)
    if low == mean:
        return mean
    bits = _mix(_mix((seed ^ _STREAM) & _MASK) ^ (step & _MASK))
    uniform, rounding = ((bits >> 32) + 0.5) / 2**32, (bits & 0xFFFFFFFF) / 2**32
    power = (dim - mean) / (mean - low)
    return min(int(low + (dim - low) * uniform**power + rounding), dim)


def shortest(mean: int) -> int:
    """An eighth of the mean. One dimension, where all cosines are 1 or -1, teaches nothing."""
    return min(mean, max(2, mean // 8))


def _mix(word: int) -> int:
    """splitmix64 (Steele, Lea and Flood)."""
    word = (word + _GOLDEN_RATIO) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
