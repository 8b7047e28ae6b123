"""What the commands that measure features share: which features, and where figures go."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from unicom_ext.cli.options import Command, counts
from unicom_ext.data import JOINTS
from unicom_ext.utils.settings import ConfigError


def feature_options(command: Command) -> Command:
    """Which features of the files, and a JSON file for the figures."""
    for option in (
        click.option(
            "--output", type=click.Path(dir_okay=False, path_type=Path),
            help="JSON file for the figures.",
        ),
        click.option(
            "--text-column", default="text_embedding", show_default=True,
            help="Column in Parquet files.",
        ),
        click.option(
            "--image-column", default="image_embedding", show_default=True,
            help="Column in Parquet files.",
        ),
        click.option(
            "--joint", type=click.Choice(JOINTS), default="image", show_default=True,
            help="The features: of the image, of the text, or of both.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def counts_of(name: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of an option, None where it is not given."""
    return None if text is None else counts(name, text)


def check_output(output: Path | None, command: str, keys: set[str]) -> None:
    """ConfigError unless figures can go there; what is there must be figures with these keys."""
    if output is None:
        return
    if output.suffix.lower() in (".npy", ".parquet"):
        raise ConfigError(
            f"output: {output}: must be named as a JSON file is, such as figures.json"
        )
    if output.exists() and not _holds_figures(output, keys):
        raise ConfigError(
            f"output: {output}: is there already, and holds no figures of `{command}`"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"output: {output.parent}: there is no such directory")


def _holds_figures(path: Path, keys: set[str]) -> bool:
    try:
        figures = json.loads(path.read_text())
        return all(keys <= result.keys() for result in figures)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def report(
    measure: Callable[[], list[Any]], show: Callable[[list[Any]], None], output: Path | None
) -> None:
    """Measures, writes and shows; then warnings go to stderr. Errors end the command."""
    try:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always", UserWarning)
            results = measure()
        if output is not None:
            output.write_text(json.dumps([result._asdict() for result in results], indent=1))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    show(results)
    for warning in noticed:
        click.echo(f"Warning: {warning.message}", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells under their columns, to the right."""
    click.echo("  ".join(columns))
    for row in rows:
        cells = zip(row, columns, strict=True)
        click.echo("  ".join(cell.rjust(len(column)) for cell, column in cells))
