from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unicom_ext.data.images.preprocessing import Preprocessing
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.small import Encoder


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    name: str
    module: nn.Module
    preprocessing: Preprocessing
    dim: int


def create(settings: EncoderSettings, embedding_size: int = 0) -> ImageEncoder:
    dim = embedding_size or 128
    return ImageEncoder(
        "small", Encoder(dim, settings.width), Preprocessing(32, "L", (0.0,), (1.0,)), dim
    )
