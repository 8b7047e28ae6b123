"""What the examples have in common: characters drawn from fonts to train on, and arguments."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unicom_ext.data import glyphs


class Characters(Dataset[tuple[Tensor, int]]):
    """Images float [1, 32, 32] in [0, 1], and labels. Your own data takes its place.

    Args:
        num_classes: how many of the 1,312 characters; 0 for all.
    """

    def __init__(self, num_classes: int = 0) -> None:
        train, _ = glyphs.split(glyphs.load())
        self.num_classes = num_classes or train.num_classes
        kept = train.labels < self.num_classes
        self.images, self.labels = train.images[kept], train.labels[kept].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index]).float()[None] / 255, self.labels[index]


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="directory of the checkpoints")
    parser.add_argument("--epochs", type=int, default=2, help="when to stop, default 2")
    parser.add_argument("--classes", type=int, default=0, help="characters to train on, 0 for all")
    args = parser.parse_args()
    if args.classes and not 20 <= args.classes <= 1312:  # fewer do not fill a batch of two ranks
        parser.error(f"--classes must be 0 or in [20, 1312], got {args.classes}")
    return args
