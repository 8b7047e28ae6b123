"""`unicom-ext report`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from unicom_ext.cli.common import program
from unicom_ext.cli.train import run_training
from unicom_ext.train.config import Config
from unicom_ext.utils.settings import ConfigError, read_toml


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(directory: Path) -> None:
    """Show what is in DIRECTORY, the output of `cluster`, of `train`, or of both.

    Of a finished training, report.html is written again.
    """
    try:
        clustered = (directory / "clusters.json").exists()
        if clustered:
            from unicom_ext.cluster import results

            facts = json.loads((directory / "clusters.json").read_text())
            for line in results.summary(facts):
                click.echo(line)
        if not (directory / "metrics.json").exists():
            if clustered:
                return
            raise click.ClickException(
                f"{directory}: has neither metrics.json, as `train` writes it after its first "
                "checkpoint, nor clusters.json of `cluster`"
            )
        metrics = json.loads((directory / "metrics.json").read_text())
        config = Config.from_mapping(read_toml(directory / "config.toml"))
        step, steps = metrics["step"], metrics["steps"]
        unfinished = step < steps and not metrics.get("stopped_early")
    except (ConfigError, OSError, ValueError, KeyError) as error:
        raise click.ClickException(f"{directory}: cannot be read: {error}") from None
    except (TypeError, AttributeError):
        raise click.ClickException(
            f"{directory}: clusters.json or metrics.json is not what `cluster` or `train` writes"
        ) from None
    if unfinished:
        raise click.ClickException(
            f"{directory}: stands at step {step} of {steps}. To go on:\n"
            f"  {program()} train --output {directory} --resume"
        )
    run_training(config, directory, resume=True)
