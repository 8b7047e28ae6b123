from __future__ import annotations

from dataclasses import dataclass

from unicom_ext.utils.settings import Settings, setting, whole


@dataclass(frozen=True)
class EncoderSettings(Settings):
    encoder: str = setting("small", "encoder", "a name", lambda v: v != "")
    weights: str = setting("", "weights", "a file", lambda v: True)
    image_size: int = whole(0, "size", 0)
    width: int = whole(16, "channels of the encoder's first layer", 1)
