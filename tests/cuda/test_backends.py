"""How tests call a GPU: the same forwarding, over copies on the CPU. Without it a slip there would
show on a GPU only, as failures of the operators."""

from __future__ import annotations

import pytest
import torch
from support import backends
from support.problems import random_problem, solve

from unicom_ext import PartialMarginSoftmax
from unicom_ext.cluster import Centroids, UnitSums
from unicom_ext.loss.functional import partial_margin_softmax
from unicom_ext.optim import RowAdamW, RowSGD


def a_loss():
    return solve(partial_margin_softmax, random_problem(20, 60, 17, sampled=30, precision="fp32"))


def steps_of(make, inside: bool):
    """Mutable arguments, some of them absent; with and without those that have a default."""

    def run():
        loss_fn = PartialMarginSoftmax(8, 50, sample_rate=0.3, sparse_grad=True, seed=1)
        with torch.no_grad():
            loss_fn.weight.copy_(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
        optimizer = make([loss_fn.weight])
        if inside:
            optimizer.update_in_backward(loss_fn)
        for step in range(3):
            x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
            loss_fn(x, torch.arange(12) * 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[loss_fn.weight]
        return [loss_fn.weight.detach(), *(v for v in state.values() if torch.is_tensor(v))]

    return run


def a_search():
    generator = torch.Generator().manual_seed(0)
    rows, values = (torch.randn(n, 9, generator=generator) for n in (40, 7))
    found = Centroids(values)
    index, score = found.nearest(rows)  # the guess has its default: it is not passed on
    again, _ = found.nearest(rows, index)
    sums = UnitSums(7, 9, rows=40)
    sums.add(rows, index)
    sums.add(rows, index.flip(0), index)
    return [index, score, again, sums.values, sums.counts, sums.directions()]


@pytest.mark.parametrize(
    "work",
    [
        a_loss,
        a_search,
        *(
            steps_of(make, inside)
            for inside in (False, True)
            for make in (
                lambda p: RowAdamW(p, lr=0.01),
                lambda p: RowSGD(p, lr=0.1),
                lambda p: RowSGD(p, lr=0.1, momentum=0.9),
            )
        ),
    ],
)
def test_what_comes_back_from_copies_is_what_was_computed(work, monkeypatch):
    right = work()
    backends.use(monkeypatch, "copies")
    for a, b in zip(work(), right, strict=True):
        assert torch.equal(a, b)
