"""The Trainer of Hugging Face, with a model that returns its loss. Started again, it goes on.

    python examples/with_transformers.py --output runs/transformers --epochs 2

In one process: on several ranks the Trainer asks the first one alone for the state of all classes;
use Accelerate there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import Characters, arguments
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.encoders.small import Encoder


class Model(nn.Module):
    """The loss is a part of it, so that the Trainer trains the prototypes and saves them.

    Given to the Trainer as `compute_loss_func` they would never move.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(embedding_size=128)
        self.loss = PartialMarginSoftmax(
            128, num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75
        )

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.encoder(images), labels)}


def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return dict(zip(("images", "labels"), default_collate(items), strict=True))


def main() -> None:
    args = arguments(__doc__)
    set_seed(0)
    data = Characters(args.classes)
    trainer = Trainer(
        Model(data.num_classes),
        TrainingArguments(
            args.output, num_train_epochs=args.epochs, save_strategy="epoch", learning_rate=2e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=64, bf16=True,
            gradient_accumulation_steps=2, max_grad_norm=5.0, remove_unused_columns=False,
            dataloader_drop_last=True, report_to="none", use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=data,
    )  # fmt: skip
    last = get_last_checkpoint(args.output) if Path(args.output).exists() else None
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main()
