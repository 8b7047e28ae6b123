"""The command line: `unicom-ext`, or `python -m unicom_ext.cli`.

Everything heavy is imported inside the commands, so that --help is quick and `doctor` still works
where the rest does not.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.settings import ConfigError, Settings, parse_list, read_toml, setting_types
from unicom_ext.train.config import Config

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
            command = click.option(
                f"--{setting.name.replace('_', '-')}",
                type=str if is_list else wanted,
                metavar="LIST" if is_list else None,
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

    _spin_briefly()
    from rich.console import Console

    try:
        from unicom_ext.files import CheckpointError
        from unicom_ext.train import driver, launch, report
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
        raise click.ClickException(
            f"{error}\n(--resume goes on, --overwrite begins anew)"
        ) from None
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
        from unicom_ext.data import features, glyphs

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
    part of the rows.
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
        from unicom_ext.cluster.ranks import process_group
    except (ImportError, OSError) as error:
        raise click.ClickException(_broken(error)) from None
    from unicom_ext.files import CheckpointError

    try:
        with process_group() as ranks:
            result = driver.cluster(
                config, input, output, true_labels=true_labels, images=images, resume=resume,
                overwrite=overwrite,
            )  # fmt: skip
    except CheckpointError as error:
        raise click.ClickException(
            f"{error}\n(--resume goes on, --overwrite begins anew)"
        ) from None
    except (ConfigError, driver.SourceError, OSError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("\nStopped. To go on, give the same command with --resume.")
        sys.exit(INTERRUPTED)
    if ranks.is_first:
        for line in results.summary(result):
            click.echo(line)
        click.echo(f"Written: {output}")


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
    script = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
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
    problems: list[str] = []
    for section in (_show_versions, _show_build, _show_devices):
        for line in section(problems):
            click.echo(line)
    click.echo()
    for problem in problems:
        click.echo(f"PROBLEM  {problem}")
    if problems:
        sys.exit(1)
    click.echo("Everything works.")


def _line(name: str, value: object) -> str:
    return f"{name:<16}{value}"


def _show_versions(problems: list[str]) -> Iterator[str]:
    yield _line("python", f"{platform.python_version()}  {sys.executable}")
    yield _line("platform", platform.platform())
    for package in ("unicom_ext", "torch", "numpy"):
        try:
            yield _line(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield _line(package, "not installed")
            # From a checkout that is merely on the path everything may work all the same.
            if package != "unicom_ext":
                problems.append(f"{package} is not installed.\n  To mend it: pip install {package}")


def _show_build(problems: list[str]) -> Iterator[str]:
    """Both extension modules; the tensor-free one loads without torch."""
    package = Path(__file__).resolve().parent
    try:
        from unicom_ext import _core
    except Exception as error:  # a broken binary may raise anything
        yield _line("core", "does not load")
        problems.append(_extension_problem("unicom_ext._core", package, "_core*.so", error))
    else:
        for name, value in _core.build_info().items():
            yield _line(name.replace("_", " "), value)
        yield _line("cpu", f"{_core.cpu_capability()}  of {', '.join(_core.cpu_capabilities())}")
    try:
        from unicom_ext import devices
    except Exception as error:
        yield _line("operators", "do not load")
        problems.append(_extension_problem("unicom_ext._C", package, "_C*.so", error))
    else:
        yield _line("operators", "for the CPU and CUDA" if devices.HAS_CUDA else "for the CPU")


def _extension_problem(name: str, package: Path, pattern: str, error: Exception) -> str:
    rebuild = "pip install --no-build-isolation -e .   (in the source checkout)"
    if not list(package.glob(pattern)):
        return (
            f"{name} has not been built: there is no {package / pattern}.\n  To mend it: {rebuild}"
        )
    return (
        f"{name} does not load: {type(error).__name__}: {error.__cause__ or error}\n"
        f"  It may be of another Python, torch or machine. To mend it: {rebuild}"
    )


def _show_devices(problems: list[str]) -> Iterator[str]:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch does not load: {error}\n  To mend it: pip install torch")
        return
    yield _line("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs")
    if torch.version.cuda is None:
        yield _line("torch CUDA", "this torch is built without CUDA")
    elif torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield _line("torch CUDA", f"{torch.version.cuda}, {names}")
        if not list(Path(__file__).resolve().parent.glob("_C_cuda.so")):
            problems.append(
                "torch has a GPU, but unicom_ext was built without CUDA.\n  To mend it: install "
                f"the CUDA toolkit {torch.version.cuda} (nvcc on the PATH, or CUDA_HOME), then "
                "pip install --no-build-isolation -e .   (in the source checkout)"
            )
    else:
        yield _line("torch CUDA", f"{torch.version.cuda}, but no usable GPU was found")
    yield _line("nvcc", _nvcc() or "not found")


def _nvcc() -> str | None:
    """Path and release of the CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    path = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if not path:
        return None
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{path}, which does not run: {error}"
    release = next((line for line in text.splitlines() if "release" in line), "").strip()
    return f"{path}  {release}"


if __name__ == "__main__":
    main(prog_name="unicom-ext")
