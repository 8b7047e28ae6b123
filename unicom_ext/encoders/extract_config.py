"""Settings of an extraction of features. Imports neither torch nor NumPy."""

from __future__ import annotations

from dataclasses import dataclass

from unicom_ext.data.images.settings import DataSettings
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.utils.settings import one_of, rate, setting, whole

PARTS = ("all", "train", "validation", "query", "gallery")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ExtractConfig(DataSettings, EncoderSettings):
    """Which features. Raises ConfigError (a ValueError) on values that cannot be used."""

    seed: int = setting(
        0, "of the class split, and of what is drawn for the features", "0 .. 2^32 - 1",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip
    part: str = one_of("all", "all images, or one part of the split that `train` makes", PARTS)
    encoder: str = setting(
        "hog", "of images: hog and pixels need no weights; vit-b-32, timm:NAME and others do",
        "the name of an encoder", lambda v: v != "",
    )  # fmt: skip
    text_encoder: str = setting(
        "ngrams", "of captions: ngrams, sentence:FOLDER, a factory of yours, or none",
        "the name of a text encoder, or none", lambda v: v != "",
    )  # fmt: skip
    dim: int = whole(128, "dimensions of hog, pixels and ngrams; others have their own", 2, 4096)
    kept_words: float = rate(
        1.0, "share of the words of its caption that an image's text has, drawn at random"
    )
    thumbnails: int = whole(32, "side of the small images in images.npy, 0 for none", 0, 512)
    device: str = one_of("auto", "where; auto: on a GPU if there is one", DEVICES)
    workers: int = setting(
        -1, "processes that read and decode images; -1: as many as cores, up to 8, and none for "
        "images in memory", "a whole number from -1 to 256", lambda v: -1 <= v <= 256,
    )  # fmt: skip

    @property
    def is_untrained(self) -> bool:
        """Whether its features would be those of random weights."""
        kind = self.encoder.partition(":")[0]
        own = kind in ("small", "small-rgb", "timm", "open_clip") or kind.startswith("vit-")
        return own and not self.weights
