"""`unicom-ext probe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unicom_ext.cli.common import broken, loading
from unicom_ext.cli.figures import check_output, counts_of, feature_options, report, table
from unicom_ext.cli.options import counts
from unicom_ext.utils.settings import ConfigError

if TYPE_CHECKING:
    from unicom_ext.retrieval.files import ProbeResult


@click.command()
@click.argument("train", type=click.Path(path_type=Path))
@click.argument("test", type=click.Path(path_type=Path))
@click.option(
    "--labels", type=click.Path(path_type=Path), required=True,
    help="Of TRAIN: .npy file of integers, one for each row, or a directory of labels_*.npy. "
    "Rows with a negative label are left out.",
)  # fmt: skip
@click.option(
    "--test-labels", type=click.Path(path_type=Path), required=True, help="Of TEST, likewise."
)
@click.option("--dims", metavar="LIST", help="Leading dimensions to probe at.  [default: all]")
@click.option(
    "--k", "ks", metavar="LIST", default="1,20", show_default=True, help="Neighbours that vote."
)
@click.option(
    "--temperature", type=float, default=0.07, show_default=True,
    help="A neighbour votes with weight exp(cosine / temperature).",
)  # fmt: skip
@click.option(
    "--seed", type=int, default=0, show_default=True,
    help="Of the rows of TRAIN that are held out to choose the L2 penalty of the linear probe.",
)  # fmt: skip
@feature_options
def probe(
    train: Path,
    test: Path,
    labels: Path,
    test_labels: Path,
    dims: str | None,
    ks: str,
    temperature: float,
    seed: int,
    joint: str,
    image_column: str,
    text_column: str,
    output: Path | None,
) -> None:
    """Accuracy on the feature files TEST of a k-NN classifier and a linear probe from TRAIN.

    Both are what `cluster` takes; all of them is read into memory.
    """
    try:
        wanted_dims, wanted_ks = counts_of("dims", dims), counts("k", ks)
        check_output(output, "probe", {"dim", "knn"})
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        with loading():
            from unicom_ext.retrieval.files import probe_files
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    report(
        lambda: probe_files(
            train, labels, test, test_labels,
            dims=wanted_dims, k=wanted_ks, temperature=temperature, seed=seed,
            joint=joint, image_column=image_column, text_column=text_column,
        ),
        _show,
        output,
    )  # fmt: skip


def _show(results: list[ProbeResult]) -> None:
    first = results[0]
    rows = [
        [str(r.dim), *(f"{x:.4f}" for x in (*r.knn.values(), r.linear)), f"{r.l2:g}"]
        for r in results
    ]
    table(["dimensions", *(f"{k}-NN" for k in first.knn), "linear", "L2 penalty"], rows)
    click.echo(f"{first.num_test:,} rows, by {first.num_train:,}")
