"""Builds the C++ parts with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_CMAKE = (3, 26)


def _fail(problem: str, remedy: str) -> None:
    sys.exit(f"\nunicom_ext cannot be built: {problem}\n  To mend it: {remedy}\n")


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


def _modules() -> tuple[str, str]:
    """Directories of torch and of pybind11's CMake files."""
    try:
        import torch
    except ImportError:
        _fail(
            "torch is not installed in this environment.",
            "install torch >= 2.11 first, then run pip with --no-build-isolation",
        )
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11):
        _fail(f"torch {torch.__version__} is too old.", "install torch >= 2.11")
    try:
        import pybind11
    except ImportError:
        _fail("pybind11 is not installed.", "pip install pybind11")
    return torch.__path__[0], pybind11.get_cmake_dir()


def _cuda_options() -> list[str]:
    """CMake's options for the CUDA backend: built where torch has CUDA and nvcc is found."""
    import torch

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
        torch_dir, pybind11_dir = _modules()
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
        # Kept between builds, one for each Python and torch, so that a rebuild is quick.
        import torch

        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        inplace = self.inplace or self.editable_mode
        output = ROOT / "unicom_ext" if inplace else Path(self.build_lib).resolve() / "unicom_ext"
        configure = [
            cmake,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_DIR={torch_dir}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            *_cuda_options(),
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


setup(
    ext_modules=[Extension("unicom_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
