"""Sums of unit rows by centroid, in whole numbers: exact, so that neither the order of the rows nor
blocks, threads, ranks and devices show in them, and a row can be taken out again."""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.ops import library

MAX_ROWS = 2**62
MAX_SHIFT = 50  # kMaxShift of csrc/core/unit_sums.h, which derives the bounds


class UnitSums:
    """Sums of unit rows by centroid, exact: at first none.

    Components of a unit row are computed in double, rounded to whole multiples of 2**-shift (of two
    equally near, to the even one) and added as integers. So sums are the same bit for bit in any
    order of the rows, on any device and CPU, and over processes.

    The shift is as large as N rows allow, ``min(50, 62 - ceil(log2(N)))``, so that no sum
    overflows: 42 for a million rows, 33 for 400 million. A component of a sum of n rows is within
    n * 2**-(shift + 1) of the sum in real numbers, but for the rounding of double.

    Args:
        count: k, how many sums.
        dim: d, of the rows.
        rows: N, how many rows are ever in the sums at once, those of other processes included if
            theirs are added to these; from 1 to 2**62.
        device: where they are, and where rows have to be.

    Attributes:
        rows: as given, or what `make_room` has made of it.
        values: [k, d] int64, multiples of 2**-shift.
        counts: [k] int64, how many rows are in each.
        shift: see above.

    Raises:
        ValueError: `rows` is out of range.
    """

    def __init__(
        self, count: int, dim: int, *, rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.shift = rows, shift_for(rows)
        self.values = torch.zeros(count, dim, dtype=torch.int64, device=device)
        self.counts = torch.zeros(count, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, index: Tensor, before: Tensor | None = None) -> None:
        """Adds each unit row to a sum, and takes it out of the one that it is in.

        Rows that are zero or not finite are left out, whatever their index.

        Args:
            rows: [N, d] float32.
            index: [N] int64 in [-1, k), the sum of each row, -1 for none.
            before: [N] int64 likewise, the sum that holds the row now; None where no row is in any.
                A row that stays where it is costs next to nothing.

        Raises:
            ValueError: an argument is wrong; nothing has changed then. On CUDA, where the host
                does not wait to see them, indices that are out of range count as -1.
        """
        library.run(
            library.ops.add_unit_rows, self.values, self.counts, rows, index, self.shift, before
        )

    def make_room(self, rows: int) -> None:
        """For so many rows in all, rounding what is there to the multiples that these allow.

        Args:
            rows: as of the class; not fewer than before.

        Raises:
            ValueError: `rows` is out of range.
        """
        if not self.rows <= rows <= MAX_ROWS:
            raise ValueError(f"rows must be from {self.rows} to 2**62, got {rows}")
        lost = self.shift - shift_for(rows)
        if lost:
            self.values += 1 << lost >> 1
            self.values >>= lost
        self.rows, self.shift = rows, self.shift - lost

    def directions(self) -> Tensor:
        """The sums as unit vectors, [k, d] float32, zero where the sum is zero.

        Norms are of double arithmetic in one order of summation: the same bits everywhere.
        """
        return directions(self.values)


def shift_for(rows: int) -> int:
    """How many binary digits behind the point sums of so many rows can have."""
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be from 1 to 2**62, got {rows}")
    return min(MAX_SHIFT, 62 - (rows - 1).bit_length())


def directions(sums: Tensor) -> Tensor:
    """Unit vectors [k, d] float32 of sums [k, d] int64, as of `UnitSums.directions`."""
    return library.run(library.ops.directions, sums)
