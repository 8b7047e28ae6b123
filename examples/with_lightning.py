"""Lightning, on one rank or several, with the loss inside the module.

    python examples/with_lightning.py --output runs/lightning --epochs 2
    torchrun --nproc-per-node 2 examples/with_lightning.py --output runs/lightning --epochs 3

Started again, it goes on from Lightning's last checkpoint, also with another number of processes.
"""

from __future__ import annotations

import os

import lightning
import torch
import torch.distributed as dist
from common import Characters, arguments
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from unicom_ext import ArcFace, PartialMarginSoftmax, gradients
from unicom_ext.encoders.small import Encoder
from unicom_ext.optim import RowAdamW


class Model(lightning.LightningModule):
    def __init__(self, data: Characters) -> None:
        super().__init__()
        self.data = data
        self.encoder = Encoder(embedding_size=128)
        self.loss: PartialMarginSoftmax | None = None

    def configure_model(self) -> None:
        if self.loss is None:  # Lightning has made the process group by now
            self.loss = PartialMarginSoftmax(
                128, self.data.num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5,
                feature_rate=0.75, sparse_grad=True, device=self.device,
                process_group=dist.group.WORLD if dist.is_initialized() else None,
                full_state_dict=True,  # rank 0 writes the checkpoint: of all ranks' classes
            )  # fmt: skip
        # DDP must leave the prototypes alone: each rank has its own.
        self._ddp_params_and_buffers_to_ignore = ["loss.weight", "loss.step"]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        # Lightning counts steps of the optimizer: parts that are accumulated draw the same.
        return self.loss(self.encoder(images), labels, step=self.global_step)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, **_) -> None:
        # Lightning's own takes no sparse gradients, nor does it know other ranks' prototypes.
        gradients.clip_grad_norm_(self.encoder.parameters(), self.loss, gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Of torch's optimizers a checkpoint would hold the moments of rank 0's prototypes alone.
        return RowAdamW(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> DataLoader:
        # Of each epoch it makes an order that a resumed run finds again; Lightning sets the epoch.
        trainer = self.trainer
        sampler = DistributedSampler(self.data, trainer.world_size, trainer.global_rank)
        return DataLoader(self.data, 64, sampler=sampler, drop_last=True)


def main() -> None:
    args = arguments(__doc__)
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # under torchrun
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=args.epochs, devices=ranks, strategy="ddp" if ranks > 1 else "auto",
        precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=5.0, logger=False,
        callbacks=[ModelCheckpoint(args.output, save_last=True, save_on_train_epoch_end=True)],
    )  # fmt: skip
    trainer.fit(Model(Characters(args.classes)), ckpt_path="last")


if __name__ == "__main__":
    main()
