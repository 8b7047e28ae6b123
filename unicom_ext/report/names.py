"""Names of classes and files, which may hold anything, as a page can show them."""

from __future__ import annotations

LONGEST = 80  # letters
JOINERS = "\u200c\u200d"  # which are not printed, but shape Persian and emoji


def short(name: object) -> str:
    """On one line, of at most `LONGEST` letters, without what would direct the text around it."""
    text = " ".join(str(name).split())
    text = "".join(c if c.isprintable() or c in JOINERS else "�" for c in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
