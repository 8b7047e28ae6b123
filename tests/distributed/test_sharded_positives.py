"""Several positives for each sample, with classes on several ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.problems import random_problem, relative_error

from unicom_ext import CombinedMargin, PartialMarginSoftmax, functional, reference, sharding
from unicom_ext.optim import RowSGD

pytestmark = pytest.mark.slow

CLASSES, DIM, WIDTH = 90, 8, 4
SIZES = {1: [12], 2: [7, 5], 3: [5, 0, 7], 4: [3, 4, 1, 4]}


def problem_of(sizes, **options):
    return random_problem(sum(sizes), CLASSES, DIM, positives=WIDTH, ignored=2, **options)


def own_part(group, sizes):
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def errors_of(group, sizes, narrow, options):
    """Relative errors of what this rank gets, against one process in float64."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    part = own_part(group, sizes)
    problem = problem_of(sizes, **options)
    if narrow:  # on the last rank each sample has one label
        last = sum(sizes[:-1])
        problem.labels[last:, 1:] = -100
    upstream = torch.tensor(1.5) if problem.upstream is None else problem.upstream
    m2, m3 = torch.rand(2, sum(sizes), WIDTH, generator=torch.Generator().manual_seed(1)) / 2
    m2.requires_grad_()
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))
    one = {**problem.options, "margin": CombinedMargin(1.0, m2.double(), m3)}
    one.pop("uneven_batches", None)
    loss, metrics = reference.partial_margin_softmax(
        x, problem.labels, w, **one, return_metrics=True
    )
    loss.backward(upstream.to(loss))

    labels, my_m2 = problem.labels[part], m2.detach()[part].clone()
    if narrow and rank == world_size - 1:
        labels, my_m2 = labels[:, 0], my_m2[:, 0].clone()
    my_m3 = m3[part][:, 0].clone() if labels.dim() == 1 else m3[part]
    my_m2.requires_grad_()
    start, stop = sharding.class_range(CLASSES, world_size, rank)
    my_x = problem.embeddings[part].clone().requires_grad_()
    my_w = problem.prototypes[start:stop].clone().requires_grad_()
    my_loss, mine = functional.partial_margin_softmax(
        my_x,
        labels,
        my_w,
        **{**problem.options, "margin": CombinedMargin(1.0, my_m2, my_m3)},
        process_group=group,
        num_classes=CLASSES,
        grad_average=False,
        return_metrics=True,
    )
    my_loss.backward(upstream[part] if upstream.dim() else upstream)
    cosine, right_m2 = metrics.target_cosine[part], m2.grad[part]
    if labels.dim() == 1:
        cosine, right_m2 = cosine[:, 0], right_m2[:, 0]
    assert mine.target_cosine.shape == labels.shape
    assert torch.equal(mine.top1, metrics.top1[part])
    pairs = [
        (my_loss, loss[part] if loss.dim() else loss),
        (my_x.grad, x.grad[part]),
        (my_w.grad, w.grad[start:stop]),
        (my_m2.grad, right_m2),
        (mine.target_cosine, cosine),
        (mine.loss, metrics.loss[part]),
    ]
    return [relative_error(a.detach(), b.detach()) for a, b in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"multi_label": "average"},
        {"multi_label": "separate", "reduction": "none"},
        {"multi_label": "separate", "scale": 200.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_any_number_of_ranks_is_one_process(ranks, world_size, narrow, options):
    for errors in ranks.run(world_size, errors_of, SIZES[world_size], narrow, options):
        assert max(errors) < 2e-5


def test_equal_batches_need_no_message_before(ranks):
    options = {"uneven_batches": False, "multi_label": "average"}
    for errors in ranks.run(3, errors_of, [4, 4, 4], False, options):
        assert max(errors) < 2e-5


def trained(group, multi_label, as_pair):
    """Prototypes after three steps of a loss that samples, from one process or from shards."""
    rank = 0 if group is None else dist.get_rank(group)
    sizes = [5, 3, 4] if group is not None else [12]
    part = slice(0, 12) if group is None else own_part(group, sizes)
    loss = PartialMarginSoftmax(
        DIM, CLASSES, sample_rate=0.3, feature_rate=0.75, scale=16.0, sparse_grad=True, seed=3,
        process_group=group, multi_label=multi_label,
    )  # fmt: skip
    optimizer = RowSGD(loss.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(3):
        problem = random_problem(12, CLASSES, DIM, seed=step, positives=WIDTH, ignored=1)
        labels = problem.labels[part]
        if as_pair and rank != 1:
            kept = labels != -100
            counts = torch.cat([torch.zeros(1).long(), kept.sum(dim=1).cumsum(0)])
            labels = labels[kept], counts
        optimizer.zero_grad()
        value = loss(problem.embeddings[part], labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    weight = loss.state_dict()["weight"]
    return losses, weight if group is None else weight.full_tensor()


@pytest.mark.parametrize("multi_label", ["average", "separate"])
@pytest.mark.parametrize("as_pair", [False, True])
def test_three_ranks_train_as_one_process(ranks, multi_label, as_pair):
    losses, weight = trained(None, multi_label, False)
    for got, prototypes in ranks.run(3, trained, multi_label, as_pair):
        assert got == pytest.approx(losses, rel=1e-5)
        assert relative_error(prototypes, weight) < 1e-5


def raised(group, bad, uneven_batches):
    """What each rank says where the labels of rank 1 are wrong."""
    loss = PartialMarginSoftmax(
        DIM, CLASSES, process_group=group, uneven_batches=uneven_batches, sample_rate=0.5
    )
    labels = torch.tensor([[1, 2], [3, 4]])
    try:
        loss(torch.randn(2, DIM), bad if dist.get_rank(group) == 1 else labels)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", int(loss.step)
    return "nothing", int(loss.step)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            torch.tensor([[1, 2], [3, 90]]),
            "labels must be in [0, 90) or ignore_index (-100), got 90 at position [1, 1]",
        ),
        (
            (torch.tensor([1, 2]), torch.tensor([0, 3, 2])),
            "labels: offsets must rise from 0 to the number of ids, 2; they go from 0 to 2 and "
            "fall 1 times",
        ),
        (
            torch.zeros(2, 0).long(),
            "labels must have shape [2], or [2, P] for several positives, got [2, 0]",
        ),
        (
            torch.zeros(2, CLASSES).long(),
            "labels must have shape [2], or [2, P] for P class ids of each sample; got [2, 90], "
            "which look like a one-hot code of 90 classes",
        ),
    ],
    ids=["value", "offsets", "empty", "one-hot"],
)
def test_bad_labels_of_one_rank_raise_on_every_rank(ranks, bad, message):
    (first, step), (second, second_step) = ranks.run(2, raised, bad, True)
    assert second == f"ValueError: {message}"
    assert first.startswith("RankFailed: rank 1 of the process group raised ValueError: ")
    assert message in first
    assert step == second_step == 0


@pytest.mark.parametrize("uneven_batches", [False, True])
def test_positions_count_as_the_message_says(ranks, uneven_batches):
    bad = torch.tensor([[1, 2], [3, 90]])
    messages = [said for said, _ in ranks.run(2, raised, bad, uneven_batches)]
    where = "[1, 1]" if uneven_batches else "[3, 1]"
    for said in messages:
        assert f"got 90 at position {where}" in said


def test_the_volume_of_several_positives():
    one = sharding.communication_volume(256, 512, 8)
    several = sharding.communication_volume(256, 512, 8, positives=8, per_sample_margins=1)
    assert several.labels == 7 * 256 * 8 * 8 * 2
    assert several.sums == math.floor(one.sums * 11 / 4 + 0.5)
    assert several.embeddings == one.embeddings
