"""Activation checkpointing and losses from the meta device, with classes on several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from unicom_ext import PartialMarginSoftmax

C, D, B = 301, 16, 6


def make(group, **options):
    rates = {"sample_rate": 0.2, "feature_rate": 0.5}
    return PartialMarginSoftmax(D, C, process_group=group, seed=4, **rates, **options)


def batch(rank, number=0):
    generator = torch.Generator().manual_seed(10 * number + rank)
    x = torch.randn(B, D, generator=generator)
    return x.requires_grad_(), torch.randint(C, (B,), generator=generator)


def gradients_with_and_without(group, uneven_batches):
    results = []
    for repeated in (False, True):
        loss_fn = make(group, uneven_batches=uneven_batches)
        of_run = []
        for first in (0, 2):
            losses = []
            for number in (first, first + 1):
                x, labels = batch(dist.get_rank(group), number)
                if repeated:
                    losses.append(checkpoint(loss_fn, x, labels, use_reentrant=False))
                else:
                    losses.append(loss_fn(x, labels))
                of_run.append(x)
            for loss in losses:
                loss.backward()
        of_run = [x.grad for x in of_run] + [loss_fn.weight.grad, loss_fn.step]
        results.append(of_run)
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("uneven_batches", [True, False])
def test_gradients_are_those_without(ranks, world_size, uneven_batches):
    for same in ranks.run(world_size, gradients_with_and_without, uneven_batches):
        assert same == [True] * 6


def same_labels_twice_on_one_rank(group):
    loss_fn = make(group)
    losses = []
    for number in (0, 1):
        x, labels = batch(dist.get_rank(group), number if dist.get_rank(group) else 0)
        losses.append(checkpoint(lambda x, y: loss_fn(x * 1, y), x, labels, use_reentrant=False))
    try:
        losses[0].backward()
    except RuntimeError as error:
        return str(error)
    return None


def test_every_rank_raises_where_one_cannot_tell(ranks):
    first, second = ranks.run(2, same_labels_twice_on_one_rank)
    assert "but 2 of the calls that may be repeated had these labels" in first
    assert "rank 0" in second


def from_meta(group):
    loss_fn = make(group, device="meta").to_empty(device="cpu")
    x, labels = batch(dist.get_rank(group))
    try:
        loss_fn(x, labels)
        before = None
    except RuntimeError as error:
        before = str(error)
    loss_fn.reset_parameters()
    return before, float(loss_fn(x, labels)), float(make(group)(x, labels))


def test_from_meta_to_the_start(ranks):
    for before, loss, expected in ranks.run(2, from_meta):
        assert "have no values: call reset_parameters()" in before
        assert loss == expected
