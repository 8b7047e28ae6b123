"""`unicom-ext checkpoint show`, `merge`, `split`, and what goes to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, turn them into one file and back, and into those of others."""


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


@checkpoint.command("to-partial-fc")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--ranks", type=int, required=True, help="How many files to write.")
@click.option("--without-optimizer", is_flag=True, help="Leave out the optimizer's state.")
def to_partial_fc(directory: Path, output: Path, ranks: int, without_optimizer: bool) -> None:
    """Write checkpoint_gpu_0.pt and so on to OUTPUT, for InsightFace's trainer."""
    from unicom_ext import interchange

    try:
        missing = interchange.to_partial_fc(
            directory, output, ranks=ranks, optimizer=not without_optimizer
        )
    except (interchange.CheckpointError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if missing:
        click.echo(f"Note: without {', '.join(missing)}, which the trainer reads when it goes on.")
    click.echo(f"Written: {ranks} files in {output}")


@checkpoint.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def prototypes(directory: Path, file: Path) -> None:
    """Write the prototypes to FILE, a .npy or a .safetensors."""
    from unicom_ext import interchange

    try:
        shape, dtype = interchange.save_prototypes(directory, file)
    except (interchange.CheckpointError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Written: {file}, {str(dtype).removeprefix('torch.')} {list(shape)}")
