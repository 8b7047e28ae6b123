"""What the operators of a step on several ranks take beside tensors, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from unicom_ext.loss.selection import Sampling, Selected
from unicom_ext.ops.codes import Codes, Reals


class Sizes(NamedTuple):
    """The list ``sizes``."""

    batch: int  # samples of the largest batch of a rank
    width: int  # labels of a sample, P, on the rank that gives most
    ignore_index: int
    num_classes: int  # from here on the fields of `Sampling`
    num_sampled: int
    dim: int
    num_features: int
    seed: int
    nested: int

    @property
    def sampling(self) -> Sampling:
        return Sampling(*self[3:])

    def most_sampled(self, labels: int) -> int:
        """At least as many as the sampled classes of all ranks, for so many labels of all ranks."""
        most = self.num_sampled + labels
        return self.num_classes if most > self.num_classes else most


class Flags(NamedTuple):
    """The list ``flags``."""

    want_metrics: bool
    grad_embeddings: bool  # some rank needs the gradient of its embeddings
    grad_average: bool
    grad_scale: bool  # the scale is a tensor that wants one


# Lists, because torch looks at every argument of a Python operator at a cost that grows with the
# square of their number.
SCHEMA = "str group_name, SymInt[] sizes, float[] reals, int[] codes, bool[] flags"


class Call(NamedTuple):
    """What the operators take beside tensors, in the order of `SCHEMA`."""

    group_name: str
    sizes: Sizes
    reals: Reals
    codes: Codes
    flags: Flags

    @classmethod
    def of(
        cls,
        group_name: str,
        sizes: Sequence[int],
        reals: Sequence[float],
        codes: Sequence[int],
        flags: Sequence[bool],
    ) -> Call:
        """From lists such as an operator gets."""
        return cls(group_name, Sizes(*sizes), Reals(*reals), Codes(*codes), Flags(*flags))

    def settings(self) -> dict[str, float]:
        """In what ranks must agree, by name; they may compute in different precisions."""
        sizes, codes, flags = self.sizes._asdict(), self.codes, self.flags
        del sizes["batch"], sizes["width"]
        return {
            **sizes,
            **self.reals._asdict(),
            "exact_margin_grad": codes.exact_margin_grad,
            "linear_beyond_pi": codes.linear_beyond_pi,
            "reduction": codes.reduction,
            "multi_label": codes.multi_label,
            "num_centers": codes.num_centers,
            "want_metrics": flags.want_metrics,
            "grad_average": flags.grad_average,
            "scale.requires_grad": flags.grad_scale,
        }


class Results(NamedTuple):
    """What forward returns; tensors that are not there are empty."""

    loss: Tensor  # a scalar, or [b]
    sample_loss: Tensor  # [b], of this rank's samples, as the next three (cosines like labels)
    target_cosine: Tensor
    largest_negative: Tensor
    top1: Tensor
    class_index: Tensor  # [bound] rows of this rank's prototypes
    num_valid: Tensor  # of class_index
    feature_index: Tensor  # [d']
    slot: Tensor  # [B] or [B, P] each label's position in class_index; -1 ignored, -2 elsewhere
    x: Tensor  # [B, d] all embeddings; half precision is summed over ranks in float32
    state: Tensor  # [B, numbers of a sample]
    packed: Tensor  # of the sampled prototypes; empty where there are none
    kept: Tensor


def took_part(
    call: Call, class_index: Tensor | None, feature_index: Tensor | None, results: Results
) -> Selected:
    """What took part.  class_index, feature_index: what forward was given."""
    sampling = call.sizes.sampling
    some = sampling.draws_features or feature_index is not None
    return Selected(
        results.slot,
        results.class_index if sampling.draws_classes or class_index is not None else None,
        results.num_valid if sampling.draws_classes else None,
        results.feature_index if some else None,
    )
