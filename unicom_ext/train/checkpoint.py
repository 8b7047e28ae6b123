"""Checkpoints that a kill at any moment cannot spoil."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = "unicom_ext training checkpoint"
VERSION = 1  # raise it when the content changes


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not readable, or of another run."""


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state` (tensors and plain Python values).

    A reader finds the old checkpoint or the new one, whole, whenever this is interrupted.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: str | os.PathLike) -> dict[str, Any]:
    """What `save` was given. Raises CheckpointError with the reason if that is not possible."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts raise
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: is not a {FORMAT}")
    version = content.pop("version")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: has version {version} of the format, this program reads version {VERSION}"
        )
    return content


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then rename it to `path`."""
    path = Path(path)
    # Always the same name: what a killed writer left behind is overwritten by the next one.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself is on the disk only when the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
