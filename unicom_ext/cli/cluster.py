"""`unicom-ext cluster`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from unicom_ext.cli.common import INTERRUPTED, broken, loading, ways_on
from unicom_ext.cli.options import given_settings, setting_options
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.utils.settings import ConfigError


@click.command()
@click.argument("input", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory for labels_XXXX.npy, centroids.npy, clusters.json and pictures.",
)  # fmt: skip
@click.option(
    "--true-labels", type=click.Path(path_type=Path),
    help=".npy file of integers, one for each row: NMI, purity and conflict are reported.",
)  # fmt: skip
@click.option(
    "--images", type=click.Path(path_type=Path),
    help=".npy file uint8 [rows, h, w(, 3)]: members of some clusters are shown.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on after the last pass that was finished.")
@click.option("--overwrite", is_flag=True, help="Begin anew although there is something.")
@setting_options(ClusterConfig)
def cluster(
    input: Path,
    output: Path,
    true_labels: Path | None,
    images: Path | None,
    resume: bool,
    overwrite: bool,
    **given: Any,
) -> None:
    """Cluster the feature files INPUT into pseudo-classes.

    INPUT is a .npy file, a directory of them, a directory with img_emb/ and text_emb/ as public
    dumps of CLIP embeddings have them, or Parquet files. Rows stream from disk. It can be killed
    at any time; --resume goes on after the last whole pass. Under torchrun each process reads its
    part of the rows, and has the GPU of its LOCAL_RANK where it works on one.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    try:
        config = ClusterConfig.from_mapping(given_settings(ClusterConfig, given))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        with loading():
            from unicom_ext.cluster import driver, engines, results
            from unicom_ext.distributed import launch
            from unicom_ext.distributed.failures import RankFailed
    except (ImportError, OSError) as error:
        raise click.ClickException(broken(error)) from None
    from unicom_ext.utils.files import CheckpointError

    try:
        with launch.joined(engines.usable_device(config)):
            result = driver.cluster(
                config, input, output, true_labels=true_labels, images=images, resume=resume,
                overwrite=overwrite,
            )  # fmt: skip
    except CheckpointError as error:
        raise click.ClickException(f"{error}\n({ways_on(resume)})") from None
    except (ConfigError, RankFailed, OSError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("\nStopped. To go on, give the same command with --resume.")
        sys.exit(INTERRUPTED)
    if launch.is_first():
        for line in results.summary(result):
            click.echo(line)
        click.echo(f"Written: {output}")
