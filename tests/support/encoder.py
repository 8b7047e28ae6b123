"""Encoders of the user's own, by names such as support.encoder:mean_colour."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.encoders.encoder import ImageEncoder


class MeanColour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def mean_colour() -> nn.Module:
    return MeanColour()


def flat() -> ImageEncoder:
    """Without batch normalisation: embeddings do not depend on what else is in a batch."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8))
    return ImageEncoder("flat", module, Preprocessing(32, "L", (0.0,), (1.0,)), 8)


def dropping() -> ImageEncoder:
    """`flat` with noise in training."""
    made = flat()
    return replace(made, module=nn.Sequential(made.module, nn.Dropout(0.5)))
