"""`unicom-ext evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unicom_ext.cli.common import broken, loading
from unicom_ext.cli.figures import check_output, counts_of, feature_options, report, table
from unicom_ext.cli.options import counts
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
@click.option(
    "--gallery-labels", type=click.Path(path_type=Path),
    help="Labels of the gallery; [n, P] where a row has several.",
)  # fmt: skip
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
    "--codes", type=click.Choice(["int8", "binary"]),
    help="Compare what an index would store of each row.  [default: the rows]",
)  # fmt: skip
@click.option(
    "--index", default="exact", show_default=True,
    help="'exact', or 'faiss:' and what faiss.index_factory takes, such as faiss:HNSW32.",
)  # fmt: skip
@click.option(
    "--bootstrap", type=int, default=0, metavar="N",
    help="Resamples, such as 1000, for 95 % intervals of all figures.  [default: none]",
)  # fmt: skip
@click.option(
    "--bootstrap-over", type=click.Choice(["classes", "queries"]), default="classes",
    show_default=True, help="What is drawn again: classes with all their queries, or queries.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the resamples.")
@feature_options
def evaluate(
    features: Path,
    labels: Path,
    gallery: Path | None,
    gallery_labels: Path | None,
    groups: Path | None,
    gallery_groups: Path | None,
    dims: str | None,
    ks: str,
    codes: str | None,
    index: str,
    bootstrap: int,
    bootstrap_over: str,
    seed: int,
    joint: str,
    image_column: str,
    text_column: str,
    output: Path | None,
) -> None:
    """Recall@K, mAP@R, R-precision and mAP@K of the feature files FEATURES by cosine search.

    FEATURES is what `cluster` takes; a block of it at a time is in memory.
    """
    try:
        options = {
            "dims": counts_of("dims", dims), "ks": counts("recall-at", ks), "codes": codes,
            "index": index, "bootstrap": bootstrap, "bootstrap_over": bootstrap_over, "seed": seed,
        }  # fmt: skip
        check_output(output, "evaluate", {"dim", "recall"})
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        with loading():
            from unicom_ext.retrieval.files import evaluate_files
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    report(
        lambda: evaluate_files(
            features, labels, gallery, gallery_labels,
            groups=groups, gallery_groups=gallery_groups, options=options,
            joint=joint, image_column=image_column, text_column=text_column,
        ),
        _show,
        output,
    )  # fmt: skip


def _show(results: list[Result]) -> None:
    names = list(results[0].figures)
    table(["dimensions", *names], [row for result in results for row in _rows(result, names)])
    click.echo("; ".join(_notes(results[0])))


def _rows(result: Result, names: list[str]) -> Iterator[list[str]]:
    """The figures, and beneath them their intervals."""
    yield [str(result.dim), *(f"{result.figures[name]:.4f}" for name in names)]
    if result.intervals is not None:
        for end, title in enumerate(("2.5 %", "97.5 %")):
            yield [title, *(f"{result.intervals[name][end]:.4f}" for name in names)]


def _notes(result: Result) -> Iterator[str]:
    yield f"{result.num_queries:,} queries"
    if result.num_excluded:
        yield f"{result.num_excluded:,} without another item of their label left out"
    if result.num_unlabelled:
        yield f"{result.num_unlabelled:,} without a label left out"
    if result.num_distractors:
        yield f"{result.num_distractors:,} in the gallery without a label, always wrong"
    if result.codes is not None:
        yield f"by {result.codes} codes"
    if result.index_recall is not None:
        yield f"{result.search} finds {result.index_recall:.4f} of the {max(result.recall)} nearest"
