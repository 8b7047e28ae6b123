"""Cleaning with sub-centres: which prototype of its class each sample is nearest to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor, nn

from unicom_ext.distributed.failures import check_same
from unicom_ext.loss import checks
from unicom_ext.loss.inference import agreed, gathered
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.loss.options import kind
from unicom_ext.utils.search import DEFAULT_BLOCK_BYTES, VALUE_BYTES, unit_rows

__all__ = ["SubCenters"]


class SubCenters:
    """How the samples of each class spread over its centres, and what follows from that.

    Where labels are noisy, a loss with `num_centers` K > 1 gathers most right samples of a class at
    one centre, its dominant one, and wrong or hard ones at others. Sub-center ArcFace (Deng et al.,
    ECCV 2020) then drops the other centres, and the samples far from the dominant one, and trains
    again with one centre::

        centers = SubCenters(loss_fn)
        for images, labels in loader:
            centers.add(encoder(images), labels)
        keep = torch.cat([centers.is_clean(encoder(images), labels) for images, labels in loader])
        loss_fn = centers.to_single_center()

    All is computed in double, and all dimensions take part. With a process group every rank makes
    one and calls the same methods with samples of its own, of which there may be any number; what
    is wrong on one rank is raised on all, on the others as a RuntimeError that names the rank.

    Args:
        loss_fn: of the prototypes, which are looked at as they are when a method is called.

    Attributes:
        counts: int64 [C, K], how many of the samples so far are nearest to each centre (with a
            process group of this rank's classes, and of the samples of all ranks).
    """

    def __init__(self, loss_fn: PartialMarginSoftmax) -> None:
        if not isinstance(loss_fn, PartialMarginSoftmax):
            raise TypeError(f"loss_fn must be a PartialMarginSoftmax, got {type(loss_fn).__name__}")
        self._loss = loss_fn
        self._centers = loss_fn.options.num_centers
        shape = loss_fn._num_rows // self._centers, self._centers
        with torch.inference_mode(False):  # what is made in it could not be counted on outside
            self.counts = torch.zeros(shape, dtype=torch.int64, device=loss_fn.weight.device)

    @property
    def dominant(self) -> Tensor:
        """int64 [C], the centre of each class with the most samples; of equals the first."""
        return self.counts.argmax(dim=1)

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Count the samples of a batch.

        Args:
            embeddings: [b, d] floating point, of any norm, on the device of the prototypes.
            labels: [b] int32 or int64, in [0, C) or the `ignore_index` of the loss.

        Returns:
            int64 [b], the centre of its class that each sample is nearest to, of equals the first;
            -1 where ignored.

        Raises:
            TypeError, ValueError: an argument is wrong, or a row is not finite in float32; nothing
                has been counted then, on any rank.
        """

        def nearest(x: Tensor, centers: Tensor, _: Tensor) -> Tensor:
            # Not a matrix product, in which equal rows may get different cosines.
            return (centers * x[:, None]).sum(dim=2).argmax(dim=1)

        found, classes, of_classes = self._in_own_class(embeddings, labels, nearest)
        places = classes * self._centers + of_classes.long()
        if self.counts.device != places.device:  # where the loss has moved to
            with torch.inference_mode(False):
                self.counts = (
                    torch.zeros_like(self.counts, device=places.device)
                    if self.counts.is_meta
                    else self.counts.to(places.device)
                )
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))
        return found.nan_to_num(-1).long()

    @torch.no_grad()
    def is_clean(
        self, embeddings: Tensor, labels: Tensor, max_angle: float = math.radians(75)
    ) -> Tensor:
        """Which samples lie near the dominant centre of their class.

        Args:
            embeddings: as for `add`.
            labels: as for `add`.
            max_angle: radians in (0, pi], from the dominant centre; 75 degrees in the paper. With a
                process group the same on every rank.

        Returns:
            bool [b]; False where ignored.

        Raises:
            TypeError, ValueError: as `add`.
        """

        def angle(x: Tensor, centers: Tensor, classes: Tensor) -> Tensor:
            own = centers.take_along_dim(self.dominant[classes].to(x.device)[:, None, None], 1)[
                :, 0
            ]
            # Exact near 0 and pi, where the arccosine of a rounded cosine is not.
            apart, together = (own - x).norm(dim=1), (own + x).norm(dim=1)
            return 2 * torch.atan2(apart, together)

        found, _, _ = self._in_own_class(
            embeddings, labels, angle, ("max_angle", lambda: _checked_angle(max_angle))
        )
        return found <= max_angle  # which no NaN is

    @torch.no_grad()
    @torch.inference_mode(False)  # what is made in it could not be trained
    def to_single_center(self) -> PartialMarginSoftmax:
        """A loss with one prototype for each class, its dominant centre.

        Returns:
            The loss, with the options, step and mode of this one. Its prototypes are new tensors,
            of which no optimizer knows.

        Raises:
            RuntimeError: `weight` is made of other parameters, as by `weight_norm`.
        """
        loss = self._loss
        if "weight" not in loss._parameters:
            raise RuntimeError(
                "to_single_center() cannot take prototypes from a weight that weight_norm, "
                "parametrize or prune has made a function of other parameters; remove that first"
            )
        prototypes = loss.weight.detach().unflatten(0, (-1, self._centers))
        dominant = self.dominant.to(prototypes.device)
        chosen = prototypes.take_along_dim(dominant[:, None, None], 1)[:, 0]
        weight = nn.Parameter(chosen, requires_grad=loss.weight.requires_grad)
        single = copy.deepcopy(loss, {id(loss.weight): weight})
        single.options = replace(loss.options, num_centers=1)
        if loss.shard is not None:
            single.shard = type(loss.shard)(loss.shard.group, loss.num_classes)
        return single

    def _in_own_class(
        self,
        embeddings: Tensor,
        labels: Tensor,
        value: Callable[[Tensor, Tensor, Tensor], Tensor],
        setting: tuple[str, Callable[[], float]] = ("", lambda: 0.0),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`value` of each sample of this rank, float64 [b], NaN where ignored; and the numbers of
        this rank's classes [m] of which all ranks' samples are, with their values.

        value: from unit embeddings [n, d], the unit centres [n, K, d] of their classes, and the
            numbers [n] of these among this rank's.
        setting: the name of what must be the same on every rank, and what makes or refuses it.
        """
        loss, ranks, ignored = self._loss, self._loss._ranks(), self._loss.ignore_index
        weight, (name, checked) = loss.weight.detach(), setting

        def check() -> tuple[int, float]:
            loss._check_embeddings(embeddings, weight)
            if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"labels must be an int32 or int64 tensor, got {kind(labels)}")
            if labels.shape != embeddings.shape[:1]:
                raise ValueError(
                    f"labels must have shape [{len(embeddings)}], got {list(labels.shape)}"
                )
            if labels.device != weight.device:
                raise ValueError(
                    f"labels must be on {weight.device} like the prototypes, got {labels.device}"
                )
            checks.check_labels(labels, loss.num_classes, ignored)
            return len(embeddings), checked()

        sizes, settings = zip(*agreed(check, ranks), strict=True)
        check_same(name, list(settings))
        most = max(sizes)
        x = gathered(unit_rows("embeddings", embeddings, 0), most, ranks)
        # Sent as label + 1, so that what batches are filled up with is no class.
        ids = gathered((labels.long() + 1).masked_fill(labels == ignored, 0), most, ranks) - 1
        result = x.new_zeros(len(x))
        own = ((ids >= loss._start) & (ids < loss._start + len(self.counts))).nonzero().flatten()
        size = max(1, DEFAULT_BLOCK_BYTES // (VALUE_BYTES * self._centers * x.shape[1]))
        center = torch.arange(self._centers, device=ids.device)
        with ranks.together():
            for part in own.split(size):
                rows = (ids[part, None] * self._centers + center).flatten()  # of all prototypes
                units = unit_rows("prototypes", weight[rows - loss._start * self._centers], rows)
                classes = ids[part] - loss._start
                result[part] = value(
                    x[part], units.unflatten(0, (-1, self._centers)), classes
                ).double()
        of_classes = result[own]
        ranks.sum(result)  # of which all but one are 0
        first = ranks.rank * most
        found = result[first : first + len(embeddings)].masked_fill(labels == ignored, math.nan)
        return found, ids[own] - loss._start, of_classes


def _checked_angle(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"max_angle must be radians in (0, pi], got {value!r}")
    if not 0 < float(value) <= math.pi:
        raise ValueError(f"max_angle must be radians in (0, pi], got {value}")
    return float(value)
