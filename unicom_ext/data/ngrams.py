"""Features of short texts without a neural network: their character n-grams."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTHS = (2, 3, 4)
BUCKETS = 1 << 14
_AT_ONCE = 10_000  # texts whose n-grams are in memory


class NGrams:
    """Counts of character 2- to 4-grams, hashed, weighted by rarity (TF-IDF), and projected on
    random directions, which keeps cosines up to 1 / sqrt(dim).

    Args:
        dim: of the features.
        seed: of the directions.
    """

    def __init__(self, dim: int = 128, seed: int = 0) -> None:
        self.dim = dim
        generator = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(BUCKETS, dim, generator=generator)
        self._rarity: Tensor | None = None

    def fit(self, texts: Iterable[str]) -> None:
        """Learn in how many of all the texts, at least one, each n-gram is."""
        texts_with = torch.zeros(BUCKETS, dtype=torch.int64)
        total, rest = 0, iter(texts)
        while part := list(islice(rest, _AT_ONCE)):
            _, bucket, _ = _counted(part)
            texts_with += bucket.bincount(minlength=BUCKETS)
            total += len(part)
        if total == 0:
            raise ValueError("texts: got none, must be at least one to fit on")
        self._rarity = (total / texts_with.clamp(min=1)).log()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [n, dim], of norm 1, or 0 where nothing in a text is rare.

        Features of a text do not depend on the others. Raises RuntimeError before `fit`.
        """
        if self._rarity is None:
            raise RuntimeError("NGrams: fit(texts) comes first")
        if not texts:
            return torch.empty(0, self.dim)
        of_text, bucket, count = _counted(texts)
        weight = count.sqrt() * self._rarity[bucket]
        # A weighted sum of directions for each text, whose n-grams stand side by side.
        first = torch.searchsorted(of_text, torch.arange(len(texts)))
        summed = F.embedding_bag(
            bucket, self._directions, first, mode="sum", per_sample_weights=weight
        )
        return F.normalize(summed)


def _counted(texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Which texts (increasing) have an n-gram of which bucket, and how often; each pair once."""
    texts_of: list[int] = []
    buckets: list[int] = []
    for i, text in enumerate(texts):
        padded = f" {text} "
        for n in LENGTHS:
            for at in range(len(padded) - n + 1):
                texts_of.append(i)
                buckets.append(zlib.crc32(padded[at : at + n].encode()) % BUCKETS)
    key = torch.tensor(texts_of) * BUCKETS + torch.tensor(buckets)
    key, count = key.unique(return_counts=True)
    return key // BUCKETS, key % BUCKETS, count
