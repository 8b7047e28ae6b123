"""`unicom-ext pipeline`."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

import click

from unicom_ext.cli.common import INTERRUPTED, broken, loading, program
from unicom_ext.pipeline.config import PipelineConfig
from unicom_ext.utils.settings import ConfigError


@click.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default="runs/pipeline",
    show_default=True, help="Directory for what the steps write.",
)  # fmt: skip
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with a table for each step.  [default: pipeline.toml in the output directory, "
    "else the bundled characters]",
)  # fmt: skip
@click.option("--until", metavar="STEP", help="The last step to do.")
@click.option("--from", "begin_at", metavar="STEP", help="Do this and later steps anew.")
def pipeline(
    output: Path, config_file: Path | None, until: str | None, begin_at: str | None
) -> None:
    """Features, clusters, training, fine-tuning, evaluation, report.

    The steps are extract, cluster, train, finetune, evaluate and report. Each writes what the
    command of its name writes, to a directory of its own. Kill it and call it again: it goes on.
    What is whole is left as it is, and a changed setting makes its step and later ones anew. Under
    torchrun the processes share the work, each on the GPU of its LOCAL_RANK where there are GPUs.
    """
    try:
        config = PipelineConfig.read(_config_file(output, config_file))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        with loading():
            from rich.console import Console

            from unicom_ext.distributed import launch
            from unicom_ext.distributed.failures import RankFailed
            from unicom_ext.pipeline import run, steps, table
            from unicom_ext.train.interrupt import Interrupted
            from unicom_ext.utils.devices import usable_device
            from unicom_ext.utils.files import CheckpointError
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("unicom_ext"):
            raise click.ClickException(broken(error)) from None
        raise click.ClickException(
            f"{error.name} is not installed; a pipeline needs: pip install matplotlib pillow jinja2"
        ) from None
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    console = Console()
    device = usable_device("cpu" if config.devices == {"cpu"} else "auto")
    try:
        with launch.joined(device, stops=(Interrupted,), timeout=launch.LONG):
            figures = run.run(config, output, until=until, begin_at=begin_at, console=console)
    except CheckpointError as error:
        raise click.ClickException(f"{error}\n(--from STEP does that step anew)") from None
    except (ValueError, OSError, ModuleNotFoundError, RankFailed) as error:
        raise click.ClickException(str(error)) from None
    except (Interrupted, KeyboardInterrupt):
        if launch.is_first():
            click.echo(f"\nStopped. To go on:\n  {program()} pipeline --output {output}")
        sys.exit(INTERRUPTED)
    if not launch.is_first():
        return
    if figures is not None:
        console.print(table.table(figures))
    if until is None and (output / steps.REPORT).exists():
        console.print(f"Pictures and curves: {output / steps.REPORT}", soft_wrap=True)


def _config_file(output: Path, given: Path | None) -> Path:
    there = output / "pipeline.toml"
    if given is not None or there.exists():
        return given or there
    return Path(str(importlib.resources.files("unicom_ext.pipeline") / "glyphs.toml"))
