"""`unicom-ext import`."""

from __future__ import annotations

from pathlib import Path

import click

from unicom_ext.cli.common import broken


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to be made."
)
@click.option("--num-classes", type=int, help="Refuse files of another number of classes.")
@click.option(
    "--num-centers", type=int, default=1, show_default=True,
    help="Of each class, in a SubCenterArcFaceLoss.",
)  # fmt: skip
def import_(
    files: tuple[Path, ...], output: Path, num_classes: int | None, num_centers: int
) -> None:
    """Make a checkpoint of FILES of another trainer.

    FILES are InsightFace's checkpoint_gpu_*.pt of all ranks; or its older softmax_fc_gpu_*.pt or
    rank_*_softmax_weight*.pt, or the state dict of a loss of pytorch-metric-learning, each with a
    file of the encoder's weights or without; or these weights alone. Prototypes, the optimizer's
    state and progress are carried; unicom_ext.checkpoint.load reads them at any number of ranks.
    """
    try:
        from unicom_ext import interchange
        from unicom_ext.utils.files import CheckpointError
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    try:
        if output.exists():
            raise CheckpointError(f"{output}: is there already")
        found = interchange.read(files, num_classes=num_classes, num_centers=num_centers)
        for name, value in found.description.items():
            click.echo(f"{name:<12}{value}")
        for note in found.notes:
            click.echo(f"Note: {note}.")
        found.write(output)
    except (CheckpointError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Written: {output}")
