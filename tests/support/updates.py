"""Losses with row optimizers that may update them inside backward."""

from __future__ import annotations

import torch

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.optim import RowAdamW, RowSGD

OPTIMIZERS = {
    "adamw": lambda p: RowAdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-bf16": lambda p: RowAdamW(p, lr=0.1, moment_dtype=torch.bfloat16),
    "adamw-row": lambda p: RowAdamW(p, lr=0.1, row_second_moment=True),
    "sgd": lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-exact": lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, exact=True),
}


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"sample_rate": 0.2, "feature_rate": 0.5, "scale": 16.0, **options}
    return PartialMarginSoftmax(
        22, 300, margin=ArcFace(0.3), sparse_grad=True, dtype=dtype, **options
    )


def batch(seed, size=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 22, generator=generator).to(dtype).requires_grad_()
    return x, torch.randint(300, (size,), generator=generator)


def weights_after(optimizer, make_loss, batches):
    """The prototypes after steps on (embeddings, labels), updated after backward and inside it."""
    weights = []
    for inside in (False, True):
        loss_fn = make_loss()
        rows = optimizer(loss_fn.parameters())
        if inside:
            rows.update_in_backward(loss_fn)
        for embeddings, labels in batches:
            rows.zero_grad()
            loss_fn(embeddings, labels).backward()
            rows.step()
        weights.append(loss_fn.weight.detach())
    return weights
