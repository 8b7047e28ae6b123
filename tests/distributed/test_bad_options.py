"""Options that are wrong or others on one rank: every rank raises, and none waits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unicom_ext import ArcFace, CosFace, PartialMarginSoftmax, functional, sharding
from unicom_ext.distributed import failures


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


def settings_that_differ(group, uneven_batches):
    """What this rank raises where the second one has another value set, and in a call that gives
    another margin; then the losses of all once it is set back."""
    module = PartialMarginSoftmax(
        6, 50, process_group=group, sample_rate=0.3, feature_rate=0.7,
        uneven_batches=uneven_batches,
    )  # fmt: skip
    second = dist.get_rank(group) == 1
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), torch.arange(4)

    def raised(**options):
        with pytest.raises(ValueError, match="must be the same on every rank") as caught:
            module(*batch, **options)
        return str(caught.value)

    messages = []
    for name, value in _settings(uneven_batches):
        before = getattr(module, name)
        if second:
            setattr(module, name, value)
        messages.append(raised())
        setattr(module, name, before)
    messages.append(raised(margin=ArcFace(0.4) if second else None))
    return messages, int(module.step), module(*batch).item()


def _settings(uneven_batches):
    """With equal batches ranks may compute in different precisions."""
    pairs = [pair for setting in SETTINGS for pair in setting.items()]
    return [p for p in pairs if uneven_batches is not False or p[0] != "precision"]


@pytest.mark.parametrize("uneven_batches", [None, False])
def test_settings_that_differ_since(ranks, uneven_batches):
    """A silent wrong loss else: each rank adds up its own part of the softmax."""
    (messages, *end), *others = ranks.run(2, settings_that_differ, uneven_batches)
    assert others == [(messages, *end)]
    names = {"sample_rate": ["num_sampled"], "feature_rate": ["num_features"]}
    if uneven_batches is False:
        names |= {
            "margin": ["m2", "m3"], "margin_grad": ["exact_margin_grad"],
            "beyond_pi": ["linear_beyond_pi"], "interclass_filter": ["filter"],
        }  # fmt: skip
    for (name, _), message in zip(
        [*_settings(uneven_batches), ("margin", None)], messages, strict=True
    ):
        told = message.removesuffix(" on rank 1").partition(" must be the same on every rank, got ")
        assert told[0] in names.get(name, [name])
    assert end[0] == 0


def one_rank_ahead(group, seen_at_once):
    """Its step is another, so it would draw other classes.  seen_at_once: else as on CUDA."""
    module = PartialMarginSoftmax(
        6, 50, process_group=group, sample_rate=0.3, uneven_batches=False, seed=5
    )
    batch = torch.ones(4, 6, requires_grad=True), torch.arange(4)
    if dist.get_rank(group) == 1:
        module.step.fill_(3)
    with pytest.MonkeyPatch.context() as patch:
        if not seen_at_once:
            patch.setattr(failures, "_host_sees", lambda device: False)
            loss = module(*batch)
            loss.backward()
            assert loss.isnan()
            assert not module.weight.grad.any()
        with pytest.raises(ValueError, match="must be the same on every rank") as caught:
            module(*batch)
    return str(caught.value)


@pytest.mark.parametrize("seen_at_once", [True, False])
def test_a_rank_that_is_ahead_with_equal_batches(ranks, seen_at_once):
    message = "step must be the same on every rank, got 0 on rank 0, 3 on rank 1"
    assert ranks.run(2, one_rank_ahead, seen_at_once) == [message] * 2
