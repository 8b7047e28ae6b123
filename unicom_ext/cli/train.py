"""`unicom-ext train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from unicom_ext.cli.common import INTERRUPTED, broken, loading, program, ways_on
from unicom_ext.cli.options import given_settings, setting_options
from unicom_ext.train.config import Config
from unicom_ext.utils.settings import ConfigError, read_toml


@click.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default="runs/demo",
    show_default=True, help="Directory for checkpoint, metrics and report.",
)  # fmt: skip
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with settings; the options below override it.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output directory.")
@click.option("--overwrite", is_flag=True, help="Begin anew although there is a checkpoint.")
@setting_options(Config)
def train(
    output: Path, config_file: Path | None, resume: bool, overwrite: bool, **given: Any
) -> None:
    """Train an encoder on characters, test it on unseen ones.

    The pictures are drawn from the fonts inside matplotlib; without options this is the demo. The
    output directory gets config.toml, checkpoints, metrics.json and report.html. Ctrl-C saves
    first; --resume then goes on exactly there. Under torchrun the processes train together, each on
    the GPU of its LOCAL_RANK where there are GPUs, and another number of them can resume.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    try:
        if config_file is None and resume and (output / "config.toml").exists():
            config_file = output / "config.toml"
        settings = read_toml(config_file) if config_file else {}
        settings.update(given_settings(Config, given))
        config = Config.from_mapping(settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None

    run_training(config, output, resume, overwrite)


def run_training(config: Config, output: Path, resume: bool, overwrite: bool = False) -> None:
    """Train, on all processes of torchrun, and print the results; for `report` too."""
    from rich.console import Console

    try:
        with loading():
            from unicom_ext.distributed import launch
            from unicom_ext.distributed.failures import RankFailed
            from unicom_ext.train import report, run
            from unicom_ext.train.interrupt import Interrupted
            from unicom_ext.utils.devices import usable_device
            from unicom_ext.utils.files import CheckpointError
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("unicom_ext"):
            raise click.ClickException(broken(error)) from None
        raise click.ClickException(
            f"{error.name} is not installed; training needs: pip install matplotlib pillow jinja2"
        ) from None
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None

    console = Console()
    try:
        with launch.joined(usable_device(config.device), stops=(Interrupted,)) as group:
            metrics = run.train(
                config, output, resume=resume, overwrite=overwrite, console=console, group=group
            )
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    except CheckpointError as error:
        raise click.ClickException(f"{error}\n({ways_on(resume)})") from None
    except (RankFailed, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    except Interrupted as stop:
        if launch.is_first():
            click.echo(
                f"\nS{str(stop)[1:]}. To go on:\n  {program()} train --output {output} --resume"
            )
        sys.exit(INTERRUPTED)
    if not launch.is_first():
        return
    if metrics["evaluations"]:
        console.print(report.table(metrics))
    console.print(f"Pictures and curves: {output / 'report.html'}", soft_wrap=True)
