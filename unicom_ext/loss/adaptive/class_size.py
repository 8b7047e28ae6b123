"""Margins made of how many samples a class has."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from unicom_ext.loss.adaptive import batch
from unicom_ext.loss.checks import integer
from unicom_ext.loss.margins import ArcFace, CombinedMargin
from unicom_ext.loss.options import kind
from unicom_ext.ops.transforms import transforming


class ClassSizeMargin(nn.Module):
    """Ha et al., "Google Landmark Recognition 2020 Competition Third Place Solution",
    arXiv:2010.05350: the smaller a class, the larger its margin.

    With n the number of a class's samples::

        psi(c) = cos(arccos(c) + m(n)) ,    m(n) = a * n^(-exponent) + b

    where a and b make the largest class's margin `smallest` and the smallest one's `largest`.

    Args:
        counts: [C] integers >= 0, samples of each class. A class without any gets `largest`, and
            so does each one where all have the same number.
        smallest: margin of the largest class, in radians; 0.05 in the paper.
        largest: margin of the smallest class, in radians; 0.5 in the paper.
        exponent: lambda, > 0; 1/4 in the paper.
        ignore_index: the label of samples that do not count, as the loss's.

    Attributes:
        margins: float32 buffer [C].
    """

    margins: Tensor

    def __init__(
        self,
        counts: Tensor,
        smallest: float = 0.05,
        largest: float = 0.5,
        exponent: float = 0.25,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.smallest = batch.number("smallest", smallest, 0, math.pi)
        self.largest = batch.number("largest", largest, self.smallest, math.pi)
        self.exponent = batch.number("exponent", exponent, 0, math.inf, low_too=False)
        self.ignore_index = integer("ignore_index", ignore_index)
        _check_counts(counts)
        n = counts.to(torch.float64)
        n = n.where(n > 0, n[n > 0].min())
        decay = n**-self.exponent
        least, most = decay.min(), decay.max()  # of the largest class, and of the smallest
        share = (decay - least) / (most - least) if least < most else torch.ones_like(decay)
        margins = self.smallest + (self.largest - self.smallest) * share
        self.register_buffer("margins", margins.to(torch.float32))

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int, **options: Any) -> Self:
        """The margins of classes that have the samples of a data set.

        Args:
            labels: int32 or int64 of any shape, in [0, num_classes) or `ignore_index`.
            num_classes: C, how many classes there are.
            options: those of the constructor.

        Returns:
            The module.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        batch.check_labels(labels)
        num_classes = integer("num_classes", num_classes, 1)
        kept = labels[labels != options.get("ignore_index", -100)]
        if (bad := (kept < 0) | (kept >= num_classes)).any():
            raise ValueError(
                f"labels must be in [0, num_classes = {num_classes}) or ignore_index, got "
                f"{int(kept[bad][0])}"
            )
        return cls(torch.bincount(kept, minlength=num_classes), **options)

    def forward(self, embeddings: Tensor, labels: Tensor) -> CombinedMargin:
        """The margins of a batch.

        Args:
            embeddings: not looked at; it is there as in the other margins.
            labels: [B], or [B, P] with several for each sample; int32 or int64, in [0, C) or
                `ignore_index`.

        Returns:
            m2, float32 like labels. On a GPU, where to look would be to wait, and in a compiled
            graph or a transform of `torch.func`, which cannot look, it is NaN for a label that is
            no class, as its loss is.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        batch.check_labels(labels, self.margins.device)
        num_classes = len(self.margins)
        ignored = labels == self.ignore_index
        bad = ((labels < 0) | (labels >= num_classes)) & ~ignored
        values_are_here = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if values_are_here and not transforming() and bad.any():
            raise ValueError(
                f"labels must be in [0, {num_classes}) or ignore_index ({self.ignore_index}), got "
                f"{int(labels[bad][0])} at position {bad.nonzero()[0].tolist()}"
            )
        margins = self.margins[labels.masked_fill(ignored | bad, 0)]
        return ArcFace(margins.masked_fill(bad, math.nan))

    def extra_repr(self) -> str:
        return (
            f"{len(self.margins)} classes, smallest={self.smallest:g}, largest={self.largest:g}, "
            f"exponent={self.exponent:g}"
        )


def _check_counts(counts: Tensor) -> None:
    if (
        not isinstance(counts, Tensor)
        or counts.is_floating_point()
        or counts.is_complex()
        or counts.dtype == torch.bool
    ):
        raise TypeError(f"counts must be a tensor of integers [C], got {kind(counts)}")
    if counts.dim() != 1:
        raise ValueError(
            f"counts must be a tensor of integers [C], got the shape {list(counts.shape)}"
        )
    if (counts < 0).any():
        position = int((counts < 0).nonzero()[0])
        raise ValueError(f"counts must be >= 0, got {int(counts[position])} at position {position}")
    if not (counts > 0).any():
        raise ValueError("counts must have a class with samples, got none")
