"""Which cases of a product of parameters to run: enough that every pair of values meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, object]], kept: set[int]) -> set[int]:
    """Positions of cases, those that are kept anyway among them, in which any two values of two
    parameters occur together that do so at all. Greedy: always the first of those with the most
    pairs that are missing.

    Values are the same if they are one object, as those of one list of parameters are.
    """
    pairs = [set(combinations(sorted((k, id(v)) for k, v in case.items()), 2)) for case in cases]
    missing = set().union(*pairs).difference(*(pairs[i] for i in kept))
    chosen = set(kept)
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.add(best)
    return chosen
