"""Data: `glyphs`, characters drawn from the fonts inside matplotlib, and features in files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicom_ext.data import glyphs

__all__ = ["glyphs"]

# What counts as the features of a row: of the image, of the text, or of both. Here, because the
# command line names them without NumPy and torch.
JOINTS = ("image", "text", "average", "concat")


def __getattr__(name: str) -> object:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
