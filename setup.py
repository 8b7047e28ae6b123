"""Builds the C++ parts with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import setuptools

ROOT = Path(__file__).resolve().parent
MINIMUM_CMAKE = (3, 26)
MINIMUM_SETUPTOOLS = 77
MINIMUM_TORCH = (2, 11)


def _fail(problem: str, remedy: str) -> NoReturn:
    sys.exit(f"\nunicom_ext cannot be built: {problem}\n  To mend it: {remedy}\n")


if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
    _fail(
        f"setuptools {setuptools.__version__} is too old.",
        f"pip install 'setuptools>={MINIMUM_SETUPTOOLS}'",
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (which older ones have not)
from setuptools.command.build_ext import build_ext  # noqa: E402


def _tool(name: str) -> str:
    """A build tool of this Python environment, or else the system's."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or ""


def _cmake() -> str:
    cmake = _tool("cmake")
    wanted = ".".join(map(str, MINIMUM_CMAKE))
    if not cmake:
        _fail("cmake was not found.", f"pip install 'cmake>={wanted}'")
    first_line = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True)
    version = first_line.stdout.split()[2]
    if tuple(map(int, version.split(".")[:2])) < MINIMUM_CMAKE:
        _fail(f"cmake {version} is too old.", f"pip install 'cmake>={wanted}'")
    return cmake


def _torch() -> ModuleType:
    """The torch to build against: the one that is here. It is no requirement of the build, as pip
    would fetch the newest, of gigabytes, into an environment that it throws away afterwards."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    try:
        import torch
    except ImportError:
        _fail(
            "there is no torch in this environment; pip's build isolation hides one that is.",
            f"pip install 'torch>={wanted}' numpy cmake ninja 'setuptools>={MINIMUM_SETUPTOOLS}', "
            "then pip install --no-build-isolation .",
        )
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < MINIMUM_TORCH:
        _fail(f"torch {torch.__version__} is too old.", f"pip install 'torch>={wanted}'")
    return torch


def _cuda_options(torch: ModuleType) -> list[str]:
    """CMake's options for the CUDA backend: built where torch has CUDA and nvcc is found."""
    if torch.version.cuda is None:
        return []
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not nvcc:
        print(
            "\nunicom_ext: torch has CUDA, but nvcc was not found: the CUDA backend is NOT built.\n"
            f"  To have it: install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME, then "
            "install again.\n",
            file=sys.stderr,
        )
        return []
    # CMake itself would look at its variable in a fresh build directory alone.
    architectures = os.environ.get("CUDAARCHS")
    return [
        "-DUNICOM_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"
        if architectures
        else "-UCMAKE_CUDA_ARCHITECTURES",
    ]


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = _torch()
        cmake = _cmake()
        ninja = _tool("ninja")
        if not ninja:
            _fail("ninja was not found.", "pip install ninja")
        compiler = os.environ.get("CXX") or "c++"
        if not shutil.which(compiler.split()[0]):
            _fail(
                f"no C++ compiler ({compiler}) was found.",
                "install GCC 12 or newer (Debian, Ubuntu: apt-get install g++), or set CXX",
            )
        # Kept between builds, one for each torch, so that a rebuild is quick.
        build = ROOT / "build" / f"torch-{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        inplace = self.inplace or self.editable_mode
        output = ROOT / "unicom_ext" if inplace else Path(self.build_lib).resolve() / "unicom_ext"
        if not inplace:  # what another build has left, such as one for CUDA, is not for this wheel
            for binary in output.glob("*.so"):
                binary.unlink()
        configure = [
            cmake,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_DIR={torch.__path__[0]}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            *_cuda_options(torch),
            str(ROOT),
        ]
        try:
            subprocess.run(configure, cwd=build, check=True)
            subprocess.run([cmake, "--build", "."], cwd=build, check=True)
        except subprocess.CalledProcessError as error:
            _fail(
                f"the command `{' '.join(error.cmd[:2])} ...` failed; its output is above.",
                "read the first error above; GCC 12 or newer with C++20 is needed",
            )

    def get_outputs(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """One for every Python: the binaries use neither Python's C interface nor a torch newer than
    the lowest that is supported."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setuptools.setup(
    ext_modules=[setuptools.Extension("unicom_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
