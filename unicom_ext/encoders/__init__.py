"""Image and text encoders by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicom_ext.encoders.registry import ImageEncoder, create

__all__ = ["ImageEncoder", "create"]


def __getattr__(name: str) -> object:
    if name in __all__:  # at first use: the settings of encoders need no torch
        return getattr(import_module("unicom_ext.encoders.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
