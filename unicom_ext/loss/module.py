"""`PartialMarginSoftmax`: the loss as a module that owns the prototypes and draws selections."""

from __future__ import annotations

from dataclasses import fields, replace
from os import PathLike
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_ext.loss import checks, recomputation
from unicom_ext.loss.functional import call_loss
from unicom_ext.loss.inference import InferenceCalls
from unicom_ext.loss.labels import Labels, dense
from unicom_ext.loss.margins import ArcFace, CombinedMargin
from unicom_ext.loss.options import (
    LossKwargs,
    LossOptions,
    OptionAttributes,
    refuse_tensor,
    refuse_unknown,
)
from unicom_ext.loss.prototypes import fill_with_centroids, read_centroids
from unicom_ext.loss.results import Metrics, Selection
from unicom_ext.loss.sampling import (
    FeatureSelection,
    check_feature_selection,
    num_sampled_classes,
    num_selected_features,
)
from unicom_ext.loss.selection import Sampling, select
from unicom_ext.loss.watching import look_at_labels
from unicom_ext.ops import counter, memory, transforms

__all__ = ["PartialMarginSoftmax", "Selection"]


class PartialMarginSoftmax(OptionAttributes, InferenceCalls):
    """Margin softmax cross entropy in which each step uses some classes and some dimensions.

    UNICOM (arXiv:2304.05884): a random part of the class prototypes makes training robust to
    classes that conflict, a random part of the feature dimensions makes embeddings that may be cut
    short. With `feature_rate` 1 it is PartialFC (arXiv:2203.15565), with both rates 1 plain
    ArcFace, CosFace or SphereFace. See `unicom_ext.partial_margin_softmax` for the
    formula.

    In training mode each call draws max(1, round(sample_rate * C)) classes, the batch's own among
    them (more if the batch has more; with `sample_rate` 0 these alone), and round(feature_rate * d)
    dimensions. Both depend on (seed, step, labels) alone. In `eval()` mode all classes and
    dimensions take part.

    Args:
        embedding_size: d, the dimensions of an embedding.
        num_classes: C, how many classes there are.
        margin: psi; default ``ArcFace(0.3)``, 0.3 radians.
        scale: s, default 64.
        sample_rate: share of the classes, in [0, 1].
        feature_rate: share of the dimensions, in (0, 1]; must leave at least one.
        feature_selection: which dimensions a step takes: ``"random"`` ones, or ``"nested"``, the
            first ones, as Matryoshka representations are trained (arXiv:2205.13147): up to d of
            them, and as many on average as ``"random"`` takes. The number is drawn on the host, by
            (seed, step): ``torch.compile(fullgraph=True)`` and CUDA graphs refuse it.
        process_group: share the prototypes with the other ranks of this group, such as
            ``dist.group.WORLD``: each rank owns ceil(C / ranks) of them, the last ones fewer. Every
            rank calls the loss with a batch of its own; see
            `unicom_ext.partial_margin_softmax` for what it gets back. The selections,
            the loss and the gradients are those of one process with all batches together.
        want_metrics: with a process group, whether `last_metrics` finds the largest negative cosine
            and top-1 among the classes of all ranks, which costs one more message. Without a
            process group they are always there.
        seed: of the selections and the initial prototypes, any int64.
        device: of `weight`.
        dtype: of `weight`, floating point.
        full_state_dict: with a process group, whether `state_dict` holds the prototypes of all
            classes as a plain tensor, not as a `DTensor`; and a row optimizer's its moments. For
            trainers that write what the first rank has: each rank takes its own classes when it
            loads, at any number of ranks. Every rank must call `state_dict` then, at the same time,
            and needs memory for all classes. May be set later.
        keywords: the other options of the loss, such as `sparse_grad`, `precision` and
            `uneven_batches`; see `unicom_ext.functional.LossOptions`.

    Attributes:
        options: the `LossOptions`. Each of them is an attribute too: ``loss.scale = 32`` makes new
            options, checked, for the calls to come. So are `sample_rate`, `feature_rate` and
            `feature_selection`. With a process group all ranks must set the same.
        weight: Parameter [C, d], the prototypes (with a process group those of this rank), or with
            `num_centers` K > 1 [C * K, d], those of a class beside each other; initialised from a
            normal distribution with standard deviation 0.01, as PartialFC does. Only the directions
            matter. A class's initial prototypes depend on (seed, class id, d, K) and the kind of
            device: they are the same at any number of ranks and classes.
        shard: the classes of this rank, a `sharding.ClassShard`; None without a process group.
        step: int64 scalar buffer, how many training steps were drawn.
        seed: int.

    `state_dict` carries weight, step and seed, so that a resumed run draws what an uninterrupted
    one would. With a process group its weight is a `DTensor` of all classes, [C, d], or with
    several centres [C, K, d], which `torch.distributed.checkpoint` saves and loads at any number of
    ranks (`unicom_ext.checkpoint` does, with the optimizer); `load_state_dict` also takes the whole
    [C * K, d] as a plain tensor. A `DTensor` that another rank has pickled holds other classes, and
    is refused.

    The loss must not be wrapped in `DistributedDataParallel` or FSDP: its gradients are exact
    without, and ranks own different prototypes. Wrap the encoder alone; where the loss is a part of
    a model, ``fully_shard(model, ignored_params=set(model.loss.parameters()))`` leaves it out, and
    so does ``_ddp_params_and_buffers_to_ignore`` of a model for `DistributedDataParallel`.
    """

    _feature_selection: FeatureSelection = "random"  # of losses pickled before there was another

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: CombinedMargin | None = None,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        feature_rate: float = 1.0,
        feature_selection: FeatureSelection = "random",
        process_group: dist.ProcessGroup | None = None,
        want_metrics: bool = False,
        seed: int = 0,
        full_state_dict: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Unpack[LossKwargs],
    ) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, keywords)
        settings, failure = {}, None
        try:
            embedding_size = checks.integer("embedding_size", embedding_size, 1)
            num_classes = checks.integer("num_classes", num_classes, 1)
            seed = checks.integer("seed", seed)
            want_metrics = checks.boolean("want_metrics", want_metrics)
            full_state_dict = checks.boolean("full_state_dict", full_state_dict)
            checks.check_dtype(dtype)
            margin = ArcFace(0.3) if margin is None else margin
            refuse_tensor("scale", scale)
            self.options = LossOptions(margin, scale, **keywords)
            num_sampled_classes(num_classes, sample_rate)
            num_selected_features(embedding_size, feature_rate)
            check_feature_selection(feature_selection)
            settings = {
                "embedding_size": embedding_size,
                "num_classes": num_classes,
                "seed": seed,
                "sample_rate": sample_rate,
                "feature_rate": feature_rate,
                "feature_selection": feature_selection,
                "dtype": str(dtype or torch.get_default_dtype()),
                **self.options.same_on_every_rank(),
                "want_metrics": want_metrics,
                "full_state_dict": full_state_dict,
            }
        except (TypeError, ValueError) as error:
            if process_group is None:
                raise
            failure = error  # which the other ranks must learn of
        self.shard = None
        if process_group is not None:
            from unicom_ext.distributed.failures import agree, failures_of
            from unicom_ext.distributed.shard import ClassShard

            centers = 1 if failure else self.options.num_centers
            self.shard = ClassShard(process_group, 1 if failure else num_classes, centers)
            agree(settings, failure, process_group)
            failures_of(process_group).optimizer_steps = 0
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.sample_rate = sample_rate
        self.feature_rate = feature_rate
        self.feature_selection = feature_selection
        self.want_metrics = want_metrics
        self.seed = seed
        self.full_state_dict = full_state_dict
        self.weight = nn.Parameter(
            memory.empty(self._num_rows, embedding_size, device=device, dtype=dtype)
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self._drawn: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None
        self._metrics: Metrics | None = None
        self.reset_parameters()

    @classmethod
    def from_centroids(
        cls, centroids: Tensor | np.ndarray | str | PathLike[str], **options: Any
    ) -> PartialMarginSoftmax:
        """A loss whose prototypes start at the centroids of clusters (pseudo-classes).

        Args:
            centroids: [C, d] floating point, finite: a tensor, a NumPy array, or the name of a
                ``.npy`` file such as `unicom-ext cluster` writes. d must be the size of the
                embeddings. They are scaled to the norm that random prototypes have on average,
                0.01 * sqrt(d), so that an optimizer's steps turn them as far; a zero row stays
                zero. With `num_centers` each prototype of a class starts there, but for a tenth of
                a random one: equal ones would not part.
            options: those of the constructor but `embedding_size` and `num_classes`. With a process
                group every rank gives all centroids and keeps its own.

        Returns:
            The loss, of C classes and d dimensions.

        Raises:
            TypeError, ValueError: an argument is wrong, or `device` is the meta device.
        """
        centroids = read_centroids(centroids)
        num_classes, embedding_size = centroids.shape
        module = cls(embedding_size, num_classes, **options)
        if module.weight.is_meta:
            raise ValueError(
                "from_centroids has no memory to fill on the meta device: make the loss on the "
                "device where it will be"
            )
        fill_with_centroids(module.weight, module._start, centroids, module.options.num_centers)
        return module

    @property
    def sample_rate(self) -> float:
        """Share of the classes that each training call draws; may be set."""
        return self._sample_rate

    @sample_rate.setter
    def sample_rate(self, rate: float) -> None:
        self.num_sampled = num_sampled_classes(self.num_classes, rate)
        self._sample_rate = rate

    @property
    def feature_rate(self) -> float:
        """Share of the dimensions that each training call draws; may be set."""
        return self._feature_rate

    @feature_rate.setter
    def feature_rate(self, rate: float) -> None:
        self.num_features = num_selected_features(self.embedding_size, rate)
        self._feature_rate = rate

    @property
    def feature_selection(self) -> FeatureSelection:
        """Which dimensions each training call takes, "random" or "nested" ones; may be set."""
        return self._feature_selection

    @feature_selection.setter
    def feature_selection(self, value: FeatureSelection) -> None:
        self._feature_selection = check_feature_selection(value)

    @property
    def draws(self) -> bool:
        return self.num_sampled < self.num_classes or self.num_features < self.embedding_size

    def reset_parameters(self) -> None:
        """Back to the initial prototypes, and to step 0. To be called after `to_empty`."""
        super().reset_parameters()
        self._drawn = self._metrics = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Labels,
        step: int | Tensor | None = None,
        margin: CombinedMargin | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: [B, d] floating point.
            labels: int32 or int64, in [0, C) or `ignore_index`: [B], or for several positives of
                each sample [B, P], rows filled up with `ignore_index`, or a pair (ids, offsets) in
                which sample i has ``ids[offsets[i]:offsets[i + 1]]``. All of them are among the
                classes that are drawn. `multi_label` says what the loss of a sample is; a class
                that stands twice in its row counts once.
            step: draw the selections of this step, and do not advance the module's own. An int, or
                an int64 scalar tensor. Ignored in `eval()` mode.
            margin: instead of the module's, for margins that change from batch to batch; m2 and m3
                may be per-sample tensors [B] (or [B, P] like labels), which get a gradient where
                they require one.
            scale: instead of the module's, for one that changes from batch to batch. A tensor of
                one floating value gets a gradient where it requires one. With a process group it
                must be the same on every rank.

        Returns:
            The loss, a scalar, or [B] for ``reduction="none"``.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has changed then. With a process
                group every rank raises: the others a RuntimeError that names the rank.
            RuntimeError: activation checkpointing repeats a call, and it cannot be told which.

        Warns:
            UserWarning: once, when the prototypes have had a gradient in many training calls and
                have not changed.
        """
        options, failure = self.options, None
        targets: Any = labels  # a tensor, unless a pair of tensors is bad
        if options.sparse_grad and not self.weight.is_leaf:
            # A function of the parameters, such as weight_norm's: not all take a sparse gradient.
            options = replace(options, sparse_grad=False)
        try:
            targets = dense(labels, options.ignore_index)
            if margin is not None:
                options = replace(options, margin=margin)
            if scale is not None:
                options = replace(options, scale=scale)
        except (TypeError, ValueError) as error:
            failure, options = error, options.with_scale_like(scale)
        compiling = torch.compiler.is_compiling()
        repeated = not compiling and counter.in_backward()
        sampling = Sampling(
            self.num_classes,
            self.num_sampled if self.training else self.num_classes,
            self.embedding_size,
            self.num_features if self.training else self.embedding_size,
            self.seed,
            int(self.feature_selection == "nested"),
        )

        def check() -> Tensor | None:
            if failure is not None:
                raise failure
            num_classes = None if self.shard is None else self.num_classes
            if self.weight.shape[0] != self._num_rows:
                raise ValueError(
                    f"weight must be [{self._num_rows}, {self.embedding_size}], num_centers = "
                    f"{options.num_centers} for each class, got {list(self.weight.shape)}"
                )
            checks.check_call(embeddings, targets, self.weight, options, num_classes=num_classes)
            if self._was_meta:
                self._check_written()
            this_step = self._step_tensor(step)
            if not self.training:
                return None
            draws = step is None and (sampling.draws_classes or sampling.draws_features)
            if repeated and draws:
                return recomputation.repeated_step(self, embeddings, targets)
            if draws and compiling:
                return counter.first_draw(this_step)
            if draws:
                recomputation.note(self, embeddings, targets, this_step)
            return this_step

        if self.shard is None:
            selected = select(targets, sampling, options.ignore_index, step=check())
            weight = self.weight
            if options.sparse_grad and not self.training:
                # Another tensor of the same values, which no optimizer updates inside backward.
                weight = torch.ops.aten.alias(weight)
            loss, self._metrics = call_loss(embeddings, weight, selected, options)
            class_index = selected.class_index
        else:
            from unicom_ext.loss.sharded import step as sharded

            loss, self._metrics, selected = sharded.call_loss(
                self.shard,
                embeddings,
                targets,
                self.weight,
                options,
                check=check,
                sampling=sampling,
                want_metrics=self.want_metrics,
            )
            rows = selected.class_index
            class_index = None if rows is None else rows + self.shard.start
            if self.training and not compiling and not transforms.transforming():
                look_at_labels(self, selected.slot)
        self._drawn = class_index, selected.num_valid, selected.feature_index
        if transforms.transforming():
            self._drawn = transforms.kept(self._drawn)
            self._metrics = Metrics(*transforms.kept(self._metrics))
        if self.training and step is None and not repeated:
            counter.advance(self.step)
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
        if isinstance(step, tuple | list):
            raise TypeError(
                f"step must be an int or an int64 tensor, got a {type(step).__name__}. If these "
                "are the indices_tuple of a miner of pairs: this loss compares with all classes, "
                "and takes none"
            )
        step = checks.integer("step", step)
        tensor = torch.full_like(self.step, step)
        if self.feature_selection == "nested":
            counter.known_on_host(tensor, step)
        return tensor

    @property
    def last_selection(self) -> Selection | None:
        """The classes and dimensions of the last forward pass; None before the first.

        Waits for the device, where there is one, to learn how many classes there were.
        """
        if self._drawn is None:
            return None
        class_index, num_valid, feature_index = self._drawn
        device = self.weight.device
        if class_index is None:
            start = self._start
            stop = start + self._num_rows // self.options.num_centers
            class_index = torch.arange(start, stop, device=device)
        elif num_valid is not None:
            class_index = class_index[: int(num_valid)]
        if feature_index is None:
            feature_index = torch.arange(self.embedding_size, device=device)
        return Selection(class_index, feature_index)

    @property
    def last_metrics(self) -> Metrics | None:
        """Per-sample loss, target cosine, largest negative cosine and top-1 among the sampled
        classes of the last forward pass, without gradient; None before the first. With a
        process group: of this rank's samples; see `want_metrics`."""
        return self._metrics

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "options" not in state:  # pickled whole when every option was an attribute of its own
            options = {f.name: state.pop(f.name) for f in fields(LossOptions) if f.name in state}
            state["options"] = LossOptions(**options)
        for name in ("sample_rate", "feature_rate"):  # which were plain attributes too
            if name in state:
                state[f"_{name}"] = state.pop(name)
        super().__setstate__(state)

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_size}, {self.num_classes}, margin={self.margin!r}, "
            f"scale={self.scale:g}, sample_rate={self.sample_rate:g}, "
            f"feature_rate={self.feature_rate:g}, seed={self.seed}"
            + (f", num_centers={self.num_centers}" if self.num_centers > 1 else "")
            + ("" if self.shard is None else f", classes {self.shard.start} to {self.shard.stop}")
        )
