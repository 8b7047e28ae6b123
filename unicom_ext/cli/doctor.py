"""What `unicom-ext doctor` tells: versions, build, devices, and how to mend faults.

It must work where the rest does not, so everything else is imported where it is looked at.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import click


@click.command()
def doctor() -> None:
    """Show versions, build and devices, and how to mend faults.

    The exit status is 1 if something is wrong.
    """
    if not examine(click.echo):
        sys.exit(1)


def examine(say: Callable[[str], object]) -> bool:
    """Say what is there, line by line; whether all is well."""
    problems: list[str] = []
    for section in (_show_versions, _show_build, _show_devices):
        for line in section(problems):
            say(line)
    say("")
    for problem in problems:
        say(f"PROBLEM  {problem}")
    if not problems:
        say("Everything works.")
    return not problems


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
    """The engine, which loads without torch, and the operators."""
    package = Path(__file__).resolve().parents[1]
    try:
        from unicom_ext import _engine
    except Exception as error:  # a broken binary may raise anything
        yield _line("engine", "does not load")
        problems.append(_binary_problem(package / "libunicom.so", error))
    else:
        for name, value in _engine.build_info().items():
            yield _line(name.replace("_", " "), value)
        available = ", ".join(_engine.cpu_capabilities())
        yield _line("cpu", f"{_engine.cpu_capability()}  of {available}")
    try:
        from unicom_ext.ops import library
    except Exception as error:
        yield _line("operators", "do not load")
        problems.append(_binary_problem(package / "_C.so", error))
    else:
        yield _line("operators", "for the CPU and CUDA" if library.HAS_CUDA else "for the CPU")


def _binary_problem(path: Path, error: Exception) -> str:
    rebuild = "pip install --no-build-isolation -e .   (in the source checkout)"
    if not path.exists():
        return f"{path.name} has not been built: there is no {path}.\n  To mend it: {rebuild}"
    return (
        f"{path.name} does not load: {type(error).__name__}: {error.__cause__ or error}\n"
        f"  It may be of another torch or machine. To mend it: {rebuild}"
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
        if not (Path(__file__).resolve().parents[1] / "_C_cuda.so").exists():
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
