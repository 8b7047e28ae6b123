"""Settings of the image encoder. Imports neither torch nor NumPy."""

from __future__ import annotations

from dataclasses import dataclass

from unicom_ext.utils.settings import Settings, setting, whole


@dataclass(frozen=True)
class EncoderSettings(Settings):
    """Which encoder. Raises ConfigError (a ValueError) on values that cannot be used."""

    encoder: str = setting(
        "small", "the network: small, small-rgb, vit-b-32 and its like, timm:NAME, open_clip:NAME, "
        "hf:FOLDER, pixels, hog, or a factory of yours, package.module:function",
        "the name of an encoder", lambda v: v != "",
    )  # fmt: skip
    weights: str = setting(
        "", "what it starts from: a .pt, .pth or .safetensors file, or a checkpoint of a run",
        "the name of a file or of a checkpoint", lambda v: True,
    )  # fmt: skip
    image_size: int = whole(0, "side of the square images in pixels, 0 for the encoder's own", 0)
    width: int = whole(16, "channels of the first layer of small and small-rgb", 1)
