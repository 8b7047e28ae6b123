"""`unicom-ext extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unicom_ext.cli.common import broken, loading, program
from unicom_ext.cli.options import given_settings, setting_options
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.utils.settings import ConfigError, read_toml


@click.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory for img_emb/, text_emb/, metadata/, true_labels.npy and images.npy.",
)  # fmt: skip
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with settings; the options below override it.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace features of other settings or images.")
@setting_options(ExtractConfig)
def extract(output: Path, config_file: Path | None, overwrite: bool, **given: Any) -> None:
    """Write features of images and captions, for `cluster` and `evaluate`.

    The images are the bundled characters, or those of --data: a folder, a table or tar shards. Kill
    it and call it again: it goes on. Under torchrun the processes share the work, each on the GPU
    of its LOCAL_RANK where there are GPUs.
    """
    try:
        settings = read_toml(config_file) if config_file else {}
        settings.update(given_settings(ExtractConfig, given))
        config = ExtractConfig.from_mapping(settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        with loading():
            from unicom_ext.data.images.opening import open_part
            from unicom_ext.distributed import launch
            from unicom_ext.distributed.failures import RankFailed
            from unicom_ext.encoders import extract as extraction
            from unicom_ext.utils.devices import usable_device
            from unicom_ext.utils.files import CheckpointError
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    try:
        with launch.joined(usable_device(config.device), timeout=launch.LONG) as group:
            images = open_part(config, config.seed, config.part)
            facts = extraction.extract(config, images, output, overwrite=overwrite, group=group)
    except (ValueError, OSError, ModuleNotFoundError, CheckpointError, RankFailed) as error:
        raise click.ClickException(str(error)) from None
    if not launch.is_first():
        return
    data = facts["data"]
    click.echo(
        f"Features of {data['images']:,} images"
        + (f" of {data['classes']:,} classes" if data["classes"] else "")
        + f" in {output}."
    )
    if facts["unreadable"]:
        click.echo(
            f"{facts['unreadable']:,} could not be read: their rows are zero, and metadata/ says "
            "why."
        )
    joint = "concat" if facts["text_dim"] else "image"
    clusters = data["classes"] or max(data["images"] // 20, 2)
    click.echo(
        f"Next:\n  {program()} cluster {output} --joint {joint} --clusters {clusters} "
        f"--output {output / 'clusters'}"
    )
