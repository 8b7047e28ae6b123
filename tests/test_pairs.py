"""The cases that are left of a product bring every pair of values together."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st
from support.pairs import covering


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_every_pair_is_covered_by_few(sizes, data):
    values = [[object() for _ in range(size)] for size in sizes]
    cases = [dict(enumerate(chosen)) for chosen in product(*values)]
    kept = data.draw(st.sets(st.integers(0, len(cases) - 1), max_size=3))
    chosen = covering(cases, kept)
    assert kept <= chosen

    def pairs(positions):
        return {pair for i in positions for pair in combinations(cases[i].items(), 2)}

    assert pairs(chosen) == pairs(range(len(cases)))
    largest = sorted(sizes)[-2:]
    assert len(chosen) <= len(kept) + 2 * largest[0] * largest[-1] * (len(sizes) > 1)
