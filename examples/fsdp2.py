"""FSDP2 (`fully_shard`) around a model that holds the loss: its prototypes are left out.

    torchrun --nproc-per-node 2 examples/fsdp2.py --output runs/fsdp2 --epochs 2

Started again, it goes on, also with another number of processes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from common import Characters, arguments
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint, gradients
from unicom_ext.encoders.small import Encoder
from unicom_ext.optim import RowAdamW

BATCH = 64  # images of a step, on each rank


class Model(nn.Module):
    """An encoder with its loss."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__()
        self.encoder = Encoder(embedding_size=128).to(device)
        self.loss = PartialMarginSoftmax(
            128, num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75,
            process_group=dist.group.WORLD, device=device,
        )  # fmt: skip

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.encoder(images), labels)


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)
    data = Characters(args.classes)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler, drop_last=True)

    model = Model(data.num_classes, device)
    fully_shard(model, ignored_params=set(model.loss.parameters()))
    optimizer = RowAdamW(model.parameters(), lr=2e-3)

    state = {"modules": {"model": model}, "optimizers": {"main": optimizer}}
    start = 0
    if last := checkpoint.latest(args.output):
        start = checkpoint.load(last, **state)["epoch"]

    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = model(images.to(device), labels.to(device))
            loss.backward()
            # Torch's own would take the norm of one rank's prototypes for that of all.
            gradients.clip_grad_norm_(model.encoder.parameters(), model.loss, max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}")
        path = f"{args.output}/step-{int(model.loss.step)}"
        checkpoint.save(path, **state, extra={"epoch": epoch + 1})  # every rank calls it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
