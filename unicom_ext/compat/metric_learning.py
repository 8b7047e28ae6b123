"""Losses for PyTorch Metric Learning: change the import, keep miners, reducers and trainer.

    from unicom_ext.compat.metric_learning import ArcFaceLoss

    loss_fn = ArcFaceLoss(num_classes, 512, margin=28.6, scale=64, sample_rate=0.1)
    loss = loss_fn(embeddings, labels, miner(embeddings, labels))

With the defaults losses and gradients are those of the library's own losses of these names. What
differs:

- The prototypes are ``loss_fn.head.weight`` [C, d], of a `PartialMarginSoftmax`, not W [d, C].
- `get_logits` is for inference: it has no gradient.
- The loss must be where the embeddings are: it is not moved at its first call.
- Labels may be `ignore_index`. Such samples are left out before the reducer sees them.
- With `process_group` the ranks share the classes. It stands instead of `DistributedLossWrapper`.
"""

# The library has no annotations, and need not be there.
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.loss.prototypes import STANDARD_DEVIATION

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
except ModuleNotFoundError as error:
    raise ImportError(
        f"unicom_ext.compat.metric_learning needs the package {error.name}, which is not "
        "installed: pip install 'pytorch-metric-learning>=2.9'"
    ) from error

__all__ = ["ArcFaceLoss", "CosFaceLoss", "PartialMarginLoss"]

_LABELS = (  # those that fit into int64
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32),
)
_OF_ALL_CLASSES = ("weight_regularizer", "weight_init_func")
_OF_THE_LIBRARY = (
    *("reducer", "distance", "collect_stats"),
    *("embedding_regularizer", "embedding_reg_weight", "weight_reg_weight"),
    *_OF_ALL_CLASSES,
)


class PartialMarginLoss(WeightRegularizerMixin, BaseMetricLossFunction):
    """`PartialMarginSoftmax` as a loss of PyTorch Metric Learning, with any margin.

    Args:
        num_classes: C, of all ranks.
        embedding_size: d.
        margin: such as ``CombinedMargin(1.0, 0.5, 0.1)`` (radians).
        scale: s > 0.
        keywords: those of the library's losses: `reducer`, `embedding_regularizer`,
            `weight_regularizer`, `weight_init_func` (which fills a [d, C] view) and so on;
            `distance` must be a plain `CosineSimilarity`. And those of `PartialMarginSoftmax`:
            `sample_rate`, `feature_rate`, `seed`, `process_group`, `num_centers` and so on, but for
            `reduction`, in whose place there is the reducer. ``margin_grad="exact"`` and
            ``beyond_pi="linear"`` are the defaults here, as the library has them.

    Attributes:
        head: the `PartialMarginSoftmax`, with ``reduction="none"``. Its prototypes begin with a
            standard deviation of 1 as the library's do, not 0.01: the longer a prototype, the less
            a step of an optimizer turns it. A schedule sets ``loss_fn.head.scale`` or ``.margin``.
        num_classes, scale: of the head.
        avg_angle: where the library collects statistics, the mean angle in degrees between the
            embeddings and their prototypes at the last call.

    With `process_group` every rank calls the loss with a batch of its own. Each rank's reducer sees
    the rank's own samples, and what is trained on is the mean of the ranks' results, as where
    `DistributedDataParallel` averages gradients. A regularizer or initialisation of the weights,
    which would see one rank's classes alone, is refused. All ranks must run backward.

    Raises TypeError, ValueError as `PartialMarginSoftmax` does, and where a keyword is refused.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: CombinedMargin,
        scale: float = 64,
        **keywords: Any,
    ) -> None:
        theirs = {name: keywords.pop(name) for name in _OF_THE_LIBRARY if name in keywords}
        if "reduction" in keywords:
            raise TypeError(
                f"reduction must be left to a reducer, got {keywords['reduction']!r}: give "
                "reducer=MeanReducer(), SumReducer() or another of pytorch_metric_learning"
            )
        for name in _OF_ALL_CLASSES:
            if keywords.get("process_group") is not None and theirs.get(name) is not None:
                raise ValueError(
                    f"{name} must be None with process_group, where no rank has the weights of all "
                    f"classes, got {theirs[name]!r}"
                )
        super().__init__(**theirs)
        distance = self.distance
        if type(distance) is not CosineSimilarity or distance.power != 1:
            raise ValueError(f"distance must be CosineSimilarity() of power 1, got {distance!r}")
        options = {"margin_grad": "exact", "beyond_pi": "linear", **keywords}
        self.head = _Head(
            embedding_size, num_classes, margin=margin, scale=scale, reduction="none", **options
        )
        if theirs.get("weight_init_func") is not None:
            self.weight_init_func(self.head.weight.detach().T)
        self.add_to_recordable_attributes(list_of_names=["num_classes", "scale"])
        self.add_to_recordable_attributes(name="avg_angle", is_stat=True)

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def scale(self) -> float:
        return self.head.scale

    def get_default_distance(self) -> nn.Module:
        return CosineSimilarity()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The reduced loss of a batch.

        Args:
            embeddings: [B, d] floating point.
            labels: [B] integers, on any device, in [0, C) or `ignore_index`.
            indices_tuple: what a miner found, three or four tensors of places in the batch: the
                loss of a sample is weighted by how often it stands there, relative to the most
                frequent one. Nothing, or nothing found: every weight is 1.
            ref_emb, ref_labels: must be left out, or be embeddings and labels again.

        Returns:
            What the reducer makes of the losses: a scalar, or with `DoNothingReducer` their
            dictionary, in which ``["loss"]["losses"]`` is [B'] of the samples that are not ignored.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has changed then. With a process
                group every rank raises if one has a bad batch.
        """
        # Not the base class's own forward: where a batch is bad it raises on one rank alone.
        self.reset_stats()
        loss_dict = self.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self.add_embedding_regularization_to_loss_dict(loss_dict, embeddings)
        result = self.reducer(loss_dict, embeddings, labels)
        if self.head.shard is not None and isinstance(result, Tensor):
            # A reducer may take no sample of this rank, but the others need its backward pass.
            result = result + loss_dict["loss"]["losses"].flatten()[:0].sum()
        return result

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The losses of the samples, as reducers take them."""
        weights = None
        if isinstance(labels, Tensor) and isinstance(embeddings, Tensor):
            try:
                _check_batch(embeddings, labels, ref_emb, ref_labels)
                if labels.dtype in _LABELS:
                    labels = labels.to(embeddings.device, torch.int64)
                    weights = convert_to_weights(indices_tuple, labels, torch.float64)
            except Exception as error:
                if self.head.shard is None:
                    raise
                self.head.refused = error
                labels = labels.new_full(
                    embeddings.shape[:1], self.head.ignore_index, dtype=torch.int64
                )
        try:
            losses = self.head(embeddings, labels)
        finally:
            self.head.refused = None
        self._note_angle()
        shard = self.head.shard
        if shard is not None and losses.requires_grad:
            losses.register_hook(lambda grad: grad / shard.world_size)  # a mean over the ranks
        counted = (labels != self.head.ignore_index).nonzero().flatten()
        if len(counted):
            assert weights is not None  # the head takes no other labels
            loss = {
                "losses": (losses * weights.to(losses.dtype))[counted],
                "indices": counted,
                "reduction_type": "element",
            }
        else:  # of which reducers would make 0 / 0
            loss = {"losses": losses.sum(), "indices": None, "reduction_type": "already_reduced"}
        loss_dict = {"loss": loss}
        self.add_weight_regularization_to_loss_dict(loss_dict, self.head.weight)
        return loss_dict

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """scale * cosine [B, C] with all classes, without a margin and without gradient.

        With a process group every rank calls this with embeddings of its own.
        """
        return self.head.logits(embeddings)

    def _note_angle(self) -> None:
        metrics = self.head.last_metrics
        if self.collect_stats and metrics is not None and len(metrics.target_cosine):
            angles = metrics.target_cosine.clamp(-1, 1).acos()
            self.avg_angle = math.degrees(float(angles.mean()))


class ArcFaceLoss(PartialMarginLoss):
    """`PartialMarginLoss` with the additive angular margin, and the library's arguments.

    Args:
        num_classes, embedding_size, scale, keywords: those of `PartialMarginLoss`.
        margin: in degrees.

    Warns:
        UserWarning: the margin is below one degree, and likely in radians.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **keywords: Any,
    ) -> None:
        if isinstance(margin, bool) or not isinstance(margin, Real):
            raise TypeError(f"margin must be a number of degrees, got {margin!r}")
        if 0 < margin < 1:
            warnings.warn(
                f"margin is in degrees here, and {margin:g} is less than one; {margin:g} radians "
                f"would be {math.degrees(margin):.3g}",
                stacklevel=2,
            )
        of_angle = ArcFace(math.radians(margin))
        super().__init__(num_classes, embedding_size, of_angle, scale, **keywords)


class CosFaceLoss(PartialMarginLoss):
    """`PartialMarginLoss` with the additive cosine margin, and the library's arguments.

    Args:
        num_classes, embedding_size, scale, keywords: those of `PartialMarginLoss`.
        margin: subtracted from the cosine.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        **keywords: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, CosFace(margin), scale, **keywords)


class _Head(PartialMarginSoftmax):
    """Prototypes that begin as long as those of the library.

    refused: what is wrong with a call besides; it raises that, on every rank.
    """

    refused: Exception | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight.div_(STANDARD_DEVIATION)

    def _step_tensor(self, step: int | Tensor | None) -> Tensor:
        if self.refused is not None:
            raise self.refused
        return super()._step_tensor(step)


def _check_batch(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> None:
    for name, given, own in (("ref_emb", ref_emb, embeddings), ("ref_labels", ref_labels, labels)):
        if given is not None and given is not own:
            raise ValueError(
                f"{name} is not supported: this loss compares with the prototypes of classes"
            )
    if labels.dim() > 1:
        raise ValueError(f"labels must have shape [B], got {list(labels.shape)}")


def _refuse(wrapper: nn.Module, name: str, module: nn.Module) -> None:
    """Called for every module that becomes a part of another."""
    if not isinstance(wrapper, DistributedLossWrapper) or not isinstance(module, PartialMarginLoss):
        return
    if module.head.shard is not None:
        raise TypeError(
            "a loss with process_group must not be in a DistributedLossWrapper, which would give "
            "every rank the batches of all: each rank calls the loss itself, with its own batch"
        )


register_module_module_registration_hook(_refuse)
