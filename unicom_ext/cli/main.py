"""The command line: `unicom-ext`, or `python -m unicom_ext.cli`.

Everything heavy is imported inside the commands, so that --help is quick and `doctor` still works
where the rest does not.
"""

from __future__ import annotations

import click

from unicom_ext.cli.bench import bench
from unicom_ext.cli.checkpoint import checkpoint
from unicom_ext.cli.cluster import cluster
from unicom_ext.cli.doctor import doctor
from unicom_ext.cli.evaluate import evaluate
from unicom_ext.cli.export import export
from unicom_ext.cli.extract import extract
from unicom_ext.cli.imports import import_
from unicom_ext.cli.pipeline import pipeline
from unicom_ext.cli.probe import probe
from unicom_ext.cli.report import report
from unicom_ext.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Partial margin softmax for PyTorch: train embeddings on very many classes."""


for command in (
    train, pipeline, report, extract, cluster, evaluate, probe, export, import_, checkpoint, bench,
    doctor,
):  # fmt: skip
    main.add_command(command)
