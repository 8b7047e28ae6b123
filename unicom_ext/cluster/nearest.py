"""Nearest centroid by cosine, without the N x k matrix: the inner loop of the clustering.

`nearest` is one call; `Centroids` packs them once for many calls.
"""

from __future__ import annotations

from torch import Tensor

from unicom_ext import _core
from unicom_ext.functional import _ops

PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}
MAX_INT8_DIM = 65536  # longer sums of products of bytes might leave int32


class Centroids:
    """Centroids [k, d], packed for `nearest`.

    Args:
        centroids: [k, d] floating point, finite, any norm; k >= 1. A zero row has cosine 0 with
            everything. Kept in float32.
        precision: of the products that find the few centroids that may be the nearest: ``"fp32"``,
            ``"bf16"``, ``"int8"`` or ``"auto"``, which is int8 where the CPU has instructions for
            it and fp32 elsewhere. These few are compared in double, so the result is the same with
            each.

    Memory: the centroids and their packed copy, k * d values of 4 and of 4, 2 or 1 bytes.
    """

    def __init__(self, centroids: Tensor, precision: str = "auto") -> None:
        self.values = _fp32_rows("centroids", centroids)
        if precision == "auto":
            fast = _core.cpu_capability() == "avx512_bf16"
            fits = self.values.shape[1] <= MAX_INT8_DIM
            precision = "int8" if fast and fits else "fp32"
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {('auto', *PRECISIONS)}, got {precision!r}")
        self._precision = PRECISIONS[precision]
        self._packed = _ops.pack_centroids(self.values, self._precision)

    def __len__(self) -> int:
        return len(self.values)

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The centroid of largest cosine to each row, the lowest index among equals.

        Args:
            rows: [N, d] floating point, any norm; taken in float32.
            guess: [N] int64 in [-1, k), the index that each row is likely to get, -1 for rows
                without a guess. Good ones save some time; none changes the result.

        Returns:
            index: [N] int64; -1 for a zero row and for one with NaN or infinity.
            score: [N] float32, the cosine; 0 for a zero row, NaN for a row that is not finite.

            Both are those of double arithmetic on the float32 values, whatever the instruction set,
            the precision and the number of threads.
        """
        return _ops.nearest(
            _fp32_rows("rows", rows), self.values, self._packed, self._precision, guess
        )


def nearest(rows: Tensor, centroids: Tensor, precision: str = "auto") -> tuple[Tensor, Tensor]:
    """`Centroids(centroids, precision).nearest(rows)`."""
    return Centroids(centroids, precision).nearest(rows)


def add_unit_rows(sums: Tensor, counts: Tensor, rows: Tensor, index: Tensor) -> None:
    """``sums[index[i]] += rows[i] / |rows[i]|`` and ``counts[index[i]] += 1``, in place.

    Args:
        sums: [k, d] float64: float32 sums stop growing when they are 2**24 times a summand.
        counts: [k] int64.
        rows: [N, d] float32.
        index: [N] int64 in [-1, k); rows with -1 are left out.
    """
    _ops.add_unit_rows(sums, counts, rows, index)


def _fp32_rows(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    if x.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the CPU, got {x.device}: there is no kernel for others"
        )
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {list(x.shape)}")
    x = x.detach().float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
