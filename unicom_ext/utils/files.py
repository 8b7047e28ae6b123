"""Files that a kill at any moment cannot spoil."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or does not fit."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then rename it to `path`.

    A reader finds the old file or the new one, whole, whenever this is interrupted.
    """
    path = Path(path)
    # Always the same name: what a killed writer left behind is overwritten by the next one.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring a rename to the disk: it is there only when the directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
