"""`unicom-ext extract`."""

from __future__ import annotations

from pathlib import Path

import click

from unicom_ext.cli.common import program


@click.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory for img_emb/, text_emb/, true_labels.npy, images.npy and a list of these.",
)  # fmt: skip
@click.option(
    "--part", type=click.Choice(["all", "train", "test"]), default="all", show_default=True,
    help="All characters, or one part of the split that `train` makes by default.",
)  # fmt: skip
@click.option(
    "--image-features", type=click.Choice(["raw pixels", "HOG"]), default="HOG",
    show_default=True, help="Principal components of these.",
)  # fmt: skip
@click.option("--dim", type=click.IntRange(2, 512), default=128, show_default=True)
@click.option(
    "--kept-words", type=click.FloatRange(0, 1), default=0.8, show_default=True,
    help="Share of the words of its character's name that an image's text has.",
)  # fmt: skip
def extract(output: Path, part: str, image_features: str, dim: int, kept_words: float) -> None:
    """Write image and text features of the bundled characters, for `cluster`."""
    try:
        from unicom_ext.data import dump, glyphs

        data = glyphs.load()
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    if part != "all":
        data = glyphs.split(data)[part == "test"]
    try:
        dump.write_dump(output, data, images=image_features, dim=dim, kept_words=kept_words)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        f"Features of {len(data):,} images of {data.num_classes:,} characters in {output}. Next:\n"
        f"  {program()} cluster {output} --joint concat --clusters {data.num_classes} "
        f"--output {output / 'clusters'}"
    )
