"""The loss on other backends than the CPU's, under tests that only know CPU tensors.

Each backend is a namespace of operators with the signatures of ``torch.ops.unicom_ext``:

- ``emulated_cuda``: the CUDA backend, its kernels compiled as C++ (tests/emulation);
- ``cuda``: the real one, on copies of the tensors, where there is a GPU;
- ``copies``: the CPU's own, on copies of the tensors: how ``cuda`` is called, without a GPU. No
  test is parametrized with it; tests/cuda/test_backends.py is about it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import unicom_ext
from unicom_ext import _engine, reference
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


def _emulation() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_emulation("_C_emulated").with_suffix(".so")))


def boxes_loaded() -> int:
    """How often kernels over the emulation have used TMA, which only those for Hopper do."""
    count = _emulation().unicom_boxes_loaded
    count.restype = ctypes.c_int64
    return count()


@contextlib.contextmanager
def emulating(*, compute_capability: int = 9, schedule: int = 1) -> Iterator[None]:
    """What the emulation is of in the meantime: a Hopper (9) or a GPU before it (8), whose threads
    run in the order that follows from `schedule`."""
    emulation = _emulation()
    emulation.unicom_emulate(compute_capability, ctypes.c_uint64(schedule))
    try:
        yield
    finally:
        emulation.unicom_emulate(9, ctypes.c_uint64(1))


def _on_copies(namespace: str, copy: Callable[[torch.Tensor], torch.Tensor]):
    """The operators under another namespace, for CPU tensors: each works on copies of its tensors
    and gives CPU tensors back, also in the arguments that it writes to."""
    definitions = torch.library.Library(namespace, "DEF")
    names = [name.removeprefix("unicom_ext::") for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("unicom_ext::")]  # fmt: skip
    for name in names:
        overload = getattr(torch.ops.unicom_ext, name).default
        definitions.define(str(overload._schema).removeprefix("unicom_ext::"))

        def on_copies(*args, op=overload):
            # The dispatcher leaves out arguments at the end that have their default.
            schema = op._schema.arguments[: len(args)]
            there = tree_map_only(torch.Tensor, copy, args)
            results = tree_map_only(torch.Tensor, lambda t: t.cpu(), op(*there))
            for argument, here, away in zip(schema, args, there, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for a, b in zip(tree_leaves(here), tree_leaves(away), strict=True):
                        if a is not None:  # an optional tensor
                            a.copy_(b)
            return results

        definitions.impl(name, on_copies, "CPU")
    autograd.register(namespace)
    _LIBRARIES.append(definitions)
    return getattr(torch.ops, namespace)


_LIBRARIES: list[torch.library.Library] = []  # which live as long as somebody holds them


@functools.cache
def _cuda():
    return _on_copies("unicom_ext_on_gpu", torch.Tensor.cuda)


@functools.cache
def _copies():
    """The CPU's operators the way those of a GPU are called."""
    return _on_copies("unicom_ext_on_copies", torch.Tensor.clone)


BACKENDS = {"emulated_cuda": _emulated_cuda}
if torch.cuda.is_available():
    BACKENDS["cuda"] = _cuda

# To parametrize tests with: `-m gpu` selects what needs one, `-m emulated` its stand-in.
MARKS = {"emulated_cuda": pytest.mark.emulated, "cuda": pytest.mark.gpu}
PARAMS = [pytest.param(name, marks=MARKS[name]) for name in BACKENDS]

BEST = _engine.cpu_capabilities()[-1]  # of the instruction sets of this CPU
EMULATED = ("emulated_avx512", "emulated_amx")  # in instructions that every CPU has
EVERY_SET = [*_engine.cpu_capabilities(), *EMULATED]


def capabilities() -> list:
    """Instruction sets whose kernels can run here, to parametrize tests with. Where the CPU has no
    AVX-512 or no AMX their kernels run too, in instructions that every CPU has."""
    names: list = _engine.cpu_capabilities()
    emulated = [
        pytest.param(name, marks=pytest.mark.slow)
        for name in EMULATED
        if name.removeprefix("emulated_") not in names
    ]
    return [*names, *emulated]


def runs_again(item: pytest.Item) -> bool:
    """Whether a case of a test of the loss runs what another one runs, under another name: float64
    kernels are one object for every instruction set, the matrix unit has some of bf16 alone, and
    the reference has no kernels."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "capability" not in params or item.path.parent.name not in ("loss", "distributed"):
        return False
    values = tree_leaves(params)
    if any(value is reference.partial_margin_softmax for value in values):
        return params["capability"] != BEST
    capability = params["capability"]
    if any(value is torch.float64 for value in values):
        return capability not in (BEST, *BACKENDS)
    in_bf16 = any(isinstance(value, str) and value == "bf16" for value in values)
    others = "emulated_amx" if BEST != "amx" else "avx512_bf16"
    return capability == others and not in_bf16


def use(monkeypatch, name: str) -> None:
    """Sends the loss, the row optimizers and the search for the nearest centroid to a backend for
    the length of a test."""
    operators = {**BACKENDS, "copies": _copies}[name]()
    monkeypatch.setattr(library, "ops", operators)
