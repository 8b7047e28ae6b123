"""`PartialMarginSoftmax`: the loss as a module that owns the prototypes and draws selections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unicom_ext import checks
from unicom_ext.functional import DEFAULT_WORKSPACE_BYTES, Metrics, call_loss
from unicom_ext.margins import ArcFace, CombinedMargin
from unicom_ext.sampling import num_sampled_classes, num_selected_features

_ops = torch.ops.unicom_ext


class Selection(NamedTuple):
    """What the last forward pass drew."""

    class_index: Tensor  # [|S|] int64, sorted class ids
    feature_index: Tensor  # [d'] int64, sorted dimensions


class PartialMarginSoftmax(nn.Module):
    """Margin softmax cross entropy in which each step uses some classes and some dimensions.

    UNICOM (arXiv:2304.05884): a random part of the class prototypes makes training robust to
    classes that conflict, a random part of the feature dimensions makes embeddings that may be cut
    short. With `feature_rate` 1 it is PartialFC (arXiv:2203.15565), with both rates 1 plain
    ArcFace, CosFace or SphereFace. See `unicom_ext.functional.partial_margin_softmax` for the
    formula and the options that are not explained here.

    In training mode each call draws max(1, round(sample_rate * C)) classes, the batch's own among
    them (more if the batch has more), and round(feature_rate * d) dimensions. Both depend on
    (seed, step, labels) alone. In `eval()` mode all classes and dimensions take part.

    Args:
        embedding_size: d.
        num_classes: C.
        margin: psi; default ``ArcFace(0.3)``, 0.3 radians.
        scale: s, default 64.
        sample_rate: share of the classes, in (0, 1].
        feature_rate: share of the dimensions, in (0, 1]; must leave at least one.
        sparse_grad: `weight.grad` becomes a sparse COO tensor with the rows that were sampled. A
            dense optimizer moves the other rows too, by momentum and weight decay; a sparse one
            does not.
        process_group: None; sharded prototypes are not there yet.
        workspace_bytes: memory that may keep cosines for backward, 0 for none.
        seed: of the selections, any int64.
        device, dtype: of `weight`.

    Attributes:
        weight: Parameter [C, d], the prototypes; initialised from a normal distribution with
            standard deviation 0.01, as PartialFC does. Only the directions matter.
        step: int64 scalar buffer, how many training steps were drawn.
        seed: int.

    `state_dict` carries weight, step and seed, so that a resumed run draws what an uninterrupted
    one would.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: CombinedMargin | None = None,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        feature_rate: float = 1.0,
        interclass_filter: float | None = None,
        margin_grad: str = "straight_through",
        beyond_pi: str = "keep",
        precision: str = "auto",
        sparse_grad: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: object | None = None,
        grad_average: bool = True,
        check_inputs: bool = False,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        margin = ArcFace(0.3) if margin is None else margin
        if process_group is not None:
            raise NotImplementedError(
                "process_group must be None: sharded prototypes are not there yet"
            )
        for name, value in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be an integer that fits in int64, got {seed!r}")
        checks.check_options(
            margin,
            scale,
            interclass_filter,
            margin_grad,
            beyond_pi,
            precision,
            reduction,
            ignore_index,
            workspace_bytes,
        )
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.margin = margin
        self.scale = float(scale)
        self.sample_rate = sample_rate
        self.feature_rate = feature_rate
        self.num_sampled = num_sampled_classes(num_classes, sample_rate)
        self.num_features = num_selected_features(embedding_size, feature_rate)
        self.interclass_filter = interclass_filter
        self.margin_grad = margin_grad
        self.beyond_pi = beyond_pi
        self.precision = precision
        self.sparse_grad = sparse_grad
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.grad_average = grad_average
        self.check_inputs = check_inputs
        self.workspace_bytes = workspace_bytes
        self.seed = seed
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self._drawn: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None
        self._metrics: Metrics | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        step: int | Tensor | None = None,
        margin: CombinedMargin | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: [B, d] floating point.
            labels: [B] int32 or int64, in [0, C) or `ignore_index`.
            step: draw the selections of this step, and do not advance the module's own (for
                activation checkpointing and tests). An int, or an int64 scalar tensor. Ignored in
                `eval()` mode.
            margin: instead of the module's, for margins that change from batch to batch; m2 and m3
                may be per-sample tensors [B].

        Returns:
            The loss: a scalar, or [B] for ``reduction="none"``.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has changed then.
        """
        margin = self.margin if margin is None else margin
        checks.check_options(
            margin,
            self.scale,
            self.interclass_filter,
            self.margin_grad,
            self.beyond_pi,
            self.precision,
            self.reduction,
            self.ignore_index,
            self.workspace_bytes,
        )
        checks.check_tensors(embeddings, labels, self.weight, margin)
        if self.check_inputs:
            checks.check_finite(embeddings)
        this_step = self._step_tensor(step)

        class_index = count = feature_index = None
        if self.training and self.num_sampled < self.num_classes:
            class_index, count, slot = _ops.select_classes(
                labels,
                this_step,
                self.num_classes,
                self.num_sampled,
                self.seed,
                self.ignore_index,
                0,
                self.num_classes,
            )
        else:
            slot = _ops.label_slots(
                labels, None, self.num_classes, self.ignore_index, 0, self.num_classes
            )
        if self.training and self.num_features < self.embedding_size:
            feature_index = _ops.select_features(
                this_step, self.embedding_size, self.num_features, self.seed
            )
        loss, metrics = call_loss(
            embeddings,
            slot,
            self.weight,
            class_index,
            count,
            feature_index,
            margin=margin,
            scale=self.scale,
            interclass_filter=self.interclass_filter,
            margin_grad=self.margin_grad,
            beyond_pi=self.beyond_pi,
            precision=self.precision,
            sparse_grad=self.sparse_grad,
            reduction=self.reduction,
            workspace_bytes=self.workspace_bytes,
        )
        self._drawn = (class_index, count, feature_index)
        self._metrics = metrics
        if self.training and step is None:
            self.step.add_(1)
        return loss

    def _step_tensor(self, step: int | Tensor | None) -> Tensor:
        if step is None:
            return self.step
        if isinstance(step, Tensor):
            if step.dtype != torch.int64 or step.numel() != 1:
                raise ValueError(
                    f"step must be an int or one int64 value, got {step.dtype} of shape "
                    f"{list(step.shape)}"
                )
            return step
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step must be an int or an int64 tensor, got {type(step).__name__}")
        return torch.full_like(self.step, step)

    @property
    def last_selection(self) -> Selection | None:
        """The classes and dimensions of the last forward pass; None before the first.

        Waits for the device, where there is one, to learn how many classes there were.
        """
        if self._drawn is None:
            return None
        class_index, count, feature_index = self._drawn
        device = self.weight.device
        if class_index is None:
            class_index = torch.arange(self.num_classes, device=device)
        elif count is not None:
            class_index = class_index[: int(count)]
        if feature_index is None:
            feature_index = torch.arange(self.embedding_size, device=device)
        return Selection(class_index, feature_index)

    @property
    def last_metrics(self) -> Metrics | None:
        """Per-sample loss, target cosine, largest negative cosine and top-1 among the sampled
        classes of the last forward pass, each [B], without gradient; None before the first."""
        return self._metrics

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seed, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        self.seed = int(state)

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_size}, {self.num_classes}, margin={self.margin!r}, "
            f"scale={self.scale:g}, sample_rate={self.sample_rate:g}, "
            f"feature_rate={self.feature_rate:g}, seed={self.seed}"
        )
