"""A plain loop: autocast, accumulation, clipping, and checkpoints. Started again, it goes on.

    python examples/plain_loop.py --output runs/plain --epochs 2

Only the rows of sampled classes have a gradient (`sparse_grad`) and are updated (`RowAdamW`).
"""

from __future__ import annotations

import torch
from common import Characters, arguments
from torch.utils.data import DataLoader

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint
from unicom_ext.encoders.small import Encoder
from unicom_ext.optim import RowAdamW, clip_grad_norm_

BATCH, PARTS = 128, 2  # images of a step; parts that go through the encoder one after the other


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    data = Characters(args.classes)
    encoder = Encoder(embedding_size=128).to(device)
    loss_fn = PartialMarginSoftmax(
        128, data.num_classes, margin=ArcFace(0.3), scale=32.0, sample_rate=0.5, feature_rate=0.75,
        sparse_grad=True, device=device,
    )  # fmt: skip
    parameters = [*encoder.parameters(), *loss_fn.parameters()]
    optimizer = RowAdamW(
        [
            {"params": encoder.parameters(), "lr": 2e-3},
            {"params": loss_fn.parameters(), "lr": 1e-2},
        ]
    )

    state = {"modules": {"encoder": encoder, "loss": loss_fn}, "optimizers": {"main": optimizer}}
    start = step = 0
    if last := checkpoint.latest(args.output):
        extra = checkpoint.load(last, **state)
        start, step = extra["epoch"], extra["step"]

    for epoch in range(start, args.epochs):
        order = torch.Generator().manual_seed(epoch)  # so that no state of it has to be saved
        for images, labels in DataLoader(data, BATCH, True, generator=order, drop_last=True):
            images, labels = images.to(device), labels.to(device)
            for x, y in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
                with torch.autocast(device.type, torch.bfloat16):
                    embeddings = encoder(x)
                # With `step` all parts draw the same classes and dimensions.
                loss = loss_fn(embeddings, y, step=step) / PARTS
                loss.backward()
            clip_grad_norm_(parameters, max_norm=5.0)  # torch's own takes no sparse gradients
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        print(f"epoch {epoch}: loss {PARTS * loss.item():.3f}")
        extra = {"epoch": epoch + 1, "step": step}
        checkpoint.save(f"{args.output}/step-{step}", **state, extra=extra)


if __name__ == "__main__":
    main()
