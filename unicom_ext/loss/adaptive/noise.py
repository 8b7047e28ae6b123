"""Normal numbers by a counter: pure functions of (seed, step, position), without a state.

The words are mixed as in csrc/core/random.h, in int64, whose products wrap around as those of
uint64 do. Nothing here waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STREAM = 4  # among those of csrc/core/random.h


def standard_normal(seed: Tensor, step: Tensor, position: Tensor) -> Tensor:
    """Independent draws from N(0, 1), by Box and Muller.

    Args:
        seed, step: int64 scalars.
        position: int64 of any shape, in [0, 2**62).

    Returns:
        float64 like position. The logarithm and the cosine may differ in the last digit between
        kinds of devices.
    """
    key = _absorb(_absorb(torch.full_like(seed, _STREAM), seed), step)
    radius = torch.sqrt(-2 * torch.log(1 - _uniform(_absorb(key, 2 * position))))
    return radius * torch.cos(2 * math.pi * _uniform(_absorb(key, 2 * position + 1)))


def _uniform(word: Tensor) -> Tensor:
    """The upper 53 bits as a float64 in [0, 1)."""
    return _shift(word, 11).to(torch.float64) * 2.0**-53


def _absorb(key: Tensor, value: Tensor) -> Tensor:
    return _mix((key ^ value) + (0x9E3779B97F4A7C15 - 2**64))


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    word = (word ^ _shift(word, 27)) * (0x94D049BB133111EB - 2**64)
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """To the right, as if unsigned."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
