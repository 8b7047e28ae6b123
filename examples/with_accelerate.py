"""Accelerate, on one rank or several: it prepares the encoder and the optimizer, not the loss.

    python examples/with_accelerate.py --output runs/accelerate --epochs 2
    torchrun --nproc-per-node 2 examples/with_accelerate.py --output runs/accelerate --epochs 3

Started again, it goes on, also with another number of processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from common import Characters, arguments
from torch.utils.data import DataLoader

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint, gradients
from unicom_ext.encoders.small import Encoder
from unicom_ext.optim import RowAdamW

PARTS = 2  # batches of a step


def main() -> None:
    args = arguments(__doc__)
    accelerator = Accelerator(
        mixed_precision="bf16", gradient_accumulation_steps=PARTS,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
        cpu=not torch.cuda.is_available(),  # or processes without a GPU do not find each other
    )  # fmt: skip
    set_seed(0)
    data = Characters(args.classes)
    encoder = Encoder(embedding_size=128)
    loss_fn = PartialMarginSoftmax(
        128, data.num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75,
        process_group=dist.group.WORLD if accelerator.num_processes > 1 else None,
        full_state_dict=True,  # the main process writes the state: of all ranks' classes
        sparse_grad=True, device=accelerator.device,
    )  # fmt: skip
    optimizer = RowAdamW([*encoder.parameters(), *loss_fn.parameters()], lr=2e-3)
    loader = DataLoader(data, 64, shuffle=True, drop_last=True)
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    accelerator.register_for_checkpointing(loss_fn)

    start = 0
    if last := checkpoint.latest(args.output):  # the last directory step-N in it; here of N epochs
        accelerator.load_state(last)
        start = int(last.name.removeprefix("step-"))

    for epoch in range(start, args.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(encoder):
                loss = loss_fn(encoder(images), labels)  # each batch draws its own classes
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradients.clip_grad_norm_(encoder.parameters(), loss_fn, max_norm=5.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
        accelerator.save_state(f"{args.output}/step-{epoch + 1}")  # every rank calls it
    accelerator.end_training()


if __name__ == "__main__":
    main()
