"""Options of the function that are wrong on one rank: every rank raises, and none waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unicom_ext import ArcFace, functional, sharding


def bad_option(group, changes, uneven_batches):
    """What each rank raises when one has a bad option, and whether a good call follows."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    start, stop = sharding.class_range(50, world_size, rank)

    def call(**options):
        return functional.partial_margin_softmax(
            torch.ones(4, 6),
            torch.arange(4),
            torch.ones(stop - start, 6),
            **{"margin": ArcFace(0.3), "scale": 64.0, **options},
            uneven_batches=uneven_batches,
            process_group=group,
            num_classes=50,
        )

    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call(**changes if rank == 1 else {})
    return str(caught.value), bool(call().isfinite())


@pytest.mark.parametrize("uneven_batches", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "tf32"}, "precision must be one of ('auto', 'fp32', 'fp16', 'bf16'), got"),
        ({"scale": -1.0}, "scale must be a finite number > 0, got -1.0"),
        ({"margin": 0.3}, "margin must be a CombinedMargin such as ArcFace(0.3), got 0.3"),
        ({"reduction": "avg"}, "reduction must be one of ('mean', 'sum', 'none'), got 'avg'"),
    ],
    ids=str,
)
def test_a_bad_option_on_one_rank(ranks, changes, message, uneven_batches):
    for rank, (raised, again) in enumerate(ranks.run(3, bad_option, changes, uneven_batches)):
        assert message in raised
        assert raised.startswith("rank 1 of the process group raised") == (rank != 1)
        assert again
