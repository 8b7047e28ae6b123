"""`unicom-ext checkpoint show`, `merge` and `split`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, and turn them into one file and back."""


def _checkpoint_command(name: str, *arguments: Any) -> None:
    from unicom_ext import checkpoint as room

    try:
        getattr(room, name)(*arguments)
    except (room.CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from None


@checkpoint.command()
@click.argument("directory", type=click.Path(path_type=Path))
def show(directory: Path) -> None:
    """Print the plain values and the tensors of a checkpoint."""
    _checkpoint_command("show", directory)


@checkpoint.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def merge(directory: Path, file: Path) -> None:
    """Write a checkpoint as one FILE, a dict of tensors for torch.load."""
    _checkpoint_command("merge", directory, file)


@checkpoint.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def split(file: Path, directory: Path) -> None:
    """Write a merged FILE as a checkpoint again, for any number of ranks."""
    _checkpoint_command("split", file, directory)
