"""A trainer as InsightFace publishes it, head, optimizer and files, for any number of ranks.

Written after what the published programs do at each step (PartialFC v2, arXiv:2203.15565); nothing
is copied from them. A rank owns C // n classes, the first C % n ranks one more; embeddings and
labels are gathered, logits stay where their classes are, the softmax is made of a maximum and a sum
over ranks; the gradient of the embeddings is summed over ranks and multiplied by their number, as
DistributedDataParallel then takes the mean.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

C, D, INPUTS, BATCH = 23, 6, 5, 12  # BATCH: of all ranks
SCALE, MARGIN = 16.0, 0.3

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def share(num_classes: int, rank: int, ranks: int) -> range:
    """The classes of a rank."""
    each, more = divmod(num_classes, ranks)
    start = each * rank + min(rank, more)
    return range(start, start + each + (rank < more))


def backbone() -> nn.Module:
    """With what real ones have: running statistics, a weight that stands still, vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, D), nn.BatchNorm1d(D)
    )
    model[4].weight.requires_grad = False
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, INPUTS, generator=generator)
    return images, torch.randint(C, (BATCH,), generator=generator)


def groups(model: nn.Module, head: nn.Module) -> list[dict]:
    return [{"params": model.parameters()}, {"params": head.parameters()}]


def scheduler(optimizer):
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=2)


class Head(nn.Module):
    def __init__(self, group: dist.ProcessGroup, whole: Tensor) -> None:
        super().__init__()
        self.group = group
        self.classes = share(len(whole), dist.get_rank(group), dist.get_world_size(group))
        self.weight = nn.Parameter(whole[self.classes.start : self.classes.stop].clone())

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        ranks = dist.get_world_size(self.group)
        every = [torch.empty_like(labels) for _ in range(ranks)]
        dist.all_gather(every, labels, self.group)
        labels = torch.cat(every) - self.classes.start
        labels[(labels < 0) | (labels >= len(self.classes))] = -1
        cosines = F.linear(
            F.normalize(_Gather.apply(embeddings, self.group)), F.normalize(self.weight)
        ).clamp(-1, 1)
        with torch.no_grad():  # the margin has no gradient of its own
            (rows,) = torch.where(labels >= 0)
            target = cosines[rows, labels[rows]]
            cosines[rows, labels[rows]] = torch.cos(torch.arccos(target) + MARGIN)
        return _CrossEntropy.apply(cosines * SCALE, labels, self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, group):
        ctx.group = group
        every = [torch.empty_like(embeddings) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, embeddings.contiguous(), group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return gradient.chunk(ranks)[rank] * ranks, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        largest = logits.max(1, keepdim=True).values
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        probabilities = (logits - largest).exp()
        total = probabilities.sum(1, keepdim=True)
        dist.all_reduce(total, group=group)
        probabilities /= total
        (rows,) = torch.where(labels >= 0)
        own = torch.zeros(len(labels))
        own[rows] = probabilities[rows, labels[rows]]
        dist.all_reduce(own, group=group)
        ctx.save_for_backward(probabilities, rows, labels[rows])
        return -own.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, gradient):
        probabilities, rows, columns = ctx.saved_tensors
        result = probabilities.clone()
        result[rows, columns] -= 1
        return result / len(probabilities) * gradient, None, None


def step(model: nn.Module, head: nn.Module, optimizer, schedule, number: int, group=None) -> float:
    """One step of a trainer on its rank's part of a batch; the loss."""
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    images, labels = batch(number)
    part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    optimizer.zero_grad()
    loss = head(model(images[part]), labels[part])
    loss.backward()
    for param in model.parameters():  # as DistributedDataParallel
        if group is not None and param.grad is not None:
            dist.all_reduce(param.grad, group=group)
            param.grad /= ranks
    nn.utils.clip_grad_norm_(model.parameters(), 5)
    optimizer.step()
    schedule.step()
    return loss.item()


def train(group: dist.ProcessGroup, kind: str, folder: Path, steps: int = 5) -> list[float]:
    """Steps, then this rank's file, then as many steps, whose losses are returned."""
    whole = torch.randn(C, D, generator=torch.Generator().manual_seed(7)) * 0.1
    model, head = backbone(), Head(group, whole)
    optimizer = OPTIMIZERS[kind](groups(model, head))
    schedule = scheduler(optimizer)
    for number in range(steps):
        step(model, head, optimizer, schedule, number, group)
    content = {
        "epoch": 1,
        "global_step": steps,
        "state_dict_backbone": model.state_dict(),
        "state_dict_softmax_fc": head.state_dict(),
        "state_optimizer": optimizer.state_dict(),
        "state_lr_scheduler": schedule.state_dict(),
    }
    torch.save(content, folder / f"checkpoint_gpu_{dist.get_rank(group)}.pt")
    return [
        step(model, head, optimizer, schedule, number, group) for number in range(steps, 2 * steps)
    ]
