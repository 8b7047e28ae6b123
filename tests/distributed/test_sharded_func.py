"""`torch.func` with classes on several ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call, grad

from unicom_ext import PartialMarginSoftmax

pytestmark = pytest.mark.slow


def gradients(group, uneven_batches):
    module = PartialMarginSoftmax(
        8, 20, sample_rate=0.5, process_group=group, uneven_batches=uneven_batches, sparse_grad=True
    )
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    x, labels = torch.randn(4, 8, generator=generator).requires_grad_(), torch.arange(4)
    module(x, labels, step=0).backward()

    def call(weights, x):
        return functional_call(module, weights, (x, labels))

    weights = {"weight": module.weight.detach()}
    by_weight, by_x = grad(call, argnums=(0, 1))(weights, x.detach())
    with pytest.raises((ValueError, RuntimeError), match=r"labels must be in \[0, 20\)"):
        grad(lambda x: module(x, labels + 17 * dist.get_rank(group)))(x.detach())
    return [
        torch.equal(by_weight["weight"], module.weight.grad.to_dense()),
        torch.equal(by_x, x.grad),
        int(module.step) == 1,
        not torch._C._functorch.is_functorch_wrapped_tensor(module.last_metrics.loss),
    ]


@pytest.mark.parametrize("uneven_batches", [True, False])
def test_the_gradients_are_those_of_backward(ranks, uneven_batches):
    assert ranks.run(2, gradients, uneven_batches) == [[True] * 4] * 2
