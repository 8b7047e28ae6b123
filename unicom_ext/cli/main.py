"""The command line: `unicom-ext`, or `python -m unicom_ext.cli`.

Everything heavy is imported inside the commands, so that --help is quick and `doctor` still works
where the rest does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unicom_ext.cluster.config import JOINTS, ClusterConfig
from unicom_ext.train.config import Config
from unicom_ext.utils.settings import ConfigError, Settings, parse_list, read_toml, setting_types

if TYPE_CHECKING:
    from unicom_ext.retrieval import Result

INTERRUPTED = 130  # the exit status of a program that SIGINT ended


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Partial margin softmax for PyTorch: train embeddings on very many classes."""


# ---- train ---------------------------------------------------------------------------------------


def _setting_options(settings: type[Settings]) -> Callable[[Callable], Callable]:
    """One option for each setting, None where it is not given."""

    def decorate(command: Callable) -> Callable:
        types = setting_types(settings)
        for setting in reversed(dataclasses.fields(settings)):
            wanted, default = types[setting.name], setting.default
            is_list = isinstance(default, tuple)
            shown = ",".join(map(str, default)) if is_list else default
            choices = setting.metadata.get("choices")
            command = click.option(
                f"--{setting.name.replace('_', '-')}",
                type=str if is_list else wanted,
                metavar="LIST" if is_list else choices and f"[{'|'.join(choices)}]",
                help=f"{setting.metadata['help']}  [default: {shown}]",
            )(command)
        return command

    return decorate


@main.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default="runs/demo",
    show_default=True, help="Directory for checkpoint, metrics and report.",
)  # fmt: skip
@click.option(
    "--config", "config_file", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with settings; the options below override it.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output directory.")
@click.option("--overwrite", is_flag=True, help="Begin anew although there is a checkpoint.")
@_setting_options(Config)
def train(
    output: Path, config_file: Path | None, resume: bool, overwrite: bool, **given: Any
) -> None:
    """Train an encoder on characters, test it on unseen ones.

    The pictures are drawn from the fonts inside matplotlib; without options this is the demo. The
    output directory gets config.toml, checkpoints, metrics.json and report.html. Ctrl-C saves
    first; --resume then goes on exactly there. Under torchrun the processes train together, and
    another number of them can resume.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    try:
        if config_file is None and resume and (output / "config.toml").exists():
            config_file = output / "config.toml"
        settings = read_toml(config_file) if config_file else {}
        settings.update(_given_settings(Config, given))
        config = Config.from_mapping(settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None

    _train(config, output, resume, overwrite)


def _train(config: Config, output: Path, resume: bool, overwrite: bool = False) -> None:
    _spin_briefly()
    from rich.console import Console

    try:
        from unicom_ext.distributed import launch
        from unicom_ext.train import report
        from unicom_ext.train import run as driver
        from unicom_ext.utils.files import CheckpointError
    except ModuleNotFoundError as error:
        if error.name.startswith("unicom_ext"):
            raise click.ClickException(_broken(error)) from None
        raise click.ClickException(
            f"{error.name} is not installed; training needs: pip install matplotlib pillow jinja2"
        ) from None
    except (ImportError, OSError) as error:
        raise click.ClickException(_broken(error)) from None

    console = Console()
    try:
        with launch.joined() as group:
            metrics = driver.train(
                config, output, resume=resume, overwrite=overwrite, console=console, group=group
            )
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    except CheckpointError as error:
        raise click.ClickException(f"{error}\n({_ways_on(resume)})") from None
    except launch.RankFailed as error:
        raise click.ClickException(str(error)) from None
    except driver.Interrupted as stop:
        if launch.is_first():
            click.echo(
                f"\nS{str(stop)[1:]}. To go on:\n  {_program()} train --output {output} --resume"
            )
        sys.exit(INTERRUPTED)
    if not launch.is_first():
        return
    console.print(report.table(metrics))
    console.print(f"Pictures and curves: {output / 'report.html'}", soft_wrap=True)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(directory: Path) -> None:
    """Show what is in DIRECTORY, the output of `train` or `cluster`.

    Of a finished training, report.html is written again.
    """
    try:
        if (directory / "clusters.json").exists():
            from unicom_ext.cluster import results

            facts = json.loads((directory / "clusters.json").read_text())
            for line in results.summary(facts):
                click.echo(line)
            return
        if not (directory / "metrics.json").exists():
            raise click.ClickException(
                f"{directory}: has neither metrics.json, as `train` writes it after its first "
                "checkpoint, nor clusters.json of `cluster`"
            )
        metrics = json.loads((directory / "metrics.json").read_text())
        config = Config.from_mapping(read_toml(directory / "config.toml"))
        step, steps = metrics["step"], metrics["steps"]
    except (ConfigError, OSError, ValueError, KeyError) as error:
        raise click.ClickException(f"{directory}: cannot be read: {error}") from None
    if step < steps:
        raise click.ClickException(
            f"{directory}: stands at step {step} of {steps}. To go on:\n"
            f"  {_program()} train --output {directory} --resume"
        )
    _train(config, directory, resume=True)


def _ways_on(resume: bool) -> str:
    return ("" if resume else "--resume goes on, ") + "--overwrite begins anew"


def _broken(error: Exception) -> str:
    return f"unicom_ext does not load: {error}\n`unicom-ext doctor` says how to mend it"


def _program() -> str:
    """How the user can call this again; the command need not be on the path."""
    return "unicom-ext" if shutil.which("unicom-ext") else f"{sys.executable} -m unicom_ext.cli"


def _spin_briefly() -> None:
    """Let waiting threads sleep sooner than OpenMP's default; must precede the import of torch.

    Threads that spin hold up the ones they wait for as soon as other programs want the same cores.
    On two cores with two busy neighbours training ran at 150 to 650 images/s by default and at 1060
    so; on idle cores at 3000 and 2700.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _given_settings(settings_type: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    types = setting_types(settings_type)
    settings = {}
    for name, value in given.items():
        if value is None:
            continue
        default = getattr(settings_type, name)
        if isinstance(default, tuple):
            try:
                value = parse_list(types[name], value)
            except ValueError:
                raise ConfigError(
                    f"{name}: got {value!r}, must be a comma-separated list such as "
                    f"{','.join(map(str, default))}"
                ) from None
        settings[name] = value
    return settings


# ---- extract -------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Directory for img_emb/, text_emb/, true_labels.npy and images.npy.",
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
        from unicom_ext.data import dump as features
        from unicom_ext.data import glyphs

        data = glyphs.load()
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    if part != "all":
        data = glyphs.split(data)[part == "test"]
    features.write_dump(output, data, images=image_features, dim=dim, kept_words=kept_words)
    click.echo(
        f"Features of {len(data):,} images of {data.num_classes:,} characters in {output}. Next:\n"
        f"  {_program()} cluster {output} --joint concat --clusters {data.num_classes} "
        f"--output {output / 'clusters'}"
    )


# ---- cluster -------------------------------------------------------------------------------------


@main.command()
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
@_setting_options(ClusterConfig)
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
        config = ClusterConfig.from_mapping(_given_settings(ClusterConfig, given))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    _spin_briefly()
    try:
        from unicom_ext.cluster import driver, results
        from unicom_ext.distributed.ranks import ProcessFailed, process_group
    except (ImportError, OSError) as error:
        raise click.ClickException(_broken(error)) from None
    from unicom_ext.utils.files import CheckpointError

    try:
        with process_group() as ranks:
            result = driver.cluster(
                config, input, output, true_labels=true_labels, images=images, resume=resume,
                overwrite=overwrite,
            )  # fmt: skip
    except CheckpointError as error:
        raise click.ClickException(f"{error}\n({_ways_on(resume)})") from None
    except (
        ConfigError, driver.SourceError, ProcessFailed, OSError, ModuleNotFoundError
    ) as error:  # fmt: skip
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("\nStopped. To go on, give the same command with --resume.")
        sys.exit(INTERRUPTED)
    if ranks.is_first:
        for line in results.summary(result):
            click.echo(line)
        click.echo(f"Written: {output}")


# ---- evaluate ------------------------------------------------------------------------------------


@main.command()
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
        wanted_dims = None if dims is None else _whole_numbers("dims", dims)
        wanted_ks = _whole_numbers("recall-at", ks)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        from unicom_ext.retrieval.files import evaluate_files
    except (ImportError, OSError) as error:
        raise click.ClickException(_broken(error)) from None
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


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return parse_list(tuple[int, ...], text)
    except ValueError:
        raise ConfigError(
            f"{name}: got {text!r}, must be a comma-separated list of whole numbers"
        ) from None


# ---- checkpoint ----------------------------------------------------------------------------------


@main.group("checkpoint")
def checkpoint_group() -> None:
    """Look into checkpoints, and turn them into one file and back."""


def _checkpoint_command(name: str, *arguments: Any) -> None:
    from unicom_ext import checkpoint

    try:
        getattr(checkpoint, name)(*arguments)
    except (checkpoint.CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from None


@checkpoint_group.command()
@click.argument("directory", type=click.Path(path_type=Path))
def show(directory: Path) -> None:
    """Print the plain values and the tensors of a checkpoint."""
    _checkpoint_command("show", directory)


@checkpoint_group.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def merge(directory: Path, file: Path) -> None:
    """Write a checkpoint as one FILE, a dict of tensors for torch.load."""
    _checkpoint_command("merge", directory, file)


@checkpoint_group.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def split(file: Path, directory: Path) -> None:
    """Write a merged FILE as a checkpoint again, for any number of ranks."""
    _checkpoint_command("split", file, directory)


# ---- bench ---------------------------------------------------------------------------------------


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the loss against PartialFC v2; --help lists options.

    `bench parts` times the parts of a step alone, `bench sweep` steps of many sizes.
    """
    name = "head_step"
    if arguments and arguments[0] in ("parts", "sweep"):
        name, *arguments = arguments
    script = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    if not script.is_file():
        raise click.ClickException(
            f"{script} is not there: the benchmarks are not part of the installed package. Clone "
            "the source repository, install from it with `pip install --no-build-isolation -e .`, "
            "and run this again."
        )
    sys.exit(subprocess.call([sys.executable, str(script), *arguments]))


# ---- doctor --------------------------------------------------------------------------------------


@main.command()
def doctor() -> None:
    """Show versions, build and devices, and how to mend faults.

    The exit status is 1 if something is wrong.
    """
    from unicom_ext.cli.doctor import examine

    if not examine(click.echo):
        sys.exit(1)
