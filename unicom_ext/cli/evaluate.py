"""`unicom-ext evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unicom_ext.cli.common import broken
from unicom_ext.cli.options import whole_numbers
from unicom_ext.data import JOINTS
from unicom_ext.utils.settings import ConfigError

if TYPE_CHECKING:
    from unicom_ext.retrieval import Result


@click.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--labels", type=click.Path(path_type=Path), required=True,
    help=".npy file of integers, one for each row, or a directory of labels_*.npy. Rows with a "
    "negative label take no part.",
)  # fmt: skip
@click.option(
    "--gallery", type=click.Path(path_type=Path),
    help="Feature files to search in; without it each row is searched among the others.",
)  # fmt: skip
@click.option("--gallery-labels", type=click.Path(path_type=Path), help="Labels of the gallery.")
@click.option("--dims", metavar="LIST", help="Leading dimensions to evaluate at.  [default: all]")
@click.option(
    "--recall-at", "ks", metavar="LIST", default="1,5,10", show_default=True,
    help="K of Recall@K.",
)  # fmt: skip
@click.option(
    "--joint", type=click.Choice(JOINTS), default="image", show_default=True,
    help="The features: of the image, of the text, or of both.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for the figures."
)
def evaluate(
    features: Path,
    labels: Path,
    gallery: Path | None,
    gallery_labels: Path | None,
    dims: str | None,
    ks: str,
    joint: str,
    output: Path | None,
) -> None:
    """Recall@K and mAP@R of the feature files FEATURES by exact cosine search.

    FEATURES is what `cluster` takes; all of it is read into memory.
    """
    try:
        wanted_dims = None if dims is None else whole_numbers("dims", dims)
        wanted_ks = whole_numbers("recall-at", ks)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        from unicom_ext.retrieval.files import evaluate_files
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    try:
        results = evaluate_files(
            features, labels, gallery, gallery_labels, joint=joint, dims=wanted_dims, ks=wanted_ks
        )
        if output is not None:
            output.write_text(json.dumps([result._asdict() for result in results], indent=1))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for line in _retrieval_table(results):
        click.echo(line)


def _retrieval_table(results: list[Result]) -> Iterator[str]:
    columns = ["dimensions", *(f"Recall@{k}" for k in results[0].recall), "mAP@R"]
    yield "  ".join(columns)
    for result in results:
        figures = [f"{x:.4f}" for x in (*result.recall.values(), result.map_at_r)]
        cells = zip([str(result.dim), *figures], columns, strict=True)
        yield "  ".join(cell.rjust(len(column)) for cell, column in cells)
    counts = f"{results[0].num_queries:,} queries"
    if results[0].num_excluded:
        counts += f"; {results[0].num_excluded:,} without another item of their label left out"
    yield counts
