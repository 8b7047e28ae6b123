"""Encoders without a neural network: principal components of the pixels, or of their HOG.

They learn from images without labels: ``fit`` comes before everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unicom_ext.data.baselines import CELL, gradient_histograms, principal_axes


class PrincipalComponents(nn.Module):
    """Images float [B, 1, s, s] in [0, 1] -> float [B, dim], the most important features first.

    Its state is the mean of the features and their principal axes, so that a fitted one can be
    saved and loaded.

    Args:
        image_size: side of the images in pixels.
        dim: of the output.
    """

    OUTPUT = "axes"  # its second dimension is dim

    def __init__(self, image_size: int, dim: int) -> None:
        super().__init__()
        features = self.features(torch.zeros(1, 1, image_size, image_size)).shape[1]
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.full((features, dim), torch.nan))
        self.mean: Tensor
        self.axes: Tensor

    @property
    def needs_fitting(self) -> bool:
        """True until `fit`, or until the state of a fitted one is loaded."""
        return bool(self.axes[0, 0].isnan())

    def features(self, images: Tensor) -> Tensor:
        """float [B, f], of which the components are taken."""
        return images.flatten(1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Learn mean and axes.

        Args:
            images: float [n, 1, s, s] in [0, 1], more than dim of them.

        Raises ValueError where there are too few images or features.
        """
        mean, axes = principal_axes(self.features(images), self.axes.shape[1])
        self.mean.copy_(mean)
        self.axes.copy_(axes)

    def forward(self, images: Tensor) -> Tensor:
        if self.needs_fitting:
            raise RuntimeError(f"{type(self).__name__}: fit(images) comes first")
        return (self.features(images) - self.mean) @ self.axes


class GradientHistograms(PrincipalComponents):
    """`PrincipalComponents` of histograms of oriented gradients (Dalal, Triggs, CVPR 2005).

    The side of the images is a multiple of `SIDES`.
    """

    SIDES = CELL

    def features(self, images: Tensor) -> Tensor:
        return gradient_histograms(images[:, 0])
