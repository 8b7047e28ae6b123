"""Nested dimensions with classes on several ranks: one process's loss, gradients and draws."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unicom_ext import PartialMarginSoftmax

pytestmark = pytest.mark.slow

SIZES, DIM, CLASSES, STEPS = [4, 4, 4], 16, 50, 4


def make(group=None, **options):
    options = {
        "sample_rate": 0.5, "feature_rate": 0.5, "feature_selection": "nested", "seed": 5,
        "grad_average": False, **options,
    }  # fmt: skip
    return PartialMarginSoftmax(DIM, CLASSES, process_group=group, **options)


def batch(sizes):
    torch.manual_seed(2)
    return torch.randn(sum(sizes), DIM), torch.randint(CLASSES, (sum(sizes),))


def train(group, sizes, options):
    """Of each step: the loss, the embeddings' gradient, the prototypes', and the dimensions."""
    x, labels = batch(sizes)
    loss, part = make(group, **options), slice(None)
    if group is not None:
        rank = dist.get_rank(group)
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for _ in range(STEPS):
        loss.zero_grad()
        inputs = x[part].clone().requires_grad_()
        value = loss(inputs, labels[part])
        value.backward()
        dims = loss.last_selection.feature_index.tolist()
        found.append((value.detach(), inputs.grad, loss.weight.grad.clone(), dims))
    return found


@pytest.mark.parametrize(
    ("sizes", "options"),
    [([5, 3], {}), ([4, 0, 6], {}), ([4, 4, 4], {"uneven_batches": False})],
    ids=str,
)
def test_it_is_what_one_process_does(ranks, sizes, options):
    right = train(None, sizes, {})
    assert len({len(dims) for *_, dims in right}) > 2
    found = ranks.run(len(sizes), train, sizes, options)
    for step, (loss, grad_x, grad_w, dims) in enumerate(right):
        of_ranks = [steps[step] for steps in found]
        for mine in of_ranks:
            torch.testing.assert_close(mine[0], loss, rtol=1e-5, atol=1e-6)
            assert mine[3] == dims
        torch.testing.assert_close(
            torch.cat([mine[1] for mine in of_ranks]), grad_x, rtol=1e-4, atol=1e-6
        )
        together = torch.cat([mine[2] for mine in of_ranks])
        torch.testing.assert_close(together, grad_w, rtol=1e-4, atol=1e-4 * float(grad_w.norm()))


def compiled(group):
    """Why a whole graph is refused; the losses of one compiled in parts, and of one that is not."""
    x, labels = torch.ones(4, DIM), torch.arange(4)
    with pytest.raises(Exception, match="nested") as refused:
        torch.compile(make(group, uneven_batches=False), fullgraph=True, backend="eager")(x, labels)
    in_parts = torch.compile(make(group, uneven_batches=False), backend="eager")
    eager = make(group, uneven_batches=False)
    losses = [(in_parts(x, labels).item(), eager(x, labels).item()) for _ in range(STEPS)]
    return str(refused.value), losses


def test_a_graph_cannot_hold_it(ranks):
    for refused, losses in ranks.run(2, compiled):
        assert 'to compile the loss whole use feature_selection="random"' in refused
        for in_parts, eager in losses:
            assert in_parts == pytest.approx(eager, rel=1e-6)


def disagree(group, uneven_batches):
    rank = dist.get_rank(group)
    found = []
    loss = make(group, uneven_batches=uneven_batches)
    if rank == 1:
        loss.feature_selection = "random"
    calls = [
        lambda: loss(torch.ones(2, DIM), torch.tensor([0, 1])),
        lambda: make(group, feature_selection=["nested", "random"][rank]),
        lambda: make(group, feature_selection=["nested", "nest"][rank]),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        found.append(str(raised.value))
    return found


@pytest.mark.parametrize("uneven_batches", [True, False])
def test_ranks_must_agree(ranks, uneven_batches):
    allowed = "feature_selection must be one of ('random', 'nested'), got 'nest'"
    first, second = ranks.run(2, disagree, uneven_batches)
    told = [
        "nested must be the same on every rank, got 1 on rank 0, 0 on rank 1",
        "feature_selection must be the same on every rank, got nested on rank 0, random on rank 1",
    ]
    assert first == [*told, f"rank 1 of the process group raised ValueError: {allowed}"]
    assert second == [*told, allowed]
