"""Nearest centroid by cosine, without the N x k matrix: the inner loop of the clustering.

`nearest` is one call; `Centroids` packs them once for many calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.ops import library


class Centroids:
    """Centroids [k, d], packed for `nearest`.

    Products of 8-bit integers on CPUs, of fp16 on CUDA, find the few centroids that may be the
    nearest, and these are compared in double.

    Memory: the centroids and their packed copy, k * d values of 4 bytes and of 1 (CUDA: 2). A
    search on CUDA takes up to 50 MB and 2 d bytes for each of 16,384 rows at a time.

    Args:
        centroids: [k, d] floating point, finite, any norm, on the CPU or a CUDA device; k >= 1. A
            zero row has cosine 0 with everything. Kept in float32.

    Raises:
        TypeError, ValueError: `centroids` is something else.
    """

    def __init__(self, centroids: Tensor) -> None:
        self.values = _fp32_rows("centroids", centroids)
        if self.device.type == "cuda":
            _check_finite(self.values)
        self._packed = library.run(library.ops.pack_centroids, self.values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        """Where they are, and where rows have to be."""
        return self.values.device

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The centroid of largest cosine to each row, the lowest index among equals.

        Args:
            rows: [N, d] floating point, any norm, on the device of the centroids; taken in float32.
            guess: [N] int64 in [-1, k), the index that each row is likely to get, -1 for rows
                without a guess. Good ones save some time; none changes the result. On CUDA what is
                not in [-1, k) counts as -1.

        Returns:
            index [N] int64, -1 for a zero row and for one with NaN or infinity, and score [N]
            float32, the cosine, 0 for a zero row and NaN for a row that is not finite. Both are
            those of double arithmetic on the float32 values, whatever the device, the instruction
            set and the number of threads. On CUDA the host does not wait for them.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        rows = _fp32_rows("rows", rows)
        if rows.device != self.device:
            raise ValueError(f"rows must be on {self.device} like the centroids, got {rows.device}")
        return library.run(library.ops.nearest, rows, self.values, self._packed, guess)


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The centroid of largest cosine to each row, as ``Centroids(centroids).nearest(rows)``.

    Args:
        rows: [N, d] floating point, any norm.
        centroids: [k, d] floating point, finite, any norm, on the same device.

    Returns:
        index [N] int64 and cosine [N] float32, as of `Centroids.nearest`.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    return Centroids(centroids).nearest(rows)


def _check_finite(centroids: Tensor) -> None:
    """The operators on CUDA do not wait to see values, so they cannot raise."""
    bad = ~torch.linalg.vector_norm(centroids, dim=1, dtype=torch.float64).isfinite()
    if bad.any():
        raise ValueError(f"centroids must be finite, but row {int(bad.nonzero()[0])} is not")


def _fp32_rows(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    library.check_device(x.device, name)
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {list(x.shape)}")
    x = x.detach().float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
