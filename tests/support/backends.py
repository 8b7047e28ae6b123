"""The loss on other backends than the CPU's, under tests that only know CPU tensors.

Each backend is a namespace of operators with the signatures of ``torch.ops.unicom_ext``:

- ``emulated_cuda``: the CUDA backend, its kernels compiled as C++ (tests/emulation);
- ``cuda``: the real one, on copies of the tensors, where there is a GPU.
"""

from __future__ import annotations

import fcntl
import functools
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

import unicom_ext
from unicom_ext.ops import autograd, library

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"


@functools.cache
def build_emulation(target: str) -> Path:
    """Builds one target of tests/emulation/CMakeLists.txt; test processes wait for each other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-G", "Ninja", "-S", ROOT / "tests" / "emulation", "-B", BUILD),
        f"-DTORCH_DIR={torch.__path__[0]}",
        f"-DUNICOM_DIR={Path(unicom_ext.__file__).parent}",
    ]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", BUILD, "--target", target]):
            run_tool(command)
    return BUILD / target


def run_tool(command: list) -> str:
    """Standard output of a build tool of this environment; its whole output if it fails."""
    tool = Path(sys.executable).with_name(command[0])
    path = f"{tool.parent}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        [str(tool) if tool.exists() else command[0], *map(str, command[1:])],
        capture_output=True,
        text=True,
        env={"PATH": path},
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def _emulated_cuda():
    torch.ops.load_library(build_emulation("_C_emulated").with_suffix(".so"))
    autograd.register("unicom_ext_emulated")
    return torch.ops.unicom_ext_emulated


@functools.cache
def _cuda():
    definitions = torch.library.Library("unicom_ext_on_gpu", "DEF")
    for name in ("loss", "loss_backward", "loss_sums", "loss_merge",
                 "select_classes", "select_features", "label_slots",
                 "loss_backward_adamw_", "loss_backward_sgd_",
                 "merge_rows", "row_adamw_", "row_sgd_",
                 "pack_centroids", "nearest", "add_unit_rows"):  # fmt: skip
        overload = getattr(torch.ops.unicom_ext, name).default
        definitions.define(str(overload._schema).removeprefix("unicom_ext::"))

        def on_gpu(*args, op=overload):
            there = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
            results = tree_map_only(torch.Tensor, lambda t: t.cpu(), op(*there))
            for argument, here, away in zip(op._schema.arguments, args, there, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    here.copy_(away)
            return results

        definitions.impl(name, on_gpu, "CPU")
    autograd.register("unicom_ext_on_gpu")
    _cuda.keep_alive = definitions
    return torch.ops.unicom_ext_on_gpu


BACKENDS = {"emulated_cuda": _emulated_cuda}
if torch.cuda.is_available():
    BACKENDS["cuda"] = _cuda


def use(monkeypatch, name: str) -> None:
    """Sends the loss, the row optimizers and the search for the nearest centroid to a backend for
    the length of a test."""
    monkeypatch.setattr(library, "ops", BACKENDS[name]())
