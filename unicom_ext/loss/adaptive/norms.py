"""Margins made of the norms of the embeddings, which tell the quality of an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_ext.loss.adaptive import batch
from unicom_ext.loss.checks import integer
from unicom_ext.loss.margins import ArcFace, CombinedMargin


class AdaFace(batch.OfRanks):
    """Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", arXiv:2204.00964.

    The norm of an embedding, against the norms of late, says how good its image is. Good images
    get their margin where they are hard, bad ones where they are easy::

        q = clip(h * (norm - mean) / (std + 1e-3), -1, 1)
        psi(c) = cos(arccos(c) - m * q) - (m + m * q)

    m2 = -m * q is negative for good images. The paper clips arccos(c) + m2 to [0, pi]: give the
    loss ``beyond_pi="linear"``, which does the same at 0. It trains with the exact derivative,
    ``margin_grad="exact"``.

    Args:
        m: the margin, in radians and as a cosine; 0.4 in the paper.
        h: which part of the norms is beyond the clip; 0.333 in the paper.
        t_alpha: weight of a new batch in mean and std, in (0, 1]; the authors train with 0.01.
        ignore_index: the label of samples that do not count, as the loss's.
        process_group: mean and std are over the batches of all its ranks, of any sizes: one message
            of three numbers. Every rank must call then.
        device: of the buffers.

    Attributes:
        mean: float64 buffer [1], the running mean of the norms, 20 at first.
        std: float64 buffer [1], their running standard deviation, 100 at first.

    Both stay float64 where a model is cast, as a half would not see changes of 1 %. A batch without
    a sample that counts leaves both, one with a single one leaves std; rows with NaN or infinity do
    not count, as their loss is NaN already and to raise would wait for the device.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        m: float = 0.4,
        h: float = 0.333,
        t_alpha: float = 0.01,
        *,
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.m = batch.number("m", m, 0, math.inf)
        self.h = batch.number("h", h, 0, math.inf, low_too=False)
        self.t_alpha = batch.number("t_alpha", t_alpha, 0, 1, low_too=False)
        self.ignore_index = integer("ignore_index", ignore_index)
        self.process_group = process_group
        for name in ("mean", "std"):
            # Not a scalar: compiled graphs take one of float64 for a number, and lose its changes.
            self.register_buffer(name, torch.empty(1, dtype=torch.float64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the first mean and std. To be called after `to_empty`."""
        self.mean.fill_(20.0)
        self.std.fill_(100.0)

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor) -> CombinedMargin:
        """The margins of a batch; in training mode mean and std first take it up.

        Args:
            embeddings: [B, d] floating point, before they are normalised.
            labels: [B], or [B, P] with several for each sample; int32 or int64.

        Returns:
            m2 and m3 [B] float64, without gradient.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has changed then.
            RuntimeError: training repeats the call in backward; or another rank has failed.
        """
        if self.training:
            norms = self._take_up(embeddings, labels)
        else:
            norms, _ = self._norms(embeddings, labels)
        quality = (norms - self.mean) / (self.std + 1e-3)
        quality = (self.h * quality).clamp(-1, 1)
        return CombinedMargin(m2=-self.m * quality, m3=self.m + self.m * quality)

    def _norms(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Clipped norms, and which of them count, both [B]."""
        batch.check_labels(labels, self.mean.device)
        batch.check_embeddings(embeddings, labels)
        kept = batch.with_part(labels, self.ignore_index)
        norms = batch.norms(embeddings, kept)
        return norms.to(torch.float64).clamp(0.001, 100.0), kept & norms.isfinite()

    def _take_up(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Change mean and std by a batch, whose clipped norms are returned."""
        norms: Tensor

        def summary() -> Tensor:
            """Of this rank's norms: their number, mean, and sum of squared distances from it."""
            nonlocal norms
            batch.refuse_repetition(self)
            norms, counted = self._norms(embeddings, labels)
            count = counted.sum()
            mean = norms.where(counted, 0.0).sum() / count.clamp(min=1)
            distance = (norms - mean).where(counted, 0.0)
            return torch.stack([count.to(mean.dtype), mean, distance.square().sum()])

        # Squares about each rank's own mean lose no digits, and all comes in one message.
        of_ranks = batch.of_all_ranks(summary, 3, self.mean.device, self.process_group)
        counts, means, squares = of_ranks.unbind(dim=1)
        count = counts.sum()
        mean = (counts * means).sum() / count.clamp(min=1)
        squares = squares + counts * (means - mean).square()
        std = (squares.sum() / (count - 1).clamp(min=1)).sqrt()
        self.mean.lerp_(mean, self.t_alpha * (count > 0).to(mean.dtype))
        self.std.lerp_(std, self.t_alpha * (count > 1).to(std.dtype))
        return norms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.mean, self.std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Devices change, the type does not.
        self.mean, self.std = (
            new if new.dtype == old.dtype else old.to(new.device)
            for old, new in zip(before, (self.mean, self.std), strict=True)
        )
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # With assign=True they are what was saved, perhaps of a model that was cast.
        self.mean, self.std = self.mean.double(), self.std.double()

    def extra_repr(self) -> str:
        return f"m={self.m:g}, h={self.h:g}, t_alpha={self.t_alpha:g}"


class MagFace(nn.Module):
    """Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality
    Assessment", arXiv:2103.06627.

    With a the norm of an embedding, clipped to [l_a, u_a]::

        psi(c) = cos(arccos(c) + m(a)),    m(a) = l_m + (u_m - l_m) * (a - l_a) / (u_a - l_a)

    The loss falls with the norm of an easy sample by way of the regularizer, and m(a) keeps the
    norms of hard ones small, so the regularizer is a part of it::

        loss(x, labels, margin=margins(x, labels)) + margins.regularizer(x, labels)

    The norms get their gradient through both. The paper trains with ``margin_grad="exact"`` and
    a continuation beyond pi, ``beyond_pi="linear"``.

    Args:
        l_a: least norm, 10 in the paper; below it a norm has no gradient.
        u_a: largest norm, 110 in the paper; above it a norm has no gradient.
        l_m: margin at the least norm, in radians; 0.45 in the authors' code.
        u_m: margin at the largest norm, in radians; 0.8 in the authors' code.
        lambda_g: weight of the regularizer; 35 in the paper.
        ignore_index: the label of samples that do not count, as the loss's.
    """

    def __init__(
        self,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        lambda_g: float = 35.0,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.l_a = batch.number("l_a", l_a, 0, math.inf, low_too=False)
        self.u_a = batch.number("u_a", u_a, self.l_a, math.inf, low_too=False)
        self.l_m = batch.number("l_m", l_m, 0, math.pi)
        self.u_m = batch.number("u_m", u_m, self.l_m, math.pi)
        self.lambda_g = batch.number("lambda_g", lambda_g, 0, math.inf)
        self.ignore_index = integer("ignore_index", ignore_index)

    def forward(self, embeddings: Tensor, labels: Tensor) -> CombinedMargin:
        """The margins of a batch.

        Args:
            embeddings: [B, d] floating point, before they are normalised.
            labels: [B], or [B, P] with several for each sample; int32 or int64.

        Returns:
            m2 [B], float32 at least, with a gradient to the embeddings.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        a, _ = self._clipped_norms(embeddings, labels)
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        return ArcFace(self.l_m + slope * (a - self.l_a))

    def regularizer(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """lambda_g times the mean of g(a) = a / u_a^2 + 1 / a over samples that are not ignored.

        Args:
            embeddings: as for the margins. With several ranks this rank's own, whose mean
                `DistributedDataParallel` averages over the ranks.
            labels: as for the margins.

        Returns:
            A scalar, float32 at least; 0 if all samples are ignored.
        """
        a, kept = self._clipped_norms(embeddings, labels)
        g = (a / self.u_a**2 + 1 / a).where(kept, 0.0)
        return self.lambda_g * g.sum() / kept.sum().clamp(min=1)

    def _clipped_norms(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """a, and whether the sample has part in the loss, both [B]."""
        batch.check_labels(labels)
        batch.check_embeddings(embeddings, labels)
        kept = batch.with_part(labels, self.ignore_index)
        return batch.norms(embeddings, kept).clamp(self.l_a, self.u_a), kept

    def extra_repr(self) -> str:
        return (
            f"l_a={self.l_a:g}, u_a={self.u_a:g}, l_m={self.l_m:g}, u_m={self.u_m:g}, "
            f"lambda_g={self.lambda_g:g}"
        )
