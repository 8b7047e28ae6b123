"""The gradient of margins that are tensors, with classes on several ranks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from support.problems import random_problem, relative_error
from torch.nn.parallel import DistributedDataParallel

from unicom_ext import CombinedMargin, functional, reference, sharding
from unicom_ext.distributed import failures

pytestmark = pytest.mark.slow

SIZES = [5, 0, 7]


def margins(total, grad):
    generator = torch.Generator().manual_seed(3)
    m2, m3 = 0.1 + torch.rand(2, total, generator=generator)
    return [m.clone().requires_grad_(grad) for m in (m2, 0.3 * m3)]


def errors_of(group, reduction, sizes, inputs_too, options):
    """Relative errors of this rank's gradients: equal to one process's."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    total = sum(sizes)
    problem = random_problem(
        total, 50, 8, ignored=2, scale=16.0, reduction=reduction, beyond_pi="linear"
    )
    upstream = torch.tensor(1.5) if problem.upstream is None else problem.upstream
    m2, m3 = margins(total, True)
    shared = {**problem.options, "margin": CombinedMargin(1.1, m2.double(), m3.double())}
    loss = reference.partial_margin_softmax(
        problem.embeddings.double(), problem.labels, problem.prototypes.double(), **shared
    )
    loss.backward(upstream.to(loss))
    right = m2.grad, m3.grad

    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    m2, m3 = (m[part].clone().requires_grad_() for m in margins(total, False))
    start, stop = sharding.class_range(50, world_size, rank)
    x = problem.embeddings[part].clone().requires_grad_(inputs_too)
    w = problem.prototypes[start:stop].clone().requires_grad_(inputs_too)
    loss = functional.partial_margin_softmax(
        x,
        problem.labels[part],
        w,
        **{**problem.options, "margin": CombinedMargin(1.1, m2, m3), **options},
        process_group=group,
        num_classes=50,
    )
    loss.backward(upstream[part] if upstream.dim() else upstream)
    times = world_size if options.get("grad_average", True) else 1
    return [
        relative_error(m.grad, one[part] * times)
        for m, one in zip((m2, m3), right, strict=True)
        if len(m)
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [(SIZES, {}), (SIZES, {"grad_average": False}), ([4, 4, 4], {"uneven_batches": False})],
    ids=str,
)
def test_of_the_ranks_own_samples(ranks, reduction, inputs_too, sizes, options):
    for errors in ranks.run(3, errors_of, reduction, sizes, inputs_too, options):
        assert max(errors, default=0.0) < 1e-5


def failed_step(group):
    """Loss, and gradient of what makes the margins, where one rank's labels are wrong."""
    rank = dist.get_rank(group)
    start, stop = sharding.class_range(50, 2, rank)
    torch.manual_seed(0)
    network = DistributedDataParallel(torch.nn.Linear(6, 1), process_group=group)
    x, labels = torch.randn(4, 6), torch.arange(4)

    def call(labels, margin):
        return functional.partial_margin_softmax(
            x,
            labels,
            torch.ones(stop - start, 6),
            margin=margin,
            scale=16.0,
            process_group=group,
            num_classes=50,
            uneven_batches=False,
        )

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(failures, "_host_sees", lambda device: False)  # as on CUDA
        wrong = labels.float() if rank == 1 else labels
        loss = call(wrong, CombinedMargin(m2=network(x)[:, 0]))
        loss.backward()  # the wrapper's message needs every rank
        with pytest.raises((TypeError, RuntimeError), match="labels must be an int32 or int64"):
            call(labels, CombinedMargin())
    return bool(loss.isnan()), bool((network.module.weight.grad == 0).all())


def test_a_rank_that_fails_has_zeros_for_its_margins(ranks):
    assert ranks.run(2, failed_step) == [(True, True)] * 2


def second_derivative(group):
    rank = dist.get_rank(group)
    start, stop = sharding.class_range(50, 2, rank)
    x = torch.randn(4, 6).requires_grad_()
    m3 = torch.full((4,), 0.2, requires_grad=True)
    loss = functional.partial_margin_softmax(
        x,
        torch.arange(4),
        torch.ones(stop - start, 6),
        margin=CombinedMargin(m3=m3),
        scale=16.0,
        process_group=group,
        num_classes=50,
    )
    messages = []
    for grad in torch.autograd.grad(loss, (x, m3), create_graph=True):
        with pytest.raises(RuntimeError) as caught:
            grad.sum().backward(retain_graph=True)
        messages.append(str(caught.value))
    return messages


def test_the_gradient_of_a_gradient_is_refused(ranks):
    message = "the partial margin softmax can be differentiated only once"
    assert ranks.run(2, second_derivative) == [[message] * 2] * 2
