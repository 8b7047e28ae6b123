"""Feature files as one long matrix of which a block at a time is in memory.

Layouts, told apart by what is there:

    DIR/img_emb/img_emb_0000.npy ...     and/or DIR/text_emb/text_emb_0000.npy ..., the layout of
                                         public dumps of CLIP embeddings; shards pair by number
    DIR/*.npy or FILE.npy                image features
    DIR/*.parquet or FILE.parquet        columns of lists: image and text features

`.npy` shards are float16 or float32 [n, d]. All headers are read, and all shapes compared, before
anything else happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from unicom_ext.cluster.config import ClusterConfig

BLOCK_BYTES = 32 << 20  # of fp32 rows, of which three blocks are in memory at a time


class SourceError(ValueError):
    """Feature files that cannot be used; the message names the file and what is wrong."""


class FeatureFile(Protocol):
    path: Path
    rows: int
    dim: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), float16 or float32 [stop - start, dim], of the caller."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows, increasing."""


class NpyFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise SourceError(f"{path}: has version {version} of the .npy format")
                shape, fortran_order, dtype = read_header(file)
                self._offset = file.tell()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
        except SourceError:
            raise
        except ValueError as error:
            raise SourceError(f"{path}: is not a .npy file: {error}") from None
        if len(shape) != 2 or dtype not in (np.float16, np.float32) or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise SourceError(
                f"{path}: holds {dtype} of shape {list(shape)}{order}, must be float16 or float32 "
                "of shape [n, d] in C order"
            )
        self.rows, self.dim = shape
        self._dtype = dtype
        wanted = self._offset + self.rows * self.dim * dtype.itemsize
        there = path.stat().st_size
        if there < wanted:
            raise SourceError(f"{path}: is truncated: {there} bytes of {wanted}")

    def _map(self) -> np.memmap:
        # Opened each time: pages that stay mapped would count as memory of this process.
        return np.memmap(self.path, self._dtype, "r", self._offset, (self.rows, self.dim))

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self._map()[start:stop])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._map()[rows])


class ParquetColumn:
    def __init__(self, path: Path, column: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ModuleNotFoundError:
            raise SourceError(
                f"{path}: Parquet files need pyarrow: pip install 'unicom_ext[cluster]'"
            ) from None
        self.path, self.column = path, column
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        names = self._file.schema_arrow.names
        if column not in names:
            raise SourceError(f"{path}: has no column {column!r}, but {', '.join(names)}")
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.rows = int(self._first[-1])
        self._cached: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))
        self.dim = self._group(0).shape[1] if self.rows else 0

    def _group(self, i: int) -> np.ndarray:
        if self._cached[0] != i:
            array = self._file.read_row_group(i, columns=[self.column]).column(0).combine_chunks()
            rows = len(array)
            if array.null_count or not hasattr(array, "flatten"):
                what = "has nulls" if array.null_count else f"holds {array.type}, not lists"
                raise SourceError(f"{self.path}: column {self.column!r} {what}")
            values = array.flatten().to_numpy(zero_copy_only=False)
            lengths = {len(values) // rows} if hasattr(array.type, "list_size") else set(
                np.diff(array.offsets.to_numpy()).tolist()
            )  # fmt: skip
            if values.dtype not in (np.float16, np.float32, np.float64) or len(lengths) != 1:
                raise SourceError(
                    f"{self.path}: column {self.column!r} must hold lists of numbers, all of one "
                    f"length; got {array.type}, lengths {sorted(lengths)[:5]}"
                )
            if values.dtype == np.float64:
                values = values.astype(np.float32)
            self._cached = (i, values.reshape(rows, -1))
        return self._cached[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        groups = np.searchsorted(self._first, rows, side="right") - 1
        parts = [
            self._group(i)[rows[groups == i] - self._first[i]] for i in np.unique(groups).tolist()
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)


@dataclass(frozen=True)
class Shard:
    name: str  # "0000"; its labels go to labels_0000.npy
    image: FeatureFile | None
    text: FeatureFile | None
    first: int  # number of its first row in the whole

    @property
    def rows(self) -> int:
        return (self.image or self.text).rows


class Block(NamedTuple):
    shard: Shard
    start: int  # in the shard
    rows: Tensor  # fp32 [n, d]


class Rows(Protocol):
    """A matrix [rows, dim] that can be read in blocks; `Source` is one on disk."""

    rows: int
    dim: int

    def take(self, rows: np.ndarray) -> Tensor: ...

    def blocks(
        self, start: int, stop: int, size: int, shuffle: np.random.Generator | None = None
    ) -> Iterator[Block]: ...


class Source:
    """All shards, joined as the config says.

    rows, dim: of the joint features.
    """

    def __init__(self, path: str | Path, config: ClusterConfig) -> None:
        self.path = Path(path)
        self._config = config
        wants_image = config.joint != "text"
        wants_text = config.joint != "image"
        pairs = _find(self.path, config, wants_image, wants_text)
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
        one = self.shards[0]
        dims = [f.dim for f in (one.image, one.text) if f is not None]
        if config.joint == "average" and dims[0] != dims[1]:
            raise SourceError(
                f"{one.text.path}: has {dims[1]} dimensions and {one.image.path} {dims[0]}; an "
                "average needs equal ones (concat does not)"
            )
        self.dim = sum(dims) if config.joint == "concat" else dims[0]

    def read(self, shard: Shard, start: int, stop: int) -> Tensor:
        """Joint features fp32 [stop - start, d]; see `join`."""
        return self._join(lambda file: file.read(start, stop), shard)

    def take(self, rows: np.ndarray) -> Tensor:
        """Joint features fp32 [n, d] of the given rows of the whole, increasing."""
        parts = []
        for shard in self.shards:
            begin, end = np.searchsorted(rows, (shard.first, shard.first + shard.rows))
            if begin < end:
                own = rows[begin:end] - shard.first
                parts.append(self._join(lambda file, own=own: file.take(own), shard))
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

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

        order = pieces()
        if shuffle is not None:
            order = list(order)
            shuffle.shuffle(order)
        return _one_ahead(lambda p: Block(p[0], p[1], self.read(*p)), order)

    def _join(self, get: Callable[[FeatureFile], np.ndarray], shard: Shard) -> Tensor:
        parts = [
            torch.from_numpy(get(file)).float()
            for file in (shard.image, shard.text)
            if file is not None
        ]
        return parts[0] if len(parts) == 1 else join(*parts, self._config)

    def describe(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "rows": self.rows,
            "dim": self.dim,
            "shards": [{"name": s.name, "rows": s.rows} for s in self.shards],
        }


def join(image: Tensor, text: Tensor, config: ClusterConfig) -> Tensor:
    """Features of both, from fp32 [n, d1] and [n, d2]. With w the image's weight:

    average  w u + (1 - w) v, u and v the unit vectors of image and text
    concat   [sqrt(w) u, sqrt(1 - w) v]: cosines are w times the image's plus 1 - w times the text's

    A row is zero where either part is, and NaN where either is not finite.
    """
    w = config.image_weight
    weights = (w, 1 - w) if config.joint == "average" else (w**0.5, (1 - w) ** 0.5)
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (image, text)]
    both = (norms[0] != 0) & (norms[1] != 0)
    parts = [
        x * torch.where(both, weight / norm, 0.0)
        for x, weight, norm in zip((image, text), weights, norms, strict=True)
    ]
    if config.joint == "average":
        return parts[0] + parts[1]
    joined = torch.cat(parts, dim=1)
    return joined


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


def _one_ahead(read: Callable, items: Iterable) -> Iterator:
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


# ---- finding files -------------------------------------------------------------------------------

_Pair = tuple[str, FeatureFile | None, FeatureFile | None]


def _find(path: Path, config: ClusterConfig, wants_image: bool, wants_text: bool) -> list[_Pair]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        if (path / "img_emb").is_dir() or (path / "text_emb").is_dir():
            return _dump(path, wants_image, wants_text)
        files = sorted(path.glob("*.npy")) or sorted(path.glob("*.parquet"))
    else:
        raise SourceError(f"{path}: is not there")
    if not files:
        raise SourceError(f"{path}: has no img_emb, text_emb, .npy or .parquet files")
    names = _names(files)
    if files[0].suffix == ".parquet":
        return [
            (
                name,
                ParquetColumn(file, config.image_column) if wants_image else None,
                ParquetColumn(file, config.text_column) if wants_text else None,
            )
            for name, file in zip(names, files, strict=True)
        ]
    if wants_text:
        raise SourceError(
            f"{path}: holds one kind of features; {config.joint} needs a directory with img_emb "
            "and text_emb, or Parquet files"
        )
    return [(name, NpyFile(file), None) for name, file in zip(names, files, strict=True)]


def _dump(path: Path, wants_image: bool, wants_text: bool) -> list[_Pair]:
    found: dict[str, dict[str, Path]] = {}
    for kind, wanted in (("img_emb", wants_image), ("text_emb", wants_text)):
        if wanted:
            files = sorted((path / kind).glob(f"{kind}_*.npy"))
            if not files:
                raise SourceError(f"{path / kind}: has no {kind}_*.npy files")
            found[kind] = {file.stem.removeprefix(f"{kind}_"): file for file in files}
    if len(found) == 2:
        for name in found["img_emb"].keys() ^ found["text_emb"].keys():
            has, lacks = sorted(found, key=lambda kind: name not in found[kind])
            raise SourceError(f"{found[has][name]}: there is no {lacks}_{name}.npy beside it")
    names = sorted(next(iter(found.values())), key=lambda name: (len(name), name))

    def file_of(kind: str, name: str) -> NpyFile | None:
        return NpyFile(found[kind][name]) if kind in found else None

    return [(name, file_of("img_emb", name), file_of("text_emb", name)) for name in names]


def _names(files: list[Path]) -> list[str]:
    """The numbers at the ends of the files' names where these tell them apart, else 0000, ..."""
    numbers = [re.search(r"(\d+)$", file.stem) for file in files]
    names = [match.group(1) if match else "" for match in numbers]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{i:04d}" for i in range(len(files))]


def _check_shapes(shards: list[Shard]) -> None:
    for shard in shards:
        if shard.image and shard.text and shard.image.rows != shard.text.rows:
            raise SourceError(
                f"{shard.text.path}: has {shard.text.rows} rows and {shard.image.path} "
                f"{shard.image.rows}"
            )
        for kind in ("image", "text"):
            file, first = getattr(shard, kind), getattr(shards[0], kind)
            if file and file.dim != first.dim:
                raise SourceError(
                    f"{file.path}: has {file.dim} dimensions and {first.path} {first.dim}"
                )
            if file and file.dim == 0:
                raise SourceError(f"{file.path}: has no columns")
