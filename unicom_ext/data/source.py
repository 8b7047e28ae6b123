"""Feature files as one long matrix of which a block at a time is in memory.

All headers are read, and all shapes compared, before anything else happens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from unicom_ext.data.formats import FeatureFile, find_files
from unicom_ext.data.joint import check_joint, join
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import digest_of

BLOCK_BYTES = 32 << 20  # of fp32 rows, of which three blocks are in memory at a time

# What `unicom-ext extract` writes beside features.
EXTRACTED, ENCODER = "extract.json", "encoder.pt"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    name: str  # "0000"; its labels go to labels_0000.npy
    image: FeatureFile | None
    text: FeatureFile | None
    first: int  # number of its first row in the whole

    @property
    def files(self) -> list[FeatureFile]:
        """Image and text, as far as they are there."""
        return [file for file in (self.image, self.text) if file is not None]

    @property
    def rows(self) -> int:
        return self.files[0].rows


class Block(NamedTuple):
    shard: Shard
    start: int  # in the shard
    rows: Tensor  # fp32 [n, d]


class Rows(Protocol):
    """A matrix [rows, dim] that can be read in blocks; `Source` is one on disk."""

    rows: int
    dim: int
    shards: list[Shard]

    def take(self, rows: np.ndarray) -> Tensor: ...

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Block]: ...


class Source:
    """All shards, image and text joined.

    Args:
        path: feature files; see `unicom_ext.data.formats`.
        joint: "image" or "text" features alone, or both by "average" or "concat"; see
            `unicom_ext.data.joint.join`.
        image_weight: share of the image where both are joined, in (0, 1).
        image_column, text_column: where Parquet files have them.

    Raises SourceError (files) and ConfigError (joint, image_weight).

    rows, dim: of the joint features.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        joint: str = "image",
        image_weight: float = 0.5,
        image_column: str = "image_embedding",
        text_column: str = "text_embedding",
    ) -> None:
        check_joint(joint, image_weight)
        self.path = Path(path)
        self._joint, self._image_weight = joint, image_weight
        pairs = find_files(self.path, joint, image_column, text_column)
        self.shards: list[Shard] = []
        first = 0
        for name, image, text in pairs:
            shard = Shard(name, image, text, first)
            self.shards.append(shard)
            first += shard.rows
        _check_shapes(self.shards)
        self.rows = first
        if self.rows == 0:
            raise SourceError(f"{path}: has no rows")
        files = next(shard for shard in self.shards if shard.rows).files
        dims = [file.dim for file in files]
        if joint == "average" and dims[0] != dims[1]:
            raise SourceError(
                f"{files[1].path}: has {dims[1]} dimensions and {files[0].path} {dims[0]}; an "
                "average needs equal ones (concat does not)"
            )
        self.dim = sum(dims) if joint == "concat" else dims[0]

    def read(self, shard: Shard, start: int, stop: int) -> Tensor:
        """Joint features fp32 [stop - start, d]; see `join`."""
        return self._join([file.read(start, stop) for file in shard.files])

    def take(self, rows: np.ndarray) -> Tensor:
        """Joint features fp32 [n, d] of the given rows of the whole, increasing."""
        taken = torch.empty(len(rows), self.dim)
        for shard in self.shards:
            begin, end = np.searchsorted(rows, (shard.first, shard.first + shard.rows))
            if begin < end:
                own = rows[begin:end] - shard.first
                taken[begin:end] = self._join([file.take(own) for file in shard.files])
        return taken

    def blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        size: int = 0,
        shuffle: np.random.Generator | None = None,
    ) -> Iterator[Block]:
        """The rows [start, stop) in blocks of at most `size` that do not cross shards, in their
        order or shuffled.

        The next block is read while the caller works on the last one.
        """
        size = size or max(192, BLOCK_BYTES // (4 * self.dim))
        stop = self.rows if stop is None else stop

        def pieces() -> Iterator[tuple[Shard, int, int]]:
            for shard in self.shards:
                begin = max(start - shard.first, 0)
                end = min(stop - shard.first, shard.rows)
                for at in range(begin, end, size):
                    yield shard, at, min(at + size, end)

        order: Iterable[tuple[Shard, int, int]] = pieces()
        if shuffle is not None:
            order = list(order)
            shuffle.shuffle(order)
        return _one_ahead(lambda p: Block(p[0], p[1], self.read(*p)), order)

    def _join(self, of_files: list[np.ndarray]) -> Tensor:
        parts = [torch.from_numpy(values).float() for values in of_files]
        if len(parts) == 1:
            return parts[0]
        image, text = parts
        return join(image, text, self._joint, self._image_weight)

    @property
    def images(self) -> dict[str, Any] | None:
        """Facts about the images that `unicom-ext extract` has made these features of; None where
        it has not, or does not say."""
        try:
            return json.loads((self.path / EXTRACTED).read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    @property
    def files(self) -> list[Path]:
        return [file.path for shard in self.shards for file in shard.files]

    def describe(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "rows": self.rows,
            "dim": self.dim,
            "shards": [{"name": s.name, "rows": s.rows} for s in self.shards],
        }


def encoder_of(directory: Path) -> dict[str, Any] | None:
    """What tells the image encoder of a dump from others, by setting; None where there is no dump,
    or one that does not say.

    One that was fitted has the tensors that it was fitted to for weights.
    """
    try:
        facts = json.loads((directory / EXTRACTED).read_text())
        config, named, files = facts["config"], facts["contents"], facts["files"]
        fitted = digest_of(directory / ENCODER) if ENCODER in files else None
        return {
            "encoder": [config["encoder"], named.get("encoder")],
            "image_size": config["image_size"],
            "weights": named.get("weights", fitted),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_shapes(shards: list[Shard]) -> None:
    for shard in shards:
        if shard.image and shard.text and shard.image.rows != shard.text.rows:
            raise SourceError(
                f"{shard.text.path}: has {shard.text.rows} rows and {shard.image.path} "
                f"{shard.image.rows}"
            )
    filled = [shard for shard in shards if shard.rows]  # an empty file need not know its columns
    for shard in filled:
        for file, first in zip(shard.files, filled[0].files, strict=True):
            if file.dim != first.dim:
                raise SourceError(
                    f"{file.path}: has {file.dim} dimensions and {first.path} {first.dim}"
                )
            if file.dim == 0:
                raise SourceError(f"{file.path}: has no columns")


def on_device(blocks: Iterable[Block], device: torch.device) -> Iterator[Block]:
    """The blocks with their rows there. The next one is brought while the caller works on the last
    one, by a thread and a stream of their own."""
    if device.type == "cpu":
        yield from blocks
        return
    own, users = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def bring(block: Block) -> Block:
        with torch.cuda.stream(own):
            rows = block.rows.pin_memory().to(device, non_blocking=True)
        rows.record_stream(users)
        own.synchronize()
        return block._replace(rows=rows)

    yield from _one_ahead(bring, blocks)


def _one_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """read(item) for each item, computed in a thread one item ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(read, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
