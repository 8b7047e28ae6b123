"""`PartialMarginSoftmax`: the loss as a module that owns the prototypes and draws selections."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_ext.loss import checks
from unicom_ext.loss.functional import DEFAULT_WORKSPACE_BYTES, Metrics, call_loss
from unicom_ext.loss.margins import ArcFace, CombinedMargin
from unicom_ext.loss.sampling import num_sampled_classes, num_selected_features
from unicom_ext.loss.wrapping import NeverWrapped
from unicom_ext.ops import library as devices
from unicom_ext.ops import memory

_ops = torch.ops.unicom_ext


class Selection(NamedTuple):
    """What the last forward pass drew."""

    class_index: Tensor  # [|S|] int64, sorted class ids; with a process group this rank's part
    feature_index: Tensor  # [d'] int64, sorted dimensions


class PartialMarginSoftmax(NeverWrapped):
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
        process_group: share the prototypes with the other ranks of this group, such as
            ``dist.group.WORLD``: each rank owns ceil(C / ranks) of them, the last ones fewer. Every
            rank calls the loss with a batch of its own; see
            `unicom_ext.functional.partial_margin_softmax` for what it gets back. The selections,
            the loss and the gradients are those of one process with all batches together.
        grad_average: see there.
        uneven_batches: see there; the ranks' steps are compared, too.
        want_metrics: with a process group, whether `last_metrics` finds the largest negative cosine
            and top-1 among the classes of all ranks, which costs one more message. Without a
            process group they are always there.
        workspace_bytes: memory that may keep cosines for backward, 0 for none.
        seed: of the selections and the initial prototypes, any int64.
        device, dtype: of `weight`.

    Attributes:
        weight: Parameter [C, d], the prototypes (with a process group those of this rank);
            initialised from a normal distribution with standard deviation 0.01, as PartialFC does.
            Only the directions matter. A class's initial prototype depends on (seed, class id, d)
            and the kind of device: it is the same at any number of ranks and classes.
        shard: the classes of this rank, a `sharding.ClassShard`; None without a process group.
        step: int64 scalar buffer, how many training steps were drawn.
        seed: int.

    `state_dict` carries weight, step and seed, so that a resumed run draws what an uninterrupted
    one would. With a process group its weight is a `DTensor` of all classes, which
    `torch.distributed.checkpoint` saves and loads at any number of ranks (`unicom_ext.checkpoint`
    does, with the optimizer); `load_state_dict` also takes the whole [C, d] as a plain tensor.

    The loss must not be wrapped in `DistributedDataParallel` or FSDP: its gradients are exact
    without, and ranks own different prototypes. Wrap the encoder alone; where the loss is a part of
    a model, ``fully_shard(model, ignored_params=set(model.loss.parameters()))`` leaves it out.
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
        process_group: dist.ProcessGroup | None = None,
        grad_average: bool = True,
        uneven_batches: bool | None = None,
        want_metrics: bool = False,
        check_inputs: bool = False,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        margin = ArcFace(0.3) if margin is None else margin
        failure = None
        try:
            embedding_size = checks.integer("embedding_size", embedding_size, 1)
            num_classes = checks.integer("num_classes", num_classes, 1)
            seed = checks.integer("seed", seed)
            checks.check_dtype(dtype)
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
            self.num_sampled = num_sampled_classes(num_classes, sample_rate)
            self.num_features = num_selected_features(embedding_size, feature_rate)
        except (TypeError, ValueError) as error:
            if process_group is None:
                raise
            failure = error  # which the other ranks must learn of
        self.shard = None
        if process_group is not None:
            from unicom_ext.distributed.failures import agree
            from unicom_ext.distributed.shard import ClassShard

            self.shard = ClassShard(process_group, 1 if failure else num_classes)
            agree(
                {
                    "embedding_size": embedding_size,
                    "num_classes": num_classes,
                    "seed": seed,
                    "sample_rate": sample_rate,
                    "feature_rate": feature_rate,
                    "dtype": str(dtype or torch.get_default_dtype()),
                    "margin": repr(margin),
                    "scale": scale,
                    "interclass_filter": interclass_filter,
                    "margin_grad": margin_grad,
                    "beyond_pi": beyond_pi,
                    "precision": precision,
                    "reduction": reduction,
                    "ignore_index": ignore_index,
                    "grad_average": grad_average,
                    "uneven_batches": uneven_batches,
                    "want_metrics": want_metrics,
                },
                failure,
                process_group,
            )
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.margin = margin
        self.scale = float(scale)
        self.sample_rate = sample_rate
        self.feature_rate = feature_rate
        self.interclass_filter = interclass_filter
        self.margin_grad = margin_grad
        self.beyond_pi = beyond_pi
        self.precision = precision
        self.sparse_grad = sparse_grad
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.grad_average = grad_average
        self.uneven_batches = uneven_batches
        self.want_metrics = want_metrics
        self.check_inputs = check_inputs
        self.workspace_bytes = workspace_bytes
        self.seed = seed
        rows = num_classes if self.shard is None else len(self.shard)
        self.weight = nn.Parameter(memory.empty(rows, embedding_size, device=device, dtype=dtype))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self._drawn: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None
        self._metrics: Metrics | None = None
        self.reset_parameters()

    @classmethod
    def from_centroids(cls, centroids: Tensor | str | PathLike, **options) -> PartialMarginSoftmax:
        """A loss whose prototypes start at the centroids of clusters (pseudo-classes).

        Args:
            centroids: [C, d] floating point, finite, or the name of a `.npy` file such as
                `unicom-ext cluster` writes. d must be the size of the embeddings. They are scaled
                to the norm that random prototypes have on average, 0.01 * sqrt(d), so that an
                optimizer's steps turn them as far; a zero row stays zero.
            options: those of the constructor but `embedding_size` and `num_classes`. With a process
                group every rank gives all centroids and keeps its own.
        """
        if not isinstance(centroids, Tensor):
            centroids = torch.from_numpy(np.load(centroids))
        if centroids.dim() != 2 or not centroids.is_floating_point() or centroids.numel() == 0:
            raise ValueError(
                "centroids must be a floating point matrix [C, d], got "
                f"{centroids.dtype} of shape {list(centroids.shape)}"
            )
        finite = centroids.isfinite().all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"centroids must be finite, but row {row} is not")
        num_classes, embedding_size = centroids.shape
        module = cls(embedding_size, num_classes, **options)
        own = centroids[module._start : module._start + len(module.weight)].double()
        with torch.no_grad():
            module.weight.copy_(
                nn.functional.normalize(own, eps=1e-300) * (0.01 * embedding_size**0.5)
            )
        return module

    def reset_parameters(self) -> None:
        fill_prototypes(self.weight, self._start, self.seed)

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
            TypeError, ValueError: an argument is wrong; nothing has changed then. With a process
                group every rank raises: the others a RuntimeError that names the rank.
        """
        margin = self.margin if margin is None else margin

        def check() -> None:
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
            checks.check_tensors(
                embeddings, labels, self.weight, margin, min_classes=1 if self.shard is None else 0
            )
            devices.check_device(embeddings.device)
            if self.check_inputs:
                checks.check_values(embeddings, labels, self.num_classes, self.ignore_index)

        options = {
            "margin": margin,
            "scale": self.scale,
            "interclass_filter": self.interclass_filter,
            "margin_grad": self.margin_grad,
            "beyond_pi": self.beyond_pi,
            "precision": self.precision,
            "sparse_grad": self.sparse_grad,
            "reduction": self.reduction,
            "workspace_bytes": self.workspace_bytes,
        }
        if self.shard is None:
            check()
            class_index, count, slot, feature_index = self._draw(labels, self._step_tensor(step))
            loss, self._metrics = call_loss(
                embeddings, slot, self.weight, class_index, count, feature_index, **options
            )
            self._drawn = class_index, count, feature_index
        else:
            loss = self._sharded(embeddings, labels, step, check, options)
        if self.training and step is None:
            self.step.add_(1)
        return loss

    def _sharded(
        self,
        embeddings: Tensor,
        labels: Tensor,
        step: int | Tensor | None,
        check: Callable[[], None],
        options: dict[str, Any],
    ) -> Tensor:
        """`forward` together with the other ranks."""
        from unicom_ext.loss.sharded import step as sharding

        shard = self.shard

        def check_all() -> Tensor | None:
            check()
            this_step = self._step_tensor(step)
            return this_step if self.training else None

        loss, self._metrics, selected = sharding.call_loss(
            shard,
            embeddings,
            labels,
            self.weight,
            check=check_all,
            num_sampled=self.num_sampled if self.training else None,
            num_features=self.num_features if self.training else None,
            seed=self.seed,
            ignore_index=self.ignore_index,
            grad_average=self.grad_average,
            uneven_batches=self.uneven_batches,
            want_metrics=self.want_metrics,
            **options,
        )
        rows = selected.class_index
        class_index = None if rows is None else rows + shard.start
        self._drawn = class_index, selected.count, selected.feature_index
        return loss

    def _draw(
        self, labels: Tensor, step: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Sampled classes, how many of them are valid, where the labels are among them, and the
        sampled dimensions. None for all."""
        class_index = count = feature_index = None
        if self.training and self.num_sampled < self.num_classes:
            class_index, count, slot = _ops.select_classes(
                labels,
                step,
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
                step, self.embedding_size, self.num_features, self.seed
            )
        return class_index, count, slot, feature_index

    @property
    def _start(self) -> int:
        """The id of the class in row 0."""
        return 0 if self.shard is None else self.shard.start

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
            start = self._start
            class_index = torch.arange(start, start + len(self.weight), device=device)
        elif count is not None:
            class_index = class_index[: int(count)]
        if feature_index is None:
            feature_index = torch.arange(self.embedding_size, device=device)
        return Selection(class_index, feature_index)

    @property
    def last_metrics(self) -> Metrics | None:
        """Per-sample loss, target cosine, largest negative cosine and top-1 among the sampled
        classes of the last forward pass, each [B], without gradient; None before the first. With a
        process group: of this rank's samples; see `want_metrics`."""
        return self._metrics

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seed, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        self.seed = int(state)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard is not None:
            name = prefix + "weight"
            if name not in destination:
                raise RuntimeError(
                    f"{name} of a loss with process_group must be a parameter to be saved, but "
                    "something like weight_norm, parametrize or prune has put a function of others "
                    "in its place; remove that first"
                )
            destination[name] = self.shard.as_global(destination[name])

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        name = prefix + "weight"
        if self.shard is not None and name in state_dict:
            expected = (self.num_classes, self.embedding_size)
            if state_dict[name].shape == expected:
                state_dict = {**state_dict, name: self.shard.own_rows(state_dict[name])}
            else:
                *_, error_msgs = rest
                error_msgs.append(
                    f"{name} must be of all classes, {list(expected)}, of which this rank takes "
                    f"its own; got {list(state_dict[name].shape)}"
                )
                state_dict = {**state_dict, name: self.weight.detach()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_size}, {self.num_classes}, margin={self.margin!r}, "
            f"scale={self.scale:g}, sample_rate={self.sample_rate:g}, "
            f"feature_rate={self.feature_rate:g}, seed={self.seed}"
            + ("" if self.shard is None else f", classes {self.shard.start} to {self.shard.stop}")
        )


_BLOCK = 256


@torch.no_grad()
def fill_prototypes(weight: Tensor, first_class: int, seed: int) -> None:
    """Initial prototypes of the classes from `first_class` on, [n, d], in place.

    Normal with standard deviation 0.01, drawn in float32. Each value is a function of (seed, class
    id, dimension, d) and of the kind of device alone, so that shards are parts of one whole.
    """
    if weight.device.type == "meta":
        return
    generator = torch.Generator(weight.device)
    stop, dim = first_class + len(weight), weight.shape[1]
    rows = torch.empty(_BLOCK, dim, dtype=torch.float32, device=weight.device)
    for block in range(first_class // _BLOCK, -(-stop // _BLOCK)):
        key = np.random.SeedSequence([seed % 2**64, block]).generate_state(1, np.uint64)
        rows.normal_(0.0, 0.01, generator=generator.manual_seed(int(key[0])))
        begin, end = max(block * _BLOCK, first_class), min((block + 1) * _BLOCK, stop)
        of_block = slice(begin - block * _BLOCK, end - block * _BLOCK)
        weight[begin - first_class : end - first_class] = rows[of_block]
