"""Label smoothing with classes on several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.problems import random_problem, relative_error

from unicom_ext import PartialMarginSoftmax, functional, reference, sharding

pytestmark = pytest.mark.slow

CLASSES, DIM = 70, 8
SIZES = {1: [12], 2: [7, 5], 3: [5, 0, 7], 4: [3, 4, 1, 4]}


def own_part(group, sizes):
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def errors_of(group, sizes, options, num_classes=CLASSES):
    """Relative errors of what this rank gets, against one process in float64."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    part = own_part(group, sizes)
    problem = random_problem(
        sum(sizes), num_classes, DIM, ignored=2, label_smoothing=0.15, **options
    )
    upstream = torch.tensor(1.5) if problem.upstream is None else problem.upstream
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))
    one = {name: v for name, v in problem.options.items() if name != "uneven_batches"}
    loss = reference.partial_margin_softmax(x, problem.labels, w, **one)
    loss.backward(upstream.to(loss))

    start, stop = sharding.class_range(num_classes, world_size, rank)
    my_x = problem.embeddings[part].clone().requires_grad_()
    my_w = problem.prototypes[start:stop].clone().requires_grad_()
    index = problem.options.pop("class_index", None)
    if index is not None:
        index = index[(index >= start) & (index < stop)]
    my_loss = functional.partial_margin_softmax(
        my_x,
        problem.labels[part],
        my_w,
        **problem.options,
        class_index=index,
        process_group=group,
        num_classes=num_classes,
        grad_average=False,
    )
    my_loss.backward(upstream[part] if upstream.dim() else upstream)
    pairs = [
        (my_loss, loss[part] if loss.dim() else loss),
        (my_x.grad, x.grad[part]),
        (my_w.grad, w.grad[start:stop]),
    ]
    return [relative_error(a.detach(), b.detach()) for a, b in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"sampled": 40},
        {"positives": 3, "reduction": "none"},
        {"scale": 200.0, "features": 5},
    ],
    ids=str,
)
def test_any_number_of_ranks_is_one_process(ranks, world_size, options):
    for errors in ranks.run(world_size, errors_of, SIZES[world_size], options):
        assert max(errors) < 2e-5


def test_a_rank_without_classes(ranks):
    for errors in ranks.run(3, errors_of, SIZES[3], {}, 2):
        assert max(errors) < 2e-5


def test_equal_batches_need_no_message_before(ranks):
    for errors in ranks.run(3, errors_of, [4, 4, 4], {"uneven_batches": False, "sampled": 40}):
        assert max(errors) < 2e-5


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
