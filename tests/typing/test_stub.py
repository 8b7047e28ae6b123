"""The stub of the compiled module says what the compiled module has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from unicom_ext import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
# What pybind11 writes for a C++ type, and what the stub has for it.
TYPES = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "numpy.typing.NDArray[numpy.float32]": "NDArray[np.float32]",
    "numpy.typing.NDArray[numpy.int32]": "_Labels",
    "numpy.typing.NDArray[numpy.int64]": "_Labels",
    "typing.Annotated[numpy.typing.ArrayLike, numpy.int64]": "ArrayLike",
    "typing.Annotated[numpy.typing.ArrayLike, numpy.float64]": "ArrayLike",
}


def signature(function: ast.FunctionDef) -> tuple[object, ...]:
    """Names (None where only the position counts), types and defaults; the kind of the result."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    names = [None] * len(arguments.posonlyargs) + [a.arg for a in arguments.args]
    types = [ast.unparse(a.annotation) for a in positional]
    result = ast.unparse(function.returns)
    return (
        tuple(zip(names, (TYPES.get(t, t) for t in types), strict=True)),
        tuple(ast.literal_eval(default) for default in arguments.defaults),
        "ndarray" if "NDArray" in result and "tuple" not in result else result.split("[")[0],
    )


def compiled(name: str) -> set[tuple[object, ...]]:
    """The signatures in the docstring that pybind11 writes: one, or a numbered list."""
    lines = re.findall(rf"^(?:\d+\. )?({name}\(.*\) -> .*)$", getattr(_core, name).__doc__, re.M)
    assert lines, getattr(_core, name).__doc__
    found = set()
    for line in lines:
        # Arguments without a name are numbered; in the stub they are positional.
        unnamed = re.findall(r"\barg\d+\b", line)
        if unnamed:
            line = re.sub(r"\) ->", ", /) ->", line)
        (function,) = ast.parse(f"def {line}: ...").body
        names, defaults, result = signature(function)
        found.add((names, defaults, result.removeprefix("numpy.").split("[")[0]))
    return found


def stubbed(name: str) -> set[tuple[object, ...]]:
    return {
        signature(node)
        for node in TREE.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    }


FUNCTIONS = sorted({node.name for node in TREE.body if isinstance(node, ast.FunctionDef)})


def test_the_same_names():
    constants = {n.target.id for n in TREE.body if isinstance(n, ast.AnnAssign)} - {"_Labels"}
    public = {name for name in dir(_core) if not name.startswith("__")}
    assert {*FUNCTIONS, *constants} == public
    assert all(isinstance(getattr(_core, name), int) for name in constants)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_arguments(name):
    assert stubbed(name) == compiled(name)
