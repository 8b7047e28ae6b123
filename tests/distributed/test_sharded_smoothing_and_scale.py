"""Label smoothing and a scale with a gradient, with classes on several ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.sharded_loss import errors_of

from unicom_ext import PartialMarginSoftmax

pytestmark = pytest.mark.slow

CLASSES, DIM = 70, 8
SIZES = {1: [12], 2: [7, 5], 3: [5, 0, 7], 4: [3, 4, 1, 4]}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 16.0, "sampled": 40},
        {"scale": 64.0, "sampled": 40, "label_smoothing": 0.15},
        {"scale": 64.0, "positives": 3, "reduction": "none", "label_smoothing": 0.15},
        {"scale": 30.0, "positives": 3, "reduction": "none", "multi_label": "separate"},
        {"scale": 200.0, "features": 5, "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_any_number_of_ranks_is_one_process(ranks, world_size, options):
    for errors in ranks.run(world_size, errors_of, SIZES[world_size], CLASSES, DIM, options):
        assert max(errors) < 2e-5


@pytest.mark.parametrize("only_scale", [False, True])
def test_a_rank_without_classes(ranks, only_scale):
    options = {"scale": 8.0, "label_smoothing": 0.15}
    for errors in ranks.run(3, errors_of, SIZES[3], 2, DIM, options, only_scale):
        assert max(errors) < 2e-5


def test_equal_batches_need_no_message_before(ranks):
    options = {"scale": 16.0, "uneven_batches": False, "label_smoothing": 0.15, "sampled": 40}
    for errors in ranks.run(3, errors_of, [4, 4, 4], CLASSES, DIM, options):
        assert max(errors) < 2e-5


def what_it_says(group, scales, uneven_batches):
    loss_fn = PartialMarginSoftmax(DIM, CLASSES, process_group=group, uneven_batches=uneven_batches)
    scale = scales[dist.get_rank(group)]
    if isinstance(scale, tuple):
        scale = torch.tensor(*scale, requires_grad=True)
    x = torch.randn(3, DIM, requires_grad=True)
    try:
        loss_fn(x, torch.arange(3), scale=scale).backward()
        loss_fn(x, torch.arange(3))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize("uneven_batches", [True, False])
@pytest.mark.parametrize("other", [16.5, (16.5,), 16.0])
def test_every_rank_raises_where_one_has_another(ranks, uneven_batches, other):
    for message in ranks.run(2, what_it_says, [(16.0,), other], uneven_batches):
        assert "scale" in message


@pytest.mark.parametrize("uneven_batches", [True, False])
def test_every_rank_raises_where_ones_is_bad(ranks, uneven_batches):
    messages = ranks.run(2, what_it_says, [(16.0,), (math.nan,)], uneven_batches)
    assert messages[1].startswith("ValueError: scale must be a finite number > 0, got nan")
    assert "rank 1" in messages[0]
    assert "scale must be a finite number > 0, got nan" in messages[0]


def one_rank_smooths(group, uneven_batches):
    loss_fn = PartialMarginSoftmax(DIM, CLASSES, process_group=group, uneven_batches=uneven_batches)
    if dist.get_rank(group) == 1:
        loss_fn.label_smoothing = 0.1
    try:
        loss_fn(torch.randn(3, DIM), torch.arange(3))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize("uneven_batches", [True, False])
def test_on_one_rank_alone_every_rank_raises(ranks, uneven_batches):
    for message in ranks.run(2, one_rank_smooths, uneven_batches):
        assert "label_smoothing" in message
