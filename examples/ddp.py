"""DistributedDataParallel for the encoder; the prototypes are shared by the ranks.

    torchrun --nproc-per-node 2 examples/ddp.py --output runs/ddp --epochs 2

Started again, it goes on, also with another number of processes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from common import Characters, arguments
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint, gradients
from unicom_ext.encoders.small import Encoder
from unicom_ext.optim import RowAdamW

BATCH = 64  # images of a step, on each rank


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

    encoder = DistributedDataParallel(Encoder(embedding_size=128).to(device))
    loss_fn = PartialMarginSoftmax(  # which is not wrapped: ranks own different prototypes
        128, data.num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75,
        sparse_grad=True, process_group=dist.group.WORLD, device=device,
    )  # fmt: skip
    optimizer = RowAdamW(
        [
            {"params": encoder.parameters(), "lr": 2e-3},
            {"params": loss_fn.parameters(), "lr": 1e-2},
        ]
    )

    state = {"modules": {"encoder": encoder, "loss": loss_fn}, "optimizers": {"main": optimizer}}
    start = 0
    if last := checkpoint.latest(args.output):
        start = checkpoint.load(last, **state)["epoch"]

    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = loss_fn(encoder(images.to(device)), labels.to(device))  # of all ranks' batches
            loss.backward()
            gradients.clip_grad_norm_(encoder.parameters(), loss_fn, max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}")
        path = f"{args.output}/step-{int(loss_fn.step)}"
        checkpoint.save(path, **state, extra={"epoch": epoch + 1})  # every rank calls it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
