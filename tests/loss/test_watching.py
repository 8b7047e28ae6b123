"""What is said of a loss that is trained wrongly, where nothing raises; and when nothing is said.

The messages are those of docs/troubleshooting.md, where a test makes each mistake.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from unicom_ext import PartialMarginSoftmax, functional
from unicom_ext.margins import ArcFace
from unicom_ext.optim import RowAdamW

C, D, B = 40, 8, 4


def steps(loss, count, optimizer=None):
    """So many steps, and what was warned of."""
    optimizer = optimizer or torch.optim.SGD(loss.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            loss(torch.ones(B, D), torch.arange(B)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "rates",
    [{"sample_rate": 0.5}, {"feature_rate": 0.5}, {"sample_rate": 0.5, "sparse_grad": True}],
)
def test_training_in_eval_mode(rates):
    loss = PartialMarginSoftmax(D, C, **rates)
    optimizer = RowAdamW(loss.parameters())
    for _ in range(3):  # a few steps, as of gradients from before an evaluation, say nothing
        assert steps(loss.eval(), 4, optimizer) == []
        assert steps(loss.train(), 1, optimizer) == []
    again = copy.deepcopy(loss)
    (message,) = steps(loss.eval(), 10, optimizer)
    assert "while the loss was in eval() mode" in message
    assert steps(loss, 10, optimizer) == []  # it was said
    assert len(steps(again.eval(), 5)) == 1  # but not of the copy


def test_eval_mode_where_it_changes_nothing():
    assert steps(PartialMarginSoftmax(D, C).eval(), 10) == []
    loss = PartialMarginSoftmax(D, C, sample_rate=0.5).eval()
    encoder = nn.Linear(D, D)  # frozen prototypes: an optimizer of others
    assert steps(loss, 10, torch.optim.SGD(encoder.parameters(), lr=0.1)) == []


def test_evaluations_between_the_gradient_and_the_step():
    loss, frozen = (PartialMarginSoftmax(D, C, sample_rate=0.5) for _ in range(2))
    optimizer = torch.optim.SGD([*loss.parameters(), *frozen.eval().parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            optimizer.zero_grad()
            loss.train()(torch.ones(B, D), torch.arange(B)).backward()
            with torch.no_grad():
                frozen(torch.ones(B, D), torch.arange(B))
                loss.eval()(torch.ones(B, D), torch.arange(B))
            optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, RowAdamW])
def test_prototypes_in_float16(make):
    loss = PartialMarginSoftmax(D, C, dtype=torch.float16)
    (message,) = steps(loss, 3, make(loss.parameters()))
    assert 'give the loss precision="fp16"' in message


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"precision": "fp16"}])
def test_other_ways_to_half_precision(options):
    assert steps(PartialMarginSoftmax(D, C, **options), 3) == []


# ---- several ranks ----


def without_a_group(group):
    return steps(PartialMarginSoftmax(D, C), 2), steps(
        PartialMarginSoftmax(D, C, process_group=group), 2
    )


def test_a_loss_without_the_group_of_its_ranks(ranks):
    for alone, together in ranks.run(2, without_a_group):
        assert len(alone) == 1
        assert "the loss has no process_group" in alone[0]
        assert together == []


def labels_below(group, stop, ignored):
    loss = PartialMarginSoftmax(D, 8, process_group=group)
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(9):
            labels = torch.randint(stop, (128,), generator=generator)
            labels[:ignored] = -100
            with torch.no_grad():
                loss(torch.randn(128, D), labels)
    return [str(w.message) for w in caught]


def test_labels_that_are_never_of_a_ranks_classes(ranks):
    first, second = ranks.run(2, labels_below, 4, 0)
    assert first == []
    (message,) = second
    assert "of the last 2048 labels of all ranks none is of the classes 4 to 7" in message


def test_labels_of_all_ranks(ranks):
    assert ranks.run(2, labels_below, 8, 0) == [[], []]
    assert ranks.run(2, labels_below, 5, 0) == [[], []]  # of one class of rank 1
    assert ranks.run(2, labels_below, 4, 100) == [[], []]  # too few that count to tell


def scaled(group, scaler, overflow, fused):
    """Steps under a scaler; on rank 1 one of them overflows."""
    loss = PartialMarginSoftmax(D, C, process_group=group)
    optimizer = torch.optim.AdamW(loss.parameters(), fused=fused)
    scaler = (
        ShardedGradScaler("cpu", process_group=group)
        if scaler == "ShardedGradScaler"
        else torch.amp.GradScaler("cpu")
    )
    for step in range(3):
        result = loss(torch.ones(B, D), torch.arange(B))
        scaler.scale(result).backward()
        if overflow and step == 1 and dist.get_rank(group) == 1:
            loss.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return loss(torch.ones(B, D), torch.arange(B)).item()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_one_rank_leaves_out(ranks, fused):
    for outcome in ranks.outcomes(2, scaled, "GradScaler", True, fused):
        assert isinstance(outcome, ValueError)
        assert str(outcome).endswith("must be the same on every rank, got 2 on rank 0, 1 on rank 1")
    # What comes after is not held to it.
    assert len(set(ranks.run(2, of_the_function))) == 1
    assert len(set(ranks.run(2, scaled, "GradScaler", False, fused))) == 1


def test_a_step_that_all_ranks_leave_out(ranks):
    assert len(set(ranks.run(2, scaled, "ShardedGradScaler", True, False))) == 1


def without_empty_prototypes(group):
    loss, encoder = PartialMarginSoftmax(D, 1, process_group=group), nn.Linear(D, D)
    params = [param for param in loss.parameters() if param.numel()]
    optimizer = torch.optim.SGD([*encoder.parameters(), *params], lr=0.1)
    for _ in range(2):
        loss(encoder(torch.ones(B, D)), torch.zeros(B, dtype=torch.int64)).backward()
        optimizer.step()
    return len(loss.weight)


def test_a_rank_without_classes_may_leave_them_out(ranks):
    assert ranks.run(2, without_empty_prototypes) == [1, 0]


def of_the_function(group):
    return functional.partial_margin_softmax(
        torch.ones(B, D),
        torch.arange(B),
        torch.ones(C // 2, D),
        margin=ArcFace(),
        scale=8.0,
        process_group=group,
        num_classes=C,
    ).item()


def one_rank_alone(group, then):
    """A step of an optimizer on one rank alone; then all begin anew."""
    loss = PartialMarginSoftmax(D, C, process_group=group)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    loss(torch.ones(B, D), torch.arange(B)).backward()
    if dist.get_rank(group) == 0:
        torch.optim.SGD(loss.parameters(), lr=0.1).step()
    if then == "load":
        loss.load_state_dict(state)
    elif then == "make":
        loss = PartialMarginSoftmax(D, C, process_group=group)
    return loss(torch.ones(B, D), torch.arange(B)).item()


@pytest.mark.parametrize("then", ["load", "make"])
def test_ranks_are_of_one_mind_again(ranks, then):
    first, second = ranks.run(2, one_rank_alone, then)
    assert first == second
