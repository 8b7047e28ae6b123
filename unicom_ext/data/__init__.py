"""Image collections: `glyphs`, characters drawn from the fonts inside matplotlib."""

from . import glyphs

__all__ = ["glyphs"]
