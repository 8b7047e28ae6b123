"""`unicom-ext evaluate`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unicom_ext.cli.common import broken
from unicom_ext.cli.options import counts
from unicom_ext.data import JOINTS
from unicom_ext.utils.settings import ConfigError

if TYPE_CHECKING:
    from unicom_ext.retrieval import Result


@click.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--labels", type=click.Path(path_type=Path), required=True,
    help=".npy file of integers, one for each row, or a directory of labels_*.npy. A negative "
    "label is none: the row is no query, and in the gallery it is wrong for every query.",
)  # fmt: skip
@click.option(
    "--gallery", type=click.Path(path_type=Path),
    help="Feature files to search in; without it each row is searched among the others.",
)  # fmt: skip
@click.option("--gallery-labels", type=click.Path(path_type=Path), help="Labels of the gallery.")
@click.option(
    "--groups", type=click.Path(path_type=Path),
    help="Integers as for --labels, such as cameras: what is in a row's own group counts neither "
    "as right nor as wrong. A negative group is none.",
)  # fmt: skip
@click.option("--gallery-groups", type=click.Path(path_type=Path), help="Groups of the gallery.")
@click.option("--dims", metavar="LIST", help="Leading dimensions to evaluate at.  [default: all]")
@click.option(
    "--recall-at", "ks", metavar="LIST", default="1,5,10", show_default=True,
    help="K of Recall@K and mAP@K.",
)  # fmt: skip
@click.option(
    "--joint", type=click.Choice(JOINTS), default="image", show_default=True,
    help="The features: of the image, of the text, or of both.",
)  # fmt: skip
@click.option(
    "--image-column", default="image_embedding", show_default=True, help="Column in Parquet files."
)
@click.option(
    "--text-column", default="text_embedding", show_default=True, help="Column in Parquet files."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for the figures."
)
def evaluate(
    features: Path,
    labels: Path,
    gallery: Path | None,
    gallery_labels: Path | None,
    groups: Path | None,
    gallery_groups: Path | None,
    dims: str | None,
    ks: str,
    joint: str,
    image_column: str,
    text_column: str,
    output: Path | None,
) -> None:
    """Recall@K, mAP@R, R-precision and mAP@K of the feature files FEATURES by exact cosine search.

    FEATURES is what `cluster` takes; all of it is read into memory.
    """
    try:
        wanted_dims = None if dims is None else counts("dims", dims)
        wanted_ks = counts("recall-at", ks)
        if output is not None and output.suffix.lower() in (".npy", ".parquet"):
            raise ConfigError(
                f"output: {output}: must be named as a JSON file is, such as figures.json"
            )
        if output is not None and output.exists() and not _holds_figures(output):
            raise ConfigError(
                f"output: {output}: is there already, and holds no figures of `evaluate`"
            )
        if output is not None and not output.parent.is_dir():
            raise ConfigError(f"output: {output.parent}: there is no such directory")
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        from unicom_ext.retrieval.files import evaluate_files
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    try:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always", UserWarning)
            results = evaluate_files(
                features, labels, gallery, gallery_labels,
                groups=groups, gallery_groups=gallery_groups,
                joint=joint, image_column=image_column, text_column=text_column,
                dims=wanted_dims, ks=wanted_ks,
            )  # fmt: skip
        if output is not None:
            output.write_text(json.dumps([result._asdict() for result in results], indent=1))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for line in _retrieval_table(results):
        click.echo(line)
    for warning in noticed:
        click.echo(f"Warning: {warning.message}", err=True)


def _holds_figures(path: Path) -> bool:
    try:
        figures = json.loads(path.read_text())
        return all({"dim", "recall"} <= result.keys() for result in figures)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _retrieval_table(results: list[Result]) -> Iterator[str]:
    first = results[0]
    columns = ["dimensions", *(f"Recall@{k}" for k in first.recall), "mAP@R", "R-precision"]
    columns += [f"mAP@{k}" for k in first.map_at_k]
    yield "  ".join(columns)
    for result in results:
        figures = [*result.recall.values(), result.map_at_r, result.r_precision]
        figures += result.map_at_k.values()
        cells = zip([str(result.dim), *(f"{x:.4f}" for x in figures)], columns, strict=True)
        yield "  ".join(cell.rjust(len(column)) for cell, column in cells)
    counts = f"{first.num_queries:,} queries"
    if first.num_excluded:
        counts += f"; {first.num_excluded:,} without another item of their label left out"
    if first.num_unlabelled:
        counts += f"; {first.num_unlabelled:,} without a label left out"
    if first.num_distractors:
        counts += f"; {first.num_distractors:,} in the gallery without a label, always wrong"
    yield counts
