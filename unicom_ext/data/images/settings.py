"""Settings of where images come from. Imports neither torch nor NumPy."""

from __future__ import annotations

from dataclasses import dataclass

from unicom_ext.utils.settings import Settings, one_of, setting

GLYPHS = "glyphs"
LAYOUTS = (
    "auto", "folder", "table", "shards",
    "sop", "inshop", "cub", "cars", "inat", "gldv2",
)  # fmt: skip


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which images. Raises ConfigError (a ValueError) on values that cannot be used."""

    data: str = setting(
        GLYPHS,
        "the images: glyphs for the bundled characters, or the name of a folder, table or shard",
        "glyphs, or the name of a folder, table or shard", lambda v: v != "",
    )  # fmt: skip
    layout: str = one_of("auto", "how they lie there; auto finds out", LAYOUTS)
    test_fraction: float = setting(
        0.5, "share of the classes that are never trained on, where the data do not say which",
        "a number in (0, 1)", lambda v: 0 < v < 1,
    )  # fmt: skip
    validation_fraction: float = setting(
        0.0, "share of the training classes that are kept apart, to compare settings and to stop "
        "early on", "a number in [0, 1)", lambda v: 0 <= v < 1,
    )  # fmt: skip
