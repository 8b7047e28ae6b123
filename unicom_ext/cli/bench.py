"""`unicom-ext bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the loss against PartialFC v2; --help lists options.

    `bench parts` times the parts of a step alone, `bench sweep` steps of many sizes.
    """
    name, options = "head_step", list(arguments)
    if options and options[0] in ("parts", "sweep"):
        name = options.pop(0)
    script = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    if not script.is_file():
        raise click.ClickException(
            f"{script} is not there: the benchmarks are not part of the installed package. Clone "
            "the source repository, install from it with `pip install --no-build-isolation -e .`, "
            "and run this again."
        )
    sys.exit(subprocess.call([sys.executable, str(script), *options]))
