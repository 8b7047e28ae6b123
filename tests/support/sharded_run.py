"""A model whose loss is sharded over ranks or not, trained on the same global batches."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unicom_ext import ArcFace, PartialMarginSoftmax, gradients
from unicom_ext.optim import RowAdamW, RowSGD

CLASSES, DIM, INPUTS, BATCH = 301, 8, 6, 24


class Run:
    """An encoder, the loss and an optimizer on this rank, trained on the same global batches."""

    def __init__(self, group, wrap="ddp", optimizer="AdamW", classes=CLASSES, **options):
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, DIM))
        options.setdefault("sparse_grad", optimizer.startswith("Row"))
        self.options = {"sample_rate": 0.3, "feature_rate": 0.75, "scale": 16.0, **options}
        self.loss = PartialMarginSoftmax(
            DIM, classes, margin=ArcFace(0.2), seed=5, process_group=group, **self.options
        )
        if group is not None and wrap == "ddp":
            encoder = DistributedDataParallel(encoder, process_group=group)
        elif group is not None:
            fully_shard(encoder, mesh=DeviceMesh.from_group(group, "cpu"))
        self.encoder = encoder
        make = {
            "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
            "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
            "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
            "RowAdamW": lambda p: RowAdamW(p, lr=0.01, weight_decay=0.1),
            "RowAdamW of bf16 moments": lambda p: RowAdamW(
                p, lr=0.01, weight_decay=0.1, moment_dtype=torch.bfloat16, row_second_moment=True
            ),
            "RowSGD, exact": lambda p: RowSGD(
                p, lr=0.1, momentum=0.9, weight_decay=0.01, exact=True
            ),
            "RowSGD": lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        }[optimizer]
        self.optimizer = make([*encoder.parameters(), *self.loss.parameters()])
        self.step = 0

    def parts(self):
        return {
            "modules": {"encoder": self.encoder, "loss": self.loss},
            "optimizers": {"main": self.optimizer},
        }

    def train(self, steps, clip=None):
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 + self.step)
            inputs = torch.randn(BATCH, INPUTS, generator=generator)
            labels = torch.randint(CLASSES - 10, (BATCH,), generator=generator)
            labels %= self.loss.num_classes
            # The last batches are uneven, as at the end of an epoch.
            sizes = [BATCH // self.world_size] * self.world_size
            if self.step % 3 == 2 and self.world_size > 1:
                sizes[0], sizes[-1] = sizes[0] + 3, sizes[-1] - 3
            part = slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))
            self.optimizer.zero_grad()
            loss = self.loss(self.encoder(inputs[part]), labels[part])
            loss.backward()
            if clip is not None:
                gradients.clip_grad_norm_(self.encoder.parameters(), self.loss, clip)
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
        return losses

    def tensors(self):
        """All parameters, whole."""
        found = [whole(p.detach()) for p in self.encoder.parameters()]
        return [*found, whole(self.loss.state_dict()["weight"])]


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_close(got, right, tolerance):
    for a, b in zip(got, right, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error < tolerance, f"relative error {error:.3g}"
