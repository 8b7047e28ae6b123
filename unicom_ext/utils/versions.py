"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

import unicom_ext


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "unicom_ext": unicom_ext.__version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }
