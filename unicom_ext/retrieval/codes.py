"""What an index stores of a row instead of its floats.

    int8    round(127 x / max |x|) in each dimension, with the largest of the row's own: d bytes
    binary  whether x > 0 in each dimension: d bits

The scale of an int8 code is that of its row, not of a dimension, as faiss's SQ8 learns it from rows
that it is trained with: a cosine does not change with the length of a row, so the code alone is
enough to compare, nothing has to be trained or kept beside it, and no row changes another's code.
Query and gallery are coded alike. Of binary codes the cosine is 1 - 2/d times the Hamming distance,
so its order is that of the distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.retrieval.arguments import check_codes, check_rows
from unicom_ext.utils.search import Matrix, check_finite


@torch.no_grad()
def encode(rows: Tensor, codes: str) -> Tensor:
    """The codes of rows, as an index stores them.

    Args:
        rows: [n, d] floating point, of any norm.
        codes: ``"int8"``, ``round(127 x / max |x|)`` with the largest of the row's own, or
            ``"binary"``, whether x > 0.

    Returns:
        int8 [n, d], or uint8 [n, ceil(d / 8)] of bits as `numpy.packbits` packs them and faiss
        takes them: the first dimension is the highest bit of the first byte, and what is left of
        the last byte is 0.

    Raises:
        TypeError: a type is wrong.
        ValueError: NaN or infinity, or other codes.
    """
    check_rows("rows", rows)
    check_codes(codes)
    check_finite("rows", rows)
    values = _values(rows, codes)
    if codes == "int8":
        return values
    bits = torch.nn.functional.pad(values > 0, (0, -rows.shape[1] % 8)).view(len(rows), -1, 8)
    weights = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=rows.device)
    return (bits * weights).sum(2, dtype=torch.uint8)


class CodedRows:
    """The codes of rows as a `unicom_ext.utils.search.Matrix` of integers; bits are 1 and -1.

    Args:
        rows: which are coded as they are read, from the dimensions that are asked for.
        codes: see `encode`.
    """

    def __init__(self, rows: Matrix, codes: str) -> None:
        self._rows, self._codes = rows, codes
        self.shape, self.device = rows.shape, rows.device

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: tuple[slice | Tensor, slice]) -> Tensor:
        return _values(self._rows[index], self._codes)


def _values(rows: Tensor, codes: str) -> Tensor:
    """int8 [n, d]."""
    if codes == "binary":
        return (rows > 0).to(torch.int8).mul_(2).sub_(1)
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True).double()
    scaled = rows.double().div_(largest.masked_fill_(largest == 0, 1))
    return scaled.mul_(127).round_().to(torch.int8)
