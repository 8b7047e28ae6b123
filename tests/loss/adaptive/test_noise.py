"""Normal numbers by a counter."""

from __future__ import annotations

import math

import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unicom_ext.loss.adaptive.noise import standard_normal

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = 2**64


def absorbed(key: int, value: int) -> int:
    """SplitMix64 over whole numbers."""
    word = ((key ^ value % WORD) + 0x9E3779B97F4A7C15) % WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def by_hand(seed: int, step: int, position: int) -> float:
    key = absorbed(absorbed(4, seed), step)
    u, v = (absorbed(key, 2 * position + k) >> 11 for k in range(2))
    return math.sqrt(-2 * math.log(1 - u / 2**53)) * math.cos(2 * math.pi * v / 2**53)


def normal(seed: int, step: int, position: torch.Tensor) -> torch.Tensor:
    return standard_normal(torch.tensor(seed), torch.tensor(step), position)


@given(seed=INT64, step=INT64, start=st.integers(0, 2**61))
@settings(max_examples=40)
def test_is_what_whole_numbers_give(seed, step, start):
    position = start + torch.arange(5)
    right = torch.tensor([by_hand(seed, step, int(p)) for p in position], dtype=torch.float64)
    torch.testing.assert_close(normal(seed, step, position), right, rtol=1e-14, atol=1e-14)


def test_is_normal_and_independent():
    z = torch.stack([normal(s, t, torch.arange(20_000)) for s in (0, 1) for t in (0, 1, 2)])
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    correlation = torch.corrcoef(z)
    assert float((correlation - torch.eye(6)).abs().max()) < 4 / math.sqrt(20_000)
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 4 / math.sqrt(120_000)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_has_the_shape_of_the_positions(shape):
    assert normal(0, 0, torch.zeros(shape, dtype=torch.int64)).shape == shape
