"""Adaptive margins with a process group: those of one process with the batches of all ranks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from unicom_ext import PartialMarginSoftmax
from unicom_ext.distributed.failures import RankFailed
from unicom_ext.margins import AdaFace, ElasticArcFace

pytestmark = pytest.mark.slow

SIZES = [5, 0, 7]
LOSS = {"scale": 8.0, "beyond_pi": "linear", "margin_grad": "exact", "dtype": torch.float64}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = 9 * torch.randn(sum(SIZES), 6, dtype=torch.float64, generator=generator)
    y = torch.randint(20, (sum(SIZES),), generator=generator)
    y[2] = -100
    return x.requires_grad_(), y


def make(name, group):
    return {
        "AdaFace": lambda: AdaFace(t_alpha=0.3, process_group=group),
        "ElasticArcFace": lambda: ElasticArcFace(seed=2, process_group=group),
    }[name]()


def two_steps(group, name):
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    part = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1])) if world_size > 1 else slice(None)
    margins = make(name, group)
    loss = PartialMarginSoftmax(6, 20, process_group=group, grad_average=False, **LOSS)
    result = []
    for step in range(2):
        x, y = batch(step)
        given = margins(x[part], y[part])
        value = loss(x[part], y[part], margin=given)
        value.backward()
        result.append((given.m2, value.detach(), x.grad[part]))
    return result, margins.state_dict()


@pytest.mark.parametrize("name", ["AdaFace", "ElasticArcFace"])
def test_are_those_of_one_process(ranks, name):
    ((right, state),) = ranks.run(1, two_steps, name)
    outcomes = ranks.run(3, two_steps, name)
    for step, (m2, value, grad) in enumerate(right):
        parts = [result[step] for result, _ in outcomes]
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), m2, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), grad, rtol=1e-9, atol=1e-12)
        for part in parts:
            torch.testing.assert_close(part[1], value, rtol=1e-12, atol=0)
    for _, mine in outcomes:
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, state[key], rtol=1e-14, atol=0)
            assert torch.equal(tensor, outcomes[0][1][key])


def one_bad_rank(group, name):
    rank = dist.get_rank(group)
    margins = make(name, group)
    before = {k: v.clone() for k, v in margins.state_dict().items()}
    x, y = batch(0)
    with pytest.raises((TypeError, RankFailed)) as caught:
        margins(x, y.float() if rank == 1 else y)
    assert margins.state_dict() == before
    given = margins(x, y)  # and the next batch is as any other
    return f"{type(caught.value).__name__}: {caught.value}", bool(given.m2.isfinite().all())


@pytest.mark.parametrize("name", ["AdaFace", "ElasticArcFace"])
def test_every_rank_raises(ranks, name):
    (other, good), (own, fine) = ranks.run(2, one_bad_rank, name)
    assert other == "RankFailed: rank 1 could not make its margins"
    assert own == "TypeError: labels must be an int32 or int64 tensor, got a torch.float32 tensor"
    assert good
    assert fine


def copied(group, name):
    margins = make(name, group)
    x, y = batch(0)
    margins(x, y)
    copies = copy.deepcopy(margins), copy.deepcopy(torch.nn.ModuleList([margins]))[0]
    with pytest.raises(TypeError) as caught:
        pickle.dumps(margins)
    x, y = batch(1)
    right = margins(x, y)
    same = [
        other.process_group is group
        and other(x, y) == right
        and all(map(torch.equal, other.buffers(), margins.buffers()))
        for other in copies
    ]
    return same, str(caught.value)


@pytest.mark.parametrize("name", ["AdaFace", "ElasticArcFace"])
def test_a_copy_is_of_the_same_group(ranks, name):
    message = f"{name} with a process_group cannot be pickled: save its state_dict instead"
    assert ranks.run(2, copied, name) == [([True, True], message)] * 2
