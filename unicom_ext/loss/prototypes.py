"""Prototypes before the first step."""

from __future__ import annotations

from os import PathLike, fspath

import numpy as np
import torch
from torch import Tensor, nn

from unicom_ext.utils.arrays import check_finite, is_floating, open_array, to_tensor

STANDARD_DEVIATION = 0.01  # as PartialFC has it
_BLOCK = 256


@torch.no_grad()
def fill_prototypes(weight: Tensor, first_row: int, seed: int) -> None:
    """Initial prototypes from row `first_row` of all on, [n, d], in place.

    Normal with standard deviation 0.01, drawn in float32. Each value is a function of (seed, row,
    dimension, d) and of the kind of device alone, so that shards are parts of one whole.
    """
    if weight.device.type == "meta":
        return
    generator = torch.Generator(weight.device)
    stop, dim = first_row + len(weight), weight.shape[1]
    rows = torch.empty(_BLOCK, dim, dtype=torch.float32, device=weight.device)
    for block in range(first_row // _BLOCK, -(-stop // _BLOCK)):
        key = np.random.SeedSequence([seed % 2**64, block]).generate_state(1, np.uint64)
        rows.normal_(0.0, STANDARD_DEVIATION, generator=generator.manual_seed(int(key[0])))
        begin, end = max(block * _BLOCK, first_row), min((block + 1) * _BLOCK, stop)
        of_block = slice(begin - block * _BLOCK, end - block * _BLOCK)
        weight[begin - first_row : end - first_row] = rows[of_block]


@torch.no_grad()
def fill_with_centroids(
    weight: Tensor, first_class: int, centroids: Tensor, num_centers: int = 1
) -> None:
    """Prototypes [n * K, d] in the directions of the centroids [C, d] of their classes, in place.

    They get the norm that random prototypes have on average; a zero row stays zero. Where a class
    has several, each also has a tenth of what it was before, its random prototype: equal ones would
    leave all but the first without gradient.
    """
    count = len(weight) // num_centers
    own = centroids[first_class : first_class + count].double()
    length = STANDARD_DEVIATION * weight.shape[1] ** 0.5
    own = nn.functional.normalize(own, eps=1e-300) * length
    if num_centers > 1:
        own = own.repeat_interleave(num_centers, 0)
        own += 0.1 * weight * (own != 0).any(dim=1, keepdim=True)
    weight.copy_(own)


def read_centroids(centroids: Tensor | np.ndarray | str | PathLike[str]) -> Tensor:
    """Centroids [C, d], checked; of a `.npy` file, if it is a name.

    Raises:
        ValueError: they are not a floating point matrix of finite numbers, or the file cannot be
            read.
        TypeError: they are something else.
    """
    where = "centroids"
    if isinstance(centroids, str | PathLike):
        where = f"centroids: {fspath(centroids)}"
        centroids = open_array(centroids, "centroids")
    if isinstance(centroids, np.ndarray) and is_floating(centroids.dtype):
        centroids = to_tensor(centroids)
    if not isinstance(centroids, Tensor | np.ndarray):
        raise TypeError(
            "centroids must be a tensor, a NumPy array or the name of a .npy file, got "
            f"{type(centroids).__name__}"
        )
    if (
        not isinstance(centroids, Tensor)
        or centroids.dim() != 2
        or not centroids.is_floating_point()
        or centroids.numel() == 0
    ):
        raise ValueError(
            f"{where} must be a floating point matrix [C, d], got {centroids.dtype} of shape "
            f"{list(centroids.shape)}"
        )
    if centroids.is_meta or centroids.layout != torch.strided:
        kind = "one on the meta device" if centroids.is_meta else f"a {centroids.layout} tensor"
        raise ValueError(f"{where} must be a dense tensor with values, got {kind}")
    check_finite(where, centroids.float())  # in which they are scaled
    return centroids
