"""The options of the loss: declared, described and checked here, and handed down whole.

A new option is a field of `LossOptions`, and to type checkers one of `LossKwargs` and
`OptionAttributes`; `packed` hands it to the operators.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.ops import library
from unicom_ext.ops.codes import MULTI_LABEL, PRECISION, REDUCTION, Codes, Reals
from unicom_ext.ops.transforms import transforming

MarginGrad = Literal["straight_through", "exact"]
BeyondPi = Literal["keep", "linear"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Reduction = Literal["mean", "sum", "none"]
MultiLabel = Literal["average", "separate"]

# Enough for the cosines of 4096 samples with 16,000 classes.
DEFAULT_WORKSPACE_BYTES = 256 << 20

_FAST_BF16 = "avx512_bf16" in library.engine.cpu_capabilities()
# Then products of bf16 take less time than the cosines do to memory and back.
_MATRIX_UNIT = "amx" in library.engine.cpu_capabilities()
# In this order: the abstract classes, which NumPy's numbers are of too, take ten times as long.
_REAL, _INTEGRAL = (float, Real), (int, Integral)
MAX_CENTERS = 16  # kMaxCenters in csrc/cpu/kernels/kernels.h
_INTEGERS = {
    "ignore_index": "an int",
    "workspace_bytes": "an int >= 0",
    "num_centers": f"an int in [1, {MAX_CENTERS}]",
}
_MAY_DIFFER = {"may_differ": True}  # between the ranks of a process group


class LossKwargs(TypedDict, total=False):
    """Keywords of the loss, wherever it is called or made; `LossOptions` says what they mean.

    `margin` and `scale` are not among them: not everywhere do they have defaults.
    """

    interclass_filter: float | None
    label_smoothing: float
    margin_grad: MarginGrad
    beyond_pi: BeyondPi
    multi_label: MultiLabel
    precision: Precision
    reduction: Reduction
    ignore_index: int
    grad_average: bool
    uneven_batches: bool | None
    sparse_grad: bool
    check_inputs: bool
    workspace_bytes: int
    num_centers: int


@dataclass(frozen=True)
class LossOptions:
    """Everything about the loss that is not a tensor of the batch; good once it is made.

    Args:
        margin: psi, such as ``ArcFace(0.3)`` (radians); m2 and m3 may be per-sample tensors [B],
            or tensors [B, P] like labels with several positives.
        scale: s > 0, the inverse temperature: a number, or for a call a tensor of one floating
            value, which gets a gradient where it requires one.
        interclass_filter: a negative cosine above this counts as 0 and gets no gradient (UNICOM's
            and PartialFC's filter for conflicting classes); None for no filter.
        label_smoothing: epsilon in [0, 1): the share of the target distribution that is spread
            evenly over the classes that take part, the label's own among them (Szegedy et al.,
            arXiv:1512.00567), as ``torch.nn.functional.cross_entropy`` has it. With several
            positives each one's cross entropy is smoothed over it and the negatives. Not together
            with `interclass_filter` or ``multi_label="separate"``.
        margin_grad: ``"straight_through"`` takes psi' as 1, as the published recipes do;
            ``"exact"`` is the true derivative, bounded near c = 1 and -1.
        beyond_pi: ``"keep"`` the formula where m1 * theta + m2 > pi, or ``"linear"``, ArcFace's
            continuation, so that psi stays monotone. Where m1 * theta + m2 < 0, ``"linear"`` holds
            psi at 1 - m3, as AdaFace does.
        multi_label: what becomes of the positives of a sample, of which labels [B, P] may name
            several. ``"average"`` is the mean of their cross entropies, each against the negatives
            alone; with one positive it is the softmax cross entropy. ``"separate"`` is MLCD's loss
            (An et al., arXiv:2407.17331, eq. 5), log(1 + sum over negatives of exp z) +
            log(1 + sum over positives of exp -z).
        precision: type of the unit vectors that are multiplied: ``"fp32"``, ``"fp16"``,
            ``"bf16"``. Sums, exponentials and the target's logit are float32 or better always.
            On CPUs ``"fp16"`` is computed as fp32.
            ``"auto"`` is fp32; under autocast it is fp16 on CUDA (unit vectors need no range, and
            fp16 has three more bits than bf16), and bf16 on CPUs that have bf16 instructions.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        ignore_index: the label of samples without loss and gradient.
        grad_average: with a process group, multiply the gradients of the embeddings and of
            per-sample margins by the number of ranks, because data-parallel wrappers (DDP, FSDP)
            average over ranks. False for wrappers that sum.
        uneven_batches: with a process group, whether ranks first tell each other their batch sizes
            (and whether their arguments are good), so that these may differ or be 0. None: on CPUs,
            where it costs one small message; elsewhere the host would wait for the device. To
            compile a step whole (``torch.compile(fullgraph=True)``) it must be False.
        sparse_grad: the gradient of the prototypes becomes a sparse COO tensor with the rows of the
            classes that took part. A dense optimizer moves the other rows too, by momentum and
            weight decay; a sparse one does not.
        check_inputs: look at the values first: raise if an embedding is NaN or infinite, or, on
            CUDA, if a label is no class. Otherwise the loss of such an embedding is NaN. Labels are
            always looked at on the CPU; on CUDA that would wait for the device, so there the loss
            of a sample with a bad label is NaN too, and the sample has no part in gradients.
        workspace_bytes: up to this much memory keeps cosines from forward to backward, which then
            multiplies three times instead of four; the rest it computes again. The result is the
            same bit for bit. Nothing is kept where no gradient is wanted, nor where multiplying
            again is as fast as reading: in fp16 and bf16 on CUDA, in bf16 on CPUs with AMX.
        num_centers: K, prototypes of each class, its sub-centres (Deng et al., Sub-center ArcFace,
            ECCV 2020): the cosine of a class is the largest of its K, and the gradient goes to that
            prototype, of equals to the first. K = 3 is usual where labels are noisy: wrong samples
            gather at other centres than right ones. At most 16 (on CUDA 8 in float32, 4 in
            float64). Not together with `label_smoothing`.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it, what was given and what is
            allowed.
    """

    margin: CombinedMargin
    scale: float | Tensor
    interclass_filter: float | None = None
    label_smoothing: float = 0.0
    margin_grad: MarginGrad = "straight_through"
    beyond_pi: BeyondPi = "keep"
    multi_label: MultiLabel = "average"
    precision: Precision = "auto"
    reduction: Reduction = "mean"
    ignore_index: int = -100
    grad_average: bool = True
    uneven_batches: bool | None = None
    sparse_grad: bool = field(default=False, metadata=_MAY_DIFFER)
    check_inputs: bool = field(default=False, metadata=_MAY_DIFFER)
    workspace_bytes: int = field(default=DEFAULT_WORKSPACE_BYTES, metadata=_MAY_DIFFER)
    num_centers: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.margin, CombinedMargin):
            raise TypeError(
                f"margin must be a CombinedMargin such as ArcFace(0.3), got {self.margin!r}"
            )
        scale = self.scale
        if isinstance(scale, Tensor):
            if not scale.is_floating_point() or scale.numel() != 1:
                raise TypeError(
                    "scale must be a number or a tensor of one floating value, got "
                    f"{kind(scale)} of the shape {list(scale.shape)}"
                )
            scale = float(scale.detach())  # where it is on a device, the host waits
        for name, value in (
            ("scale", scale),
            ("interclass_filter", self.interclass_filter),
            ("label_smoothing", self.label_smoothing),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, _REAL)):
                raise TypeError(f"{name} must be a number, got {kind(value)}: {value!r}")
        for name, allowed in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, _INTEGRAL):
                raise TypeError(f"{name} must be {allowed}, got {kind(value)}: {value!r}")
        if not 1 <= self.num_centers <= MAX_CENTERS:
            raise ValueError(
                f"num_centers must be {_INTEGERS['num_centers']}, got {self.num_centers}"
            )
        if self.workspace_bytes < 0:
            raise ValueError(f"workspace_bytes must be an int >= 0, got {self.workspace_bytes}")
        if scale is None or not 0 < scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {scale}")
        if self.interclass_filter is not None and not -1 <= self.interclass_filter <= 1:
            raise ValueError(
                "interclass_filter must be None or a cosine in [-1, 1], got "
                f"{self.interclass_filter}"
            )
        if self.label_smoothing is None or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        for name, choices in _ALLOWED.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.label_smoothing > 0:
            if self.num_centers > 1:
                raise ValueError(
                    "label_smoothing must be 0 with several centers of a class (num_centers = "
                    f"{self.num_centers}), got {self.label_smoothing}"
                )
            if self.interclass_filter is not None:
                raise ValueError(
                    "interclass_filter must be None with label_smoothing, which needs the logits "
                    f"of all classes, got {self.interclass_filter}"
                )
            if self.multi_label == "separate":
                raise ValueError(
                    'label_smoothing must be 0 with multi_label="separate", which has no softmax '
                    f"over classes, got {self.label_smoothing}"
                )

    @classmethod
    def for_ranks(cls, given: Mapping[str, Any]) -> tuple[LossOptions, Exception | None]:
        """The options, and what is wrong with them.

        A rank with bad options cannot leave the others alone. It gets, instead of each bad one,
        its default, so that it can do its part until all ranks raise.
        """
        try:
            return cls(**given), None
        except (TypeError, ValueError) as error:
            usable = cls(CombinedMargin(), 1.0)
            for name, value in given.items():
                with suppress(TypeError, ValueError):
                    usable = replace(usable, **{name: value})
            if usable.scale is not given.get("scale"):
                usable = usable.with_scale_like(given.get("scale"))
            return usable, error

    def with_scale_like(self, bad: object) -> LossOptions:
        """For a rank whose scale is bad: another, through which autograd reaches it as the other
        ranks expect."""
        if isinstance(bad, Tensor) and bad.is_floating_point():
            return replace(self, scale=1.0 + bad.flatten()[:0].sum())
        return self

    def same_on_every_rank(self) -> dict[str, object]:
        """The options in which the ranks of a process group must agree, as they compare them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata}
        if isinstance(self.scale, Tensor):  # which they compare with each step's numbers
            values["scale"] = "a tensor" + self.learns_scale * " that requires a gradient"
        m1, m2, m3 = self.margin.m1, self.margin.m2, self.margin.m3
        if not isinstance(m2, Tensor) and not isinstance(m3, Tensor):
            return {**values, "margin": repr(self.margin)}
        # Batches may be of different sizes, and so may such margins.
        of_each = ("per sample" if isinstance(m, Tensor) else m for m in (m2, m3))
        return {**values, "margin": "CombinedMargin(m1={}, m2={}, m3={})".format(m1, *of_each)}

    @cached_property
    def fingerprint(self) -> int:
        """The same for options that are `same_on_every_rank`."""
        return zlib.crc32(repr(self.same_on_every_rank()).encode())

    def of_each(self, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """m2 and m3 where they are tensors: float64 of the labels' shape, as the operators take
        them.

        A gradient goes back to those that were given.
        """
        return _of_each(self.margin.m2, labels), _of_each(self.margin.m3, labels)

    @property
    def learns_scale(self) -> bool:
        return isinstance(self.scale, Tensor) and self.scale.requires_grad

    def scale_on(self, device: torch.device) -> Tensor | None:
        """The scale where it wants a gradient: a float64 scalar, as the operators take it."""
        if not self.learns_scale:
            return None
        assert isinstance(self.scale, Tensor)
        return self.scale.to(device, torch.float64).reshape(())

    def packed(
        self, device: torch.device, wants_grad: bool, wants_embeddings: bool
    ) -> tuple[list[float], list[int]]:
        """`Reals` and `Codes`, the lists that the operators take.

        Args:
            device: of the prototypes.
            wants_grad: whether there will be a backward pass.
            wants_embeddings: whether it will be for the embeddings too, or for the scale.
        """
        m2, m3 = self.margin.m2, self.margin.m3
        reals = Reals(
            self.margin.m1,
            0.0 if isinstance(m2, Tensor) else m2,
            0.0 if isinstance(m3, Tensor) else m3,
            float(self.scale.detach() if isinstance(self.scale, Tensor) else self.scale),
            math.inf if self.interclass_filter is None else float(self.interclass_filter),
            float(self.label_smoothing),
        )
        precision = self._resolved_precision(device.type)
        keeps = wants_grad and not (precision == "bf16" and _MATRIX_UNIT)
        codes = Codes(
            self.margin_grad == "exact",
            self.beyond_pi == "linear",
            PRECISION[precision],
            REDUCTION[self.reduction],
            MULTI_LABEL[self.multi_label],
            self.workspace_bytes if keeps else 0,
            # Transforms have hardly a rule for sparse tensors.
            self.sparse_grad and not transforming(),
            self.num_centers,
            wants_embeddings,
        )
        return list(reals), list(codes)

    def _resolved_precision(self, device_type: str) -> str:
        if self.precision != "auto":
            return self.precision
        if not torch.is_autocast_enabled(device_type):
            return "fp32"
        if device_type == "cuda":
            return "fp16"
        return "bf16" if _FAST_BF16 else "fp32"


_T = TypeVar("_T")


class _Option(Generic[_T]):
    """An attribute that is one of the `options` of its object; setting it makes new options."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: OptionAttributes, owner: type | None) -> _T:
        if instance is None:
            raise AttributeError(self.name)
        value: _T = getattr(instance.options, self.name)
        return value

    def __set__(self, instance: OptionAttributes, value: _T) -> None:
        refuse_tensor(self.name, value)
        changes: dict[str, Any] = {self.name: value}
        instance.options = replace(instance.options, **changes)


class _FixedOption(_Option[_T]):
    """One that the shape of the prototypes depends on."""

    def __set__(self, instance: OptionAttributes, value: _T) -> None:
        raise AttributeError(
            f"{self.name} cannot be set, got {value!r}: the loss has {self.__get__(instance, None)}"
            " prototypes for each class; make another with the value wanted"
        )


class OptionAttributes:
    """Each option as an attribute of an object that has `options`: checked when it is set."""

    options: LossOptions

    margin = _Option[CombinedMargin]()
    scale = _Option[float]()
    interclass_filter = _Option[float | None]()
    label_smoothing = _Option[float]()
    margin_grad = _Option[MarginGrad]()
    beyond_pi = _Option[BeyondPi]()
    multi_label = _Option[MultiLabel]()
    precision = _Option[Precision]()
    reduction = _Option[Reduction]()
    ignore_index = _Option[int]()
    grad_average = _Option[bool]()
    uneven_batches = _Option[bool | None]()
    sparse_grad = _Option[bool]()
    check_inputs = _Option[bool]()
    workspace_bytes = _Option[int]()
    num_centers = _FixedOption[int]()


_CHOICES: dict[object, tuple[object, ...]] = {
    bool: (False, True),
    bool | None: (None, False, True),
}
_ALLOWED = {
    name: get_args(its_type) if get_origin(its_type) is Literal else _CHOICES[its_type]
    for name, its_type in get_type_hints(LossOptions).items()
    if get_origin(its_type) is Literal or its_type in _CHOICES
}


def refuse_tensor(name: str, value: object) -> None:
    """TypeError where an option of the module is a tensor, whose value goes with its call."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got {kind(value)}: give a tensor to each call, as "
            f"loss_fn(embeddings, labels, {name}=...)"
        )


def refuse_unknown(function: str, options: Mapping[str, object]) -> None:
    """TypeError where a keyword that `function` was given is no option of the loss."""
    for name in options:
        if name not in LossKwargs.__annotations__:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}; options of the loss "
                f"are {', '.join(f.name for f in fields(LossOptions))}"
            )


def kind(value: object) -> str:
    """What a value is, for messages."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _of_each(m: float | Tensor, labels: Tensor) -> Tensor | None:
    if not isinstance(m, Tensor):
        return None
    m = m.to(torch.float64)
    if m.dim() < labels.dim():
        m = m[:, None].expand(labels.shape)
    return m.contiguous()
