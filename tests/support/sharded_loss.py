"""The loss of one rank beside that of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist

from support.problems import random_problem, relative_error
from unicom_ext import functional, reference, sharding


def errors_of(group, sizes, num_classes, dim, options, only_scale=False):
    """Relative errors of what this rank gets, against one process in float64.

    sizes: of the ranks' batches.  options: of `random_problem`.  only_scale: nothing but the scale,
    which is a tensor, has a gradient.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    problem = random_problem(sum(sizes), num_classes, dim, ignored=2, **options)
    upstream = torch.tensor(1.5) if problem.upstream is None else problem.upstream
    x, w = (t.double().requires_grad_() for t in (problem.embeddings, problem.prototypes))
    scale = torch.tensor(float(problem.options.pop("scale")), requires_grad=True)
    one = {**problem.options, "sparse_grad": False}
    one.pop("uneven_batches", None)
    loss = reference.partial_margin_softmax(x, problem.labels, w, scale=scale.double(), **one)
    loss.backward(upstream.to(loss))

    start, stop = sharding.class_range(num_classes, world_size, rank)
    centers = options.get("num_centers", 1)
    rows = slice(start * centers, stop * centers)
    my_x = problem.embeddings[part].clone().requires_grad_(not only_scale)
    my_w = problem.prototypes[rows].clone().requires_grad_(not only_scale)
    my_scale = scale.detach().clone().requires_grad_()
    index = problem.options.pop("class_index", None)
    if index is not None:
        index = index[(index >= start) & (index < stop)]
    my_loss = functional.partial_margin_softmax(
        my_x,
        problem.labels[part],
        my_w,
        scale=my_scale,
        **problem.options,
        class_index=index,
        process_group=group,
        num_classes=num_classes,
    )
    my_loss.backward(upstream[part] if upstream.dim() else upstream)
    # As DistributedDataParallel does; that the loss multiplies by the number of ranks.
    dist.all_reduce(my_scale.grad, group=group)
    pairs = [
        (my_loss, loss[part] if loss.dim() else loss),
        (my_scale.grad / world_size, scale.grad),
    ]
    if not only_scale:
        pairs.append((my_x.grad / world_size, x.grad[part]))
        pairs.append((my_w.grad.to_dense(), w.grad[rows]))
    return [relative_error(a.detach(), b.detach()) for a, b in pairs]
