"""Packages and modules that encoders need only where they are asked for."""

from __future__ import annotations

import difflib
import re
from importlib import import_module
from typing import Any

from unicom_ext.utils.settings import ConfigError


def package(module: str, distribution: str, wanted_by: str) -> Any:
    """A module of a package that may not be installed; ConfigError says then what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing == module.partition(".")[0]:
            missing = distribution
        raise ConfigError(
            f"{wanted_by} needs the package {missing}, which is not installed: pip install "
            f"{missing}"
        ) from None


def call_factory(setting: str, name: str) -> Any:
    """What the function at "package.module:function" returns.

    Args:
        setting: whose value the name is, for messages.
        name: of the function.

    Raises ConfigError: there is no such function. What it raises itself goes through.
    """
    module_name, _, function_name = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ConfigError(f"{setting}: got {name!r}, must be like package.module:function")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # Its own imports may fail, too, which is another fault.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{setting}: got {name!r}, but there is no module {error.name!r}; it must be installed "
            "or in a folder of PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ConfigError(
            f"{setting}: got {name!r}, but {module_name} has no function {function_name!r}"
            f"{closest(function_name, there)}"
        )
    return function()


def closest(name: str, names: list[str]) -> str:
    """The end of a sentence about a name that there is not: asks for the one that is like it."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else "."
