"""The head of PartialFC v2 and UNICOM trainers: change the import, keep the trainer::

    from unicom_ext.compat import PartialFC_V2

    margin_loss = CombinedMarginLoss(64, 1.0, 0.5, 0.0)  # the trainer's own, as before
    module_partial_fc = PartialFC_V2(margin_loss, 512, num_classes, sample_rate=0.1, fp16=True)
    loss = module_partial_fc(backbone(images), labels)

What differs from the published head:

- No process group is needed. Where torch.distributed is initialised, all its ranks share the
  classes, and `unicom_ext.checkpoint` (or torch.distributed.checkpoint) saves them for any number
  of ranks. The weight in `state_dict` is a DTensor there: one file per rank, as the published
  trainers write it, does not load at another number of ranks.
- The number of sampled classes is round(sample_rate * num_classes) over all ranks; positives come
  on top of a rank's share where it has more of them.
- Batches may have any size, and the loss of converged samples has no floor or ceiling.
- On several ranks losses are scaled with torch's `ShardedGradScaler`. With `GradScaler`, as in the
  published trainers, a rank whose prototypes overflow would skip a step alone.
- m1, m2 and m3 combine. The published loss leaves m2 out where m3 > 0; there is a warning then.

The published trainer's files of all ranks become a checkpoint for any number of ranks, the state of
the optimizer included, by ``unicom-ext import checkpoint_gpu_*.pt --output DIR``
(`unicom_ext.interchange`); ``unicom-ext checkpoint to-partial-fc`` is the way back.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import agree
from unicom_ext.loss.checks import integer
from unicom_ext.loss.labels import Labels
from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace
from unicom_ext.loss.module import PartialMarginSoftmax

__all__ = ["PartialFC_V2"]


class PartialFC_V2(PartialMarginSoftmax):
    """`PartialMarginSoftmax` with the arguments of PartialFC v2 (arXiv:2203.15565).

    Args:
        margin_loss: the published losses, or what has their attributes: `CombinedMarginLoss` (s,
            m1, m2, m3, interclass_filtering_threshold), `ArcFace` (s or scale, margin), `CosFace`
            (s, m). Only these numbers are read, it is never called. Or a margin of this package
            such as ``unicom_ext.ArcFace(0.5)``; the scale is 64 then, unless `scale` is given.
        embedding_size: d, the dimensions of an embedding.
        num_classes: C, of all ranks.
        sample_rate: share of the classes in each step, in [0, 1]; 0 for the positives alone.
        fp16: multiply unit vectors in fp16 (where the device has no fp16 products, as CPUs, in
            fp32); sums are fp32 always. Autocast around the call changes nothing.
        is_normlize: UNICOM's switch; must be 1, as cosines need unit vectors.
        sample_num_feat: UNICOM's number of feature dimensions in each step, 1 to d; None for all.
        options: further ones of `PartialMarginSoftmax`, such as `sparse_grad`, `seed`.
            `process_group` is all ranks where torch.distributed is initialised.

    Raises:
        TypeError, ValueError: as `PartialMarginSoftmax` does.
    """

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        is_normlize: int = 1,
        sample_num_feat: int | None = None,
        **options: Any,
    ) -> None:
        if dist.is_initialized():
            options.setdefault("process_group", dist.group.WORLD)
        failure, read = None, {}
        try:
            if not is_normlize:
                raise ValueError(
                    f"is_normlize must be 1, got {is_normlize!r}: cosines need unit vectors"
                )
            read = _read_margin_loss(margin_loss)
            if sample_num_feat is not None:
                read["feature_rate"] = _feature_rate(sample_num_feat, embedding_size)
        except (TypeError, ValueError) as error:
            failure = error
        agree({}, failure, options.get("process_group"))
        options = {"precision": "fp16" if fp16 else "fp32", **read, **options}
        super().__init__(embedding_size, num_classes, sample_rate=sample_rate, **options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Labels,
        step: int | Tensor | None = None,
        margin: CombinedMargin | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, as `PartialMarginSoftmax` has it.

        Args:
            embeddings: [B, d] floating point.
            labels: as there, and also [B, 1], and of any integers but uint64, which may not fit.
            step: as there.
            margin: as there.
            scale: as there.

        Returns:
            The loss, as there.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            labels = labels.squeeze(1) if labels.dim() == 2 else labels
            labels = labels if labels.dtype == torch.uint64 else labels.long()
        return super().forward(embeddings, labels, step, margin, scale)


def _feature_rate(sample_num_feat: int, embedding_size: int) -> float:
    embedding_size = integer("embedding_size", embedding_size, 1)
    return integer("sample_num_feat", sample_num_feat, 1, embedding_size) / embedding_size


def _read_margin_loss(margin_loss: Any) -> dict[str, Any]:
    """margin, scale and filter of a published margin loss."""
    if isinstance(margin_loss, CombinedMargin):
        return {"margin": margin_loss}
    names = vars(margin_loss) if hasattr(margin_loss, "__dict__") else {}
    scale = names.get("s", names.get("scale"))
    if scale is None:
        pass
    elif {"m1", "m2", "m3"} <= names.keys():
        margin = CombinedMargin(names["m1"], names["m2"], names["m3"])
        if margin.m3 > 0 and (margin.m1 != 1 or margin.m2 != 0):
            warnings.warn(
                f"{margin} combines m1, m2 and m3; the published loss uses m3 alone where it is "
                "above 0. Give m1=1, m2=0 to train as it does",
                stacklevel=3,
            )
        threshold = names.get("interclass_filtering_threshold") or None  # published: 0 for none
        return {"margin": margin, "scale": scale, "interclass_filter": threshold}
    elif "margin" in names:
        return {"margin": ArcFace(names["margin"]), "scale": scale}
    elif "m" in names:
        return {"margin": CosFace(names["m"]), "scale": scale}
    raise TypeError(
        "margin_loss must be a margin of unicom_ext, or have the attributes of a published loss: "
        f"s and either m1, m2, m3, or margin, or m; got {margin_loss!r}"
    )
