"""Labels on disk: one `labels_XXXX.npy` (int32) per shard, written piece by piece; the several
positives of a row, if there are any, are in `positives_XXXX.npy` (int32 [rows, P]).

Written with plain writes, not through memory maps: a full disk is then an error and not the end of
the process, and room for the whole file is taken when it is made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unicom_ext.data.labels import LABELS, POSITIVES
from unicom_ext.data.source import Shard

DTYPE = np.dtype("<i4")
HEADER_BYTES = 128  # what the header of such an array is padded to, whatever its length


class LabelFiles:
    """The files of a directory; columns: of positives, None for labels [rows]."""

    def __init__(self, directory: Path, columns: int | None = None) -> None:
        self.directory, self.columns = directory, columns
        self._prefix = LABELS if columns is None else POSITIVES
        self._row = () if columns is None else (columns,)
        self._row_bytes = DTYPE.itemsize * (columns or 1)

    def path(self, shard: Shard) -> Path:
        return self.directory / f"{self._prefix}{shard.name}.npy"

    def create(self, shards: Sequence[Shard]) -> None:
        """Files of the right size with labels -1; what is there already is replaced."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for shard in shards:
            path = self.path(shard)
            try:
                with open(path, "wb") as file:
                    np.lib.format.write_array_header_1_0(
                        file,
                        {
                            "descr": DTYPE.str,
                            "fortran_order": False,
                            "shape": (shard.rows, *self._row),
                        },
                    )
                    for start in range(0, shard.rows, 1 << 20):
                        count = min(1 << 20, shard.rows - start)
                        file.write(np.full((count, *self._row), -1, DTYPE).tobytes())
            except OSError as error:
                raise _named(error, path) from None

    def exist(self, shards: Sequence[Shard]) -> bool:
        return all(
            self.path(s).is_file()
            and self.path(s).stat().st_size == HEADER_BYTES + s.rows * self._row_bytes
            for s in shards
        )

    def write(self, shard: Shard, start: int, labels: np.ndarray) -> None:
        path = self.path(shard)
        try:
            with open(path, "r+b") as file:
                file.seek(HEADER_BYTES + start * self._row_bytes)
                file.write(labels.astype(DTYPE).tobytes())
        except OSError as error:
            raise _named(error, path) from None

    def read(self, shard: Shard, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = shard.rows if stop is None else stop
        offset = HEADER_BYTES + start * self._row_bytes
        count = (stop - start) * (self.columns or 1)
        values = np.fromfile(self.path(shard), DTYPE, count, offset=offset)
        return values.reshape(-1, *self._row)

    def sync(self, shards: Sequence[Shard]) -> None:
        """Bring everything written to the disk."""
        for shard in shards:
            path = self.path(shard)
            try:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise _named(error, path) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{path} cannot be written: {error.strerror}")
