"""What an image encoder is, and what is asked for when one is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unicom_ext.data.images.preprocessing import RESAMPLING, Preprocessing
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.weights import Saved
from unicom_ext.utils.settings import ConfigError


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A network and the images that it wants.

    name           as it was asked for
    module         float [B, channels, size, size] -> float [B, dim], not normalised
    preprocessing  from a picture to its input
    dim            of its output
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    dim: int

    @property
    def needs_fitting(self) -> bool:
        """Whether ``module.fit(images)`` has to come first; see `classical`."""
        return getattr(self.module, "needs_fitting", False)


class WithHead(nn.Module):
    """An encoder of another size than is wanted, and a linear layer with batch normalisation."""

    def __init__(self, body: nn.Module, dim: int, embedding_size: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(
            nn.Linear(dim, embedding_size, bias=False), nn.BatchNorm1d(embedding_size)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


@dataclass(frozen=True, eq=False)
class Request:
    """What `create` was asked for: settings, an embedding_size or 0, and weights or none."""

    settings: EncoderSettings
    embedding_size: int
    saved: Saved | None

    @property
    def name(self) -> str:
        return self.settings.encoder

    @property
    def argument(self) -> str:
        """What follows the colon of its name."""
        return self.name.partition(":")[2]

    def dim(self, output: str, own: int, axis: int = 0) -> int:
        """Of an encoder that can have any: as in the weights, where that is axis `axis` of the
        tensor `output`; else what was asked for; else its own."""
        there = None if self.saved is None else self.saved.body.get(output)
        if there is not None and there.ndim == 2:
            return there.shape[axis]
        return self.embedding_size or own

    def image_size(self, own: int, at_least: int = 1, multiple_of: int = 1) -> int:
        size = self.settings.image_size or own
        if size < at_least or size % multiple_of:
            several = f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise ConfigError(
                f"image_size: got {size}, must be at least {at_least}{several} for {self.name}"
            )
        return size

    def made(self, module: nn.Module, preprocessing: Preprocessing) -> ImageEncoder:
        """The encoder of a module that others have written: its output is looked at."""
        if preprocessing.interpolation not in RESAMPLING:
            raise ConfigError(
                f"encoder: {self.name} scales its images by {preprocessing.interpolation!r}, must "
                f"be {' or '.join(RESAMPLING)}"
            )
        if self.settings.image_size:
            preprocessing = dataclasses.replace(preprocessing, size=self.settings.image_size)
        shape = (1, preprocessing.channels, preprocessing.size, preprocessing.size)
        modes = {part: part.training for part in module.modules()}
        module.eval()  # statistics of batches stay as they are
        try:
            with torch.no_grad():
                output = module(torch.zeros(shape))
        except Exception as error:
            raise ConfigError(
                f"encoder: {self.name} does not take images {list(shape)}: {error}"
            ) from error
        finally:
            for part, mode in modes.items():
                part.training = mode
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"encoder: {self.name} gives {got} for images {list(shape)}, must give a tensor "
                "[1, dim]"
            )
        return ImageEncoder(self.name, module, preprocessing, output.shape[1])
