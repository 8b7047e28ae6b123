"""Options that are wrong or others on one rank: every rank raises, and none waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unicom_ext import ArcFace, CosFace, PartialMarginSoftmax, functional, sharding


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


SETTINGS = [
    {"margin": ArcFace(0.5)},
    {"margin": CosFace(0.3)},
    {"scale": 16.0},
    {"interclass_filter": 0.4},
    {"margin_grad": "exact"},
    {"beyond_pi": "linear"},
    {"precision": "bf16"},
    {"reduction": "sum"},
    {"ignore_index": -1},
    {"grad_average": False},
    {"sample_rate": 0.5},
    {"feature_rate": 0.5},
    {"seed": 7},
    {"want_metrics": True},
]


def settings_that_differ(group):
    """What this rank raises where the second one has another value set, and in a call that gives
    another margin; then the losses of all once it is set back."""
    module = PartialMarginSoftmax(6, 50, process_group=group, sample_rate=0.3, feature_rate=0.7)
    second = dist.get_rank(group) == 1
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), torch.arange(4)

    def raised(**options):
        with pytest.raises(ValueError, match="must be the same on every rank") as caught:
            module(*batch, **options)
        return str(caught.value)

    messages = []
    for setting in SETTINGS:
        ((name, value),) = setting.items()
        before = getattr(module, name)
        if second:
            setattr(module, name, value)
        messages.append(raised())
        setattr(module, name, before)
    messages.append(raised(margin=ArcFace(0.4) if second else None))
    return messages, int(module.step), module(*batch).item()


def test_settings_that_differ_since(ranks):
    """A silent wrong loss else: each rank adds up its own part of the softmax."""
    (messages, *end), *others = ranks.run(2, settings_that_differ)
    assert others == [(messages, *end)]
    names = {"sample_rate": "num_sampled", "feature_rate": "num_features"}
    for setting, message in zip([*SETTINGS, {"margin": None}], messages, strict=True):
        (name,) = setting
        assert message.startswith(f"{names.get(name, name)} must be the same on every rank, got ")
    assert end[0] == 0
