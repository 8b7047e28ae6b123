"""Margins: what is done to the cosine between an embedding and the prototype of its own class.

Every margin of the angular family is one function of the target cosine ``c`` in [-1, 1]::

    psi(c) = cos(m1 * arccos(c) + m2) - m3

``m1`` multiplies the angle (SphereFace), ``m2`` is added to it in radians (ArcFace), ``m3`` is
subtracted from the cosine (CosFace). They really combine: none is ignored because another is set.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class CombinedMargin:
    """psi(c) = cos(m1 * arccos(c) + m2) - m3 (Deng et al., "ArcFace", arXiv:1801.07698, eq. 4).

    A tensor that requires a gradient gets the derivative of the loss, whatever `margin_grad` is:
    margins may be learned, or be made of the embeddings (MagFace, arXiv:2103.06627). Two margins
    are equal when they are the same function psi, whichever class they were written with.

    Args:
        m1: factor on the angle, > 0, one number for all samples.
        m2: added to the angle, in radians. A number, or a floating point tensor [B] with one value
            per sample, as AdaFace (arXiv:2204.00964) and ElasticFace (arXiv:2109.09416) need; or,
            with labels [B, P], a tensor [B, P] with one for each positive.
        m3: subtracted from the cosine. A number or such a tensor.

    Raises:
        TypeError: a wrong kind of value.
        ValueError: a wrong value; those inside a tensor are not looked at.

    Warns:
        UserWarning: m2 is beyond pi, and so likely in degrees; m3 is beyond 2.
    """

    m1: float = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0

    def __post_init__(self) -> None:
        m1 = _number("m1", self.m1, allowed="a finite number > 0")
        if m1 <= 0:
            raise ValueError(f"m1 must be a finite number > 0, got {m1}")
        object.__setattr__(self, "m1", m1)
        object.__setattr__(self, "m2", _number_or_per_sample("m2", self.m2))
        if not isinstance(self.m2, Tensor) and abs(self.m2) > math.pi:
            warnings.warn(
                f"m2 is in radians, and {self.m2:g} is more than half a turn; {self.m2:g} degrees "
                f"would be {math.radians(self.m2):.3g}",
                stacklevel=4,
            )
        object.__setattr__(self, "m3", _number_or_per_sample("m3", self.m3))
        if not isinstance(self.m3, Tensor) and abs(self.m3) > 2:
            warnings.warn(
                f"m3 is subtracted from a cosine, and {self.m3:g} is more than two cosines differ",
                stacklevel=4,
            )

    @property
    def requires_grad(self) -> bool:
        """Whether m2 or m3 does."""
        m2, m3 = self.m2, self.m3
        return (isinstance(m2, Tensor) and m2.requires_grad) or (
            isinstance(m3, Tensor) and m3.requires_grad
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CombinedMargin):
            return NotImplemented
        return self.m1 == other.m1 and _same(self.m2, other.m2) and _same(self.m3, other.m3)

    def __hash__(self) -> int:
        # Equal margins must hash alike, and tensors may change in place: only their shape counts.
        return hash((self.m1, _hashable(self.m2), _hashable(self.m3)))

    def __repr__(self) -> str:
        return f"CombinedMargin(m1={self.m1}, m2={_show(self.m2)}, m3={_show(self.m3)})"


class ArcFace(CombinedMargin):
    """Additive angular margin: psi(c) = cos(arccos(c) + m2), m2 in radians, number or tensor [B].

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    arXiv:1801.07698. UNICOM (arXiv:2304.05884) trains with m2 = 0.3.

    Args:
        m2: in radians, as of `CombinedMargin`.
    """

    def __init__(self, m2: float | Tensor = 0.5) -> None:
        super().__init__(m2=m2)

    def __repr__(self) -> str:
        return f"ArcFace({_show(self.m2)})"


class CosFace(CombinedMargin):
    """Additive cosine margin: psi(c) = c - m3, m3 a number or a tensor [B].

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", arXiv:1801.09414.

    Args:
        m3: subtracted from the cosine, as of `CombinedMargin`.
    """

    def __init__(self, m3: float | Tensor = 0.35) -> None:
        super().__init__(m3=m3)

    def __repr__(self) -> str:
        return f"CosFace({_show(self.m3)})"


class SphereFace(CombinedMargin):
    """Multiplicative angular margin: psi(c) = cos(m1 * arccos(c)).

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", arXiv:1704.08063;
    the default is the value that the ArcFace paper compares with. Where m1 * arccos(c) > pi, psi
    turns back up; ``beyond_pi="linear"`` of the loss keeps it monotone.

    Args:
        m1: factor on the angle, > 0.
    """

    def __init__(self, m1: float = 1.35) -> None:
        super().__init__(m1=m1)

    def __repr__(self) -> str:
        return f"SphereFace({self.m1})"


def _number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return float(value)


def _number_or_per_sample(name: str, value: object) -> float | Tensor:
    allowed = "a finite number or a floating point tensor [B] or [B, P]"
    if not isinstance(value, Tensor):
        return _number(name, value, allowed)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be {allowed}, got a tensor of {value.dtype}")
    if value.dim() not in (1, 2):
        raise ValueError(f"{name} must be {allowed}, got a tensor of shape {list(value.shape)}")
    return value


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _hashable(value: float | Tensor) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _show(value: float | Tensor) -> str:
    if isinstance(value, Tensor):
        return f"<tensor {list(value.shape)} {value.dtype}>"
    return repr(value)
