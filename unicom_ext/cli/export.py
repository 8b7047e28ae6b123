"""`unicom-ext export`."""

from __future__ import annotations

from pathlib import Path

import click

from unicom_ext.cli.common import broken


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory to be made.",
)  # fmt: skip
def export(run: Path, output: Path) -> None:
    """Write the encoder of RUN as files that need nothing of this package.

    RUN is the output of `train` or of `pipeline`, or a checkpoint. Written are a program of
    torch.export, one of ONNX where that is installed, the tensors, how pictures are prepared, and a
    model card.
    """
    try:
        from unicom_ext.pipeline.run import final_run
        from unicom_ext.train.export import export as write
        from unicom_ext.utils.files import CheckpointError
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    try:
        exported = write(final_run(run) or run, output)
    except (CheckpointError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for name, difference in exported.differences.items():
        click.echo(f"{name}: outputs differ by {difference:.1e} of the largest value")
    for name, why in exported.left_out.items():
        click.echo(f"No {name}: {why}" if name.endswith(".onnx") else f"{name}: {why}")
    click.echo(f"Written: {output}")
