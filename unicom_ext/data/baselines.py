"""What images can be retrieved by without a neural network: the rows to beat in a table.

    raw_pixels  grey values, centred, PCA
    hog         histograms of oriented gradients (Dalal, Triggs, CVPR 2005), PCA
    lda         linear discriminant analysis of the grey values: supervised, but linear
    hog_lda     linear discriminant analysis of the HOG features: the strongest of the four

Each is a function of

    train_images  uint8 [m, h, w], to fit on: its classes should not occur in `images`
    train_labels  integers [m]; only the two discriminant analyses look at them
    images        uint8 [n, h, w]
    dim           number of features; needs m > dim, and for the discriminant analyses more than
                  dim train classes

and returns fp32 [n, dim], the most important features first, so that any number of leading ones is
the best that the method has for that size. NumPy arrays and CPU tensors are accepted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray | Tensor

PCA_BEFORE_LDA = 256  # keeps the within-class scatter well conditioned
CELL = 4  # side of a cell of HOG, in pixels


def raw_pixels(train_images: Array, train_labels: Array, images: Array, dim: int = 128) -> Tensor:
    train, test = _as_pixels("train_images", train_images), _as_pixels("images", images)
    return _pca(train.flatten(1), test.flatten(1), dim)[1]


def hog(train_images: Array, train_labels: Array, images: Array, dim: int = 128) -> Tensor:
    train, test = _as_pixels("train_images", train_images), _as_pixels("images", images)
    return _pca(gradient_histograms(train), gradient_histograms(test), dim)[1]


def lda(train_images: Array, train_labels: Array, images: Array, dim: int = 128) -> Tensor:
    train, test = _as_pixels("train_images", train_images), _as_pixels("images", images)
    return _discriminants(train.flatten(1), train_labels, test.flatten(1), dim)


def hog_lda(train_images: Array, train_labels: Array, images: Array, dim: int = 128) -> Tensor:
    train, test = _as_pixels("train_images", train_images), _as_pixels("images", images)
    return _discriminants(gradient_histograms(train), train_labels, gradient_histograms(test), dim)


BASELINES = {"raw pixels": raw_pixels, "HOG": hog, "LDA": lda, "HOG + LDA": hog_lda}


def _as_pixels(name: str, images: Array) -> Tensor:
    """fp32 [n, h, w] in [0, 1]."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 3 or len(images) == 0:
        raise ValueError(
            f"{name}: got {images.dtype} {list(images.shape)}, must be uint8 [n, h, w], n >= 1"
        )
    return images.float() / 255


def principal_axes(train: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean [f] and the `dim` leading principal axes [f, dim] of train fp32 [m, f].

    Raises ValueError, which calls the number `dim`, where there are not so many.
    """
    if not 1 <= dim <= min(len(train) - 1, train.shape[1]):
        raise ValueError(
            f"dim: got {dim}, must be from 1 to {min(len(train) - 1, train.shape[1])} with "
            f"{len(train)} train images of {train.shape[1]} features"
        )
    mean = train.mean(0)
    train = train - mean
    if len(train) < train.shape[1]:
        axes = torch.linalg.svd(train.double(), full_matrices=False).Vh[:dim].T
    else:
        _, axes = torch.linalg.eigh((train.T @ train).double())  # smallest first
        axes = axes[:, -dim:].flip(1)
    return mean, axes.float()


def _pca(train: Tensor, test: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both projected on the `dim` leading principal axes of train [m, f], centred at its mean."""
    mean, axes = principal_axes(train, dim)
    return (train - mean) @ axes, (test - mean) @ axes


def _discriminants(train: Tensor, labels: Array, test: Tensor, dim: int) -> Tensor:
    """Fisher's discriminants [n, dim] of test, fitted on train [m, f] and labels [m].

    They maximise the variance of the class means where the variance within classes is 1. Each is
    then scaled by the standard deviation of the means along it: otherwise a direction that hardly
    separates classes weighs as much in a cosine as the best one, and dimensions past the first few
    make retrieval worse.
    """
    train, test = _pca(train, test, max(dim, min(PCA_BEFORE_LDA, train.shape[1], len(train) - 1)))
    labels = torch.as_tensor(labels)
    if labels.shape != train.shape[:1]:
        raise ValueError(f"train_labels: got shape {list(labels.shape)}, must be [{len(train)}]")
    _, of_class, count = labels.unique(return_inverse=True, return_counts=True)
    if not 1 <= dim < len(count) < len(train):
        raise ValueError(
            f"dim: got {dim}, must be from 1 to {len(count) - 1}, one less than the number of "
            f"train classes, and these fewer than the {len(train)} train images"
        )
    train, count = train.double(), count[:, None].double()
    means = torch.zeros(len(count), train.shape[1], dtype=torch.float64)
    means.index_add_(0, of_class, train).div_(count)
    within = train - means[of_class]
    within = within.T @ within / (len(train) - len(count))
    within.diagonal().add_(1e-6 * within.diagonal().mean())  # a feature may be constant
    root = torch.linalg.cholesky(within)
    # In coordinates root^-1 x the classes have unit variance. The mean of train is zero already.
    whitened = torch.linalg.solve_triangular(root, means.T * count.T.sqrt(), upper=False)
    between, axes = torch.linalg.eigh(whitened @ whitened.T)  # smallest first
    between, axes = between[-dim:].flip(0), axes[:, -dim:].flip(1)
    projection = (
        torch.linalg.solve_triangular(root.T, axes, upper=True) * between.clamp_min(0).sqrt()
    )
    return test @ projection.float()


def gradient_histograms(images: Tensor, bins: int = 9, cell: int = CELL) -> Tensor:
    """HOG features [n, f] of images [n, h, w], h and w multiples of `cell`.

    Unsigned gradient angles, linear interpolation between neighbouring bins; histograms over
    windows of 2 x 2 cells, a cell apart; blocks of 2 x 2 histograms normalised, clipped at 0.2 and
    normalised again.
    """
    return torch.cat([_histograms_of(part[:, None], bins, cell) for part in images.split(1024)])


def _histograms_of(x: Tensor, bins: int, cell: int) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    position = torch.atan2(dy, dx) / math.pi * bins  # in bins; an angle and its opposite agree
    lower = position.floor()
    upper_share = position - lower
    lower = lower.long() % bins
    strength = torch.hypot(dx, dy)
    votes = x.new_zeros(len(x), bins, *x.shape[2:])
    votes.scatter_add_(1, lower, strength * (1 - upper_share))
    votes.scatter_add_(1, (lower + 1) % bins, strength * upper_share)
    histograms = F.avg_pool2d(votes, 2 * cell, stride=cell, padding=cell // 2)
    blocks = F.unfold(histograms, 2)  # [n, 4 bins, number of blocks]
    blocks = blocks / (blocks.norm(dim=1, keepdim=True) + 0.02)  # flat areas stay small
    return F.normalize(blocks.clamp(max=0.2), dim=1).flatten(1)
