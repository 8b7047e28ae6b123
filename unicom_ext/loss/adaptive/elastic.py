"""Margins drawn at random, ElasticFace's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.loss.adaptive import batch
from unicom_ext.loss.adaptive.noise import standard_normal
from unicom_ext.loss.checks import integer
from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace
from unicom_ext.ops import counter


class _Elastic(batch.OfRanks):
    """For each label of a batch a margin from N(mean, std), as ElasticFace draws them."""

    seed: Tensor
    step: Tensor
    _margin: Callable[[float | Tensor], CombinedMargin]  # of a value that was drawn

    def __init__(
        self,
        mean: float,
        std: float,
        *,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.mean = batch.number("mean", mean, 0, math.inf)
        self.std = batch.number("std", std, 0, math.inf)
        self.process_group = process_group
        self._first_seed = integer("seed", seed)
        for name in ("seed", "step"):
            self.register_buffer(name, torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the seed that it was made with, and to step 0. To be called after `to_empty`."""
        self.seed.fill_(self._first_seed)
        self.step.zero_()

    def forward(
        self, embeddings: Tensor, labels: Tensor, step: int | None = None
    ) -> CombinedMargin:
        """The margins of a batch; in training mode the step advances.

        Args:
            embeddings: not looked at; it is there as in the other margins.
            labels: [B], or [B, P] with several for each sample; int32 or int64.
            step: draw the margins of this step, and do not advance the module's own. Ignored in
                `eval()` mode.

        Returns:
            The margins, float64 like labels; a number in `eval()` mode.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has changed then.
            RuntimeError: training repeats the call in backward, without `step`; or another rank has
                failed.
        """
        if not self.training:
            return self._margin(self.mean)

        def count() -> Tensor:
            if step is None:
                batch.refuse_repetition(self)
            else:
                integer("step", step)
            batch.check_labels(labels, self.step.device)
            return torch.full((1,), labels.numel(), dtype=torch.float64, device=labels.device)

        counts = batch.of_all_ranks(count, 1, self.step.device, self.process_group)
        rank = 0 if self.process_group is None else dist.get_rank(self.process_group)
        start = counts[:rank].sum().to(torch.int64)
        place = start + torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        this_step = self.step if step is None else torch.full_like(self.step, step)
        if step is None and torch.compiler.is_compiling():
            this_step = counter.first_draw(this_step)
        margin = self._margin(self.mean + self.std * standard_normal(self.seed, this_step, place))
        if step is None:
            counter.advance(self.step)
        return margin

    def extra_repr(self) -> str:
        return f"mean={self.mean:g}, std={self.std:g}"


class ElasticArcFace(_Elastic):
    """ElasticFace-Arc: m2 from N(mean, std) in radians, 0.5 and 0.05 in the paper.

    Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition", arXiv:2109.09416.

    A draw is a function of (seed, step, place of the label among those of all ranks): a resumed run
    draws what an uninterrupted one would, and any number of ranks what one process would with their
    batches in the order of the ranks. In `eval()` mode the margin is the mean.

    Args:
        mean: of the margins, in radians; 0.5 in the paper.
        std: their standard deviation; 0.05 in the paper.
        seed: any int64.
        process_group: its ranks make one batch, of any sizes: one message of one number. Every rank
            must call then. Ranks without it that have the same seed draw the same margins.
        device: of the buffers.

    Attributes:
        seed: int64 scalar buffer.
        step: int64 scalar buffer, how many training batches were drawn.
    """

    _margin = staticmethod(ArcFace)

    def __init__(
        self,
        mean: float = 0.5,
        std: float = 0.05,
        *,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mean, std, seed=seed, process_group=process_group, device=device)


class ElasticCosFace(_Elastic):
    """ElasticFace-Cos: m3 from N(mean, std), 0.35 and 0.05 in the paper.

    Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition", arXiv:2109.09416.

    A draw is a function of (seed, step, place of the label among those of all ranks): a resumed run
    draws what an uninterrupted one would, and any number of ranks what one process would with their
    batches in the order of the ranks. In `eval()` mode the margin is the mean.

    Args:
        mean: of the margins, as cosines; 0.35 in the paper.
        std: their standard deviation; 0.05 in the paper.
        seed: any int64.
        process_group: its ranks make one batch, of any sizes: one message of one number. Every rank
            must call then. Ranks without it that have the same seed draw the same margins.
        device: of the buffers.

    Attributes:
        seed: int64 scalar buffer.
        step: int64 scalar buffer, how many training batches were drawn.
    """

    _margin = staticmethod(CosFace)

    def __init__(
        self,
        mean: float = 0.35,
        std: float = 0.05,
        *,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(mean, std, seed=seed, process_group=process_group, device=device)
