"""PyTorch Metric Learning's trainer and a miner of it. Started again, it goes on.

python examples/with_metric_learning.py --output runs/metric-learning --epochs 2
"""

from __future__ import annotations

import torch
from common import Characters, arguments
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.utils.data import DistributedSampler

from unicom_ext import checkpoint
from unicom_ext.compat.metric_learning import ArcFaceLoss
from unicom_ext.encoders.small import Encoder


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    data = Characters(args.classes)
    encoder = Encoder(embedding_size=128).to(device)
    loss_fn = ArcFaceLoss(
        data.num_classes, 128, margin=17, scale=32, sample_rate=0.5, feature_rate=0.75,
        device=device,
    )  # fmt: skip
    # One for both. (The trainer may have several; prototypes that are in none would stand still.)
    optimizer = torch.optim.AdamW(
        [
            {"params": encoder.parameters(), "lr": 2e-3},
            {"params": loss_fn.parameters(), "lr": 1.0, "weight_decay": 0.0},
        ]
    )
    state = {"modules": {"encoder": encoder, "loss": loss_fn}, "optimizers": {"main": optimizer}}
    last = checkpoint.latest(args.output)
    start = checkpoint.load(last, **state)["epoch"] if last else 0

    order = DistributedSampler(data, num_replicas=1, rank=0)  # an order for each epoch's number
    order.set_epoch(start)

    def after_epoch(trainer: MetricLossOnly) -> None:
        order.set_epoch(trainer.epoch)
        extra = {"epoch": trainer.epoch}
        checkpoint.save(f"{args.output}/step-{trainer.epoch}", **state, extra=extra)

    trainer = MetricLossOnly(
        models={"trunk": encoder},
        optimizers={"trunk_optimizer": optimizer},
        batch_size=64,
        loss_funcs={"metric_loss": loss_fn},
        mining_funcs={"tuple_miner": MultiSimilarityMiner()},
        dataset=data,
        sampler=order,
        data_device=device,
        dataloader_num_workers=0,
        end_of_epoch_hook=after_epoch,
    )
    trainer.train(start_epoch=start + 1, num_epochs=args.epochs)  # which count from 1


if __name__ == "__main__":
    main()
