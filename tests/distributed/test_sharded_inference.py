"""`topk` and `logits` with classes on several ranks: what one process finds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from unicom_ext import PartialMarginSoftmax

pytestmark = pytest.mark.slow

DIM = 12


def make(num_classes, group=None, **options) -> PartialMarginSoftmax:
    loss = PartialMarginSoftmax(DIM, num_classes, seed=3, process_group=group, **options)
    with torch.no_grad():  # some that are equal, on all ranks
        loss.weight[::3] = 1.0
    return loss


def embeddings(sizes, dtype):
    torch.manual_seed(1)
    parts = [torch.randn(size, DIM).to(dtype) for size in sizes]
    parts[0][:1] = 1.0
    return parts


def answers(group, sizes, num_classes, k, ids):
    rank = dist.get_rank(group)
    with torch.no_grad():
        loss = make_shard(group, num_classes)
    dtype = [torch.float32, torch.float64, torch.bfloat16][rank]
    x = embeddings(sizes, torch.float32)[rank].to(dtype)
    wanted = None if ids[rank] is None else torch.tensor(ids[rank], dtype=torch.int64)
    return loss.topk(x, k), loss.logits(x, wanted)


def make_shard(group, num_classes):
    loss = PartialMarginSoftmax(DIM, num_classes, seed=3, process_group=group, scale=20.0)
    loss.weight.copy_(make(num_classes).weight[loss.shard.start : loss.shard.stop])
    return loss


@pytest.mark.parametrize(
    ("sizes", "num_classes", "k", "ids"),
    [
        ([5, 3], 41, 7, [[3, 40, 0, 3], None]),
        ([4, 0, 6], 41, 30, [[], [1, 2], [40, 20, 20]]),
        ([4, 1, 0], 4, 4, [None, None, [3]]),  # a rank without classes
        ([0, 0], 5, 1, [None, [0]]),
    ],
    ids=str,
)
def test_it_is_what_one_process_finds(ranks, sizes, num_classes, k, ids):
    whole = make(num_classes, scale=20.0)
    for rank, ((cosine, index), logits) in enumerate(
        ranks.run(len(sizes), answers, sizes, num_classes, k, ids)
    ):
        dtype = [torch.float32, torch.float64, torch.bfloat16][rank]
        x = embeddings(sizes, torch.float32)[rank].to(dtype)
        wanted = None if ids[rank] is None else torch.tensor(ids[rank], dtype=torch.int64)
        right = whole.topk(x, k)
        assert torch.equal(index, right.class_index)
        torch.testing.assert_close(cosine, right.cosine, rtol=0, atol=6e-8)
        rounding = 1e-14 if dtype == torch.float64 else 2e-7
        torch.testing.assert_close(logits, whole.logits(x, wanted), rtol=rounding, atol=rounding)


def failures(group):
    rank = dist.get_rank(group)
    loss = make(41, group)
    x = torch.ones(2, DIM)
    bad = torch.full((2, DIM), torch.nan) if rank == 1 else x
    broken = make(41, group)
    if rank == 1:
        broken.weight.data[2] = torch.inf
    other = make(41, group)
    if rank == 1:
        other.scale = 32.0
    found = []
    for call in (
        lambda: loss.topk(bad, 1),
        lambda: loss.topk(x, 42 if rank else 1),
        lambda: loss.topk(x, 1 + rank),
        lambda: loss.logits(x, torch.tensor([0, 41 * rank])),
        lambda: broken.topk(x, 1),
        lambda: other.logits(x),
        lambda: loss.logits(x, scale=8.0 + rank),
        lambda: loss.logits(x, scale=-float(rank) or 8.0),
    ):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        found.append(f"{raised.type.__name__}: {raised.value}")
    assert loss.topk(x, 1).class_index.tolist() == [[0], [0]]  # the group is as it was
    return found


def test_every_rank_raises(ranks):
    own = [
        "ValueError: embeddings: row 0 holds NaN or a value outside fp32, it has no cosine",
        "ValueError: k must be an integer in [1, 41], got 42",
        "ValueError: class_index must be in [0, 41), got 41 at position 1",
        "ValueError: scale must be a finite number > 0, got -1.0",
    ]
    broken = "ValueError: prototypes: row 2 holds NaN or a value outside fp32, it has no cosine"
    same = [
        "ValueError: k must be the same on every rank, got 1 on rank 0, 2 on rank 1",
        "ValueError: scale must be the same on every rank, got 64.0 on rank 0, 32.0 on rank 1",
        "ValueError: scale must be the same on every rank, got 8.0 on rank 0, 9.0 on rank 1",
    ]
    told = [f"RankFailed: rank 1 of the process group raised {reason}" for reason in own]
    others, failed = ranks.run(2, failures)
    assert failed == [own[0], own[1], same[0], own[2], broken, *same[1:], own[3]]
    assert others == [
        told[0], told[1], same[0], told[2], f"RankFailed: process 1 of 2 failed: {broken}",
        *same[1:], told[3],
    ]  # fmt: skip
