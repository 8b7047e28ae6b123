"""Settings of a training run.

The defaults are the demo: they train on the bundled glyphs in about a minute on two cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unicom_ext.data.images.settings import GLYPHS, DataSettings
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.utils.settings import (
    ConfigError,
    not_negative,
    one_of,
    positive,
    rate,
    setting,
    switch,
    whole,
)

BASELINES = ("raw pixels", "HOG", "LDA", "HOG + LDA")  # unicom_ext.data.baselines has them
MULTI_LABEL = ("average", "separate")
UPDATES = ("dense", "rows")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
DISTORTIONS = ("auto", "characters", "photographs")
AUTOCAST = ("off", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Config(DataSettings, EncoderSettings):
    """What a run does. Equal configs on the same machine give bit-identical models.

    Raises ConfigError (a ValueError) on values that cannot be used.
    """

    seed: int = setting(
        0, "of the class split, the weights, and every draw", "0 .. 2^32 - 1",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip
    labels: str = setting(
        "", "pseudo-classes to train on instead of the true classes: a .npy file, or the output of "
        "`unicom-ext cluster`, with one or several labels for each training image, -1 for none",
        "the name of a .npy file or of a directory", lambda v: True,
    )  # fmt: skip
    positives: int = whole(0, "so many labels of each image, the first; 0 for all there are", 0)
    multi_label: str = one_of(
        "average", "loss of an image with several labels: mean of their cross entropies, or MLCD's",
        MULTI_LABEL,
    )  # fmt: skip

    embedding_size: int = whole(128, "dimensions of an embedding", 1)

    m1: float = positive(1.0, "margin: factor on the angle (SphereFace)")
    m2: float = not_negative(0.3, "margin: added to the angle, in radians (ArcFace)")
    m3: float = not_negative(0.0, "margin: subtracted from the cosine (CosFace)")
    scale: float = positive(32.0, "s, which multiplies the cosines")
    sample_rate: float = setting(
        0.5, "share of the classes in each step's softmax; 0 for those of the batch alone",
        "a number in [0, 1]", lambda v: 0 <= v <= 1,
    )  # fmt: skip
    num_centers: int = whole(
        1, "prototypes of each class, of which the nearest to an image counts", 1, 16
    )
    feature_rate: float = rate(0.75, "share of the dimensions in each step's softmax")
    feature_selection: str = one_of(
        "random", "which dimensions: any, or the first ones, as many on average",
        ("random", "nested"),
    )  # fmt: skip
    precision: str = one_of("auto", "operands of the loss", PRECISIONS)
    prototype_update: str = one_of(
        "dense", "all prototypes in each step (AdamW), or the sampled ones (RowAdamW)", UPDATES
    )

    epochs: int = whole(14, "passes over the training images", 1)
    batch_size: int = whole(128, "images per step; the last of an epoch takes the rest", 2)
    learning_rate: float = positive(8e-3, "of the encoder, at its highest")
    prototype_learning_rate: float = positive(5e-2, "of the class prototypes, at its highest")
    head_learning_rate: float = not_negative(
        0.0, "of the layer that makes embedding_size of an encoder's own size; 0: the encoder's"
    )
    weight_decay: float = not_negative(0.05, "of the encoder (AdamW)")
    warmup: float = setting(
        0.05, "share of the steps in which learning rates rise", "a number in [0, 1)",
        lambda v: 0 <= v < 1,
    )  # fmt: skip
    accumulate: int = whole(
        1, "parts of a batch that go through the encoder one after the other, to save memory", 1
    )
    autocast: str = one_of("off", "precision of the encoder's products", AUTOCAST)
    ema: float = setting(
        0.0, "decay of an average of the encoder's weights, which is then evaluated; 0 for none",
        "a number in [0, 1)", lambda v: 0 <= v < 1,
    )  # fmt: skip
    compile: bool = switch(False, "let torch.compile make the encoder faster")
    augment: float = setting(
        1.0, "strength of the random distortions, 0 for none", "a number in [0, 2]",
        lambda v: 0 <= v <= 2,
    )  # fmt: skip
    distortions: str = one_of(
        "auto", "characters: slanted, stretched, bolder; photographs: parts of them, mirrored, in "
        "another light; auto: what suits the data", DISTORTIONS,
    )  # fmt: skip

    dims: tuple[int, ...] = setting(
        (16, 32, 64, 128), "leading dimensions to evaluate at",
        "increasing whole numbers from 1 to embedding_size",
        lambda v: len(v) > 0 and v[0] >= 1 and list(v) == sorted(set(v)),
    )  # fmt: skip
    baselines: tuple[str, ...] = setting(
        ("auto",), "what to compare with; auto: what is possible, for up to 50,000 images",
        f"auto, or some of {', '.join(BASELINES)}, or nothing",
        lambda v: v == ("auto",) or (set(v) <= set(BASELINES) and len(set(v)) == len(v)),
    )  # fmt: skip
    evaluate_every: int = whole(7, "epochs between evaluations, 0 for the end only", 0)
    patience: int = whole(
        0, "stop after so many evaluations without a better Recall@1 on the validation classes, "
        "and take the best encoder; 0: neither", 0,
    )  # fmt: skip
    checkpoint_every: int = whole(200, "steps between checkpoints", 1)
    tensorboard: bool = switch(False, "write the curves for TensorBoard too")
    device: str = one_of("auto", "where to train; auto: on a GPU if there is one", DEVICES)
    workers: int = setting(
        -1, "processes that read and decode images; -1: as many as cores, up to 8, and none for "
        "images in memory", "a whole number from -1 to 256", lambda v: -1 <= v <= 256,
    )  # fmt: skip
    threads: int = whole(0, "threads of torch, 0 for its own choice", 0, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.evaluate_every:
            raise ConfigError(
                f"patience: got {self.patience}, which needs evaluations on the way, so that "
                "evaluate_every must be at least 1"
            )
        if self.positives > 1 and not self.labels:
            raise ConfigError(f"positives: got {self.positives}, but no labels, which have several")
        if self.dims[-1] > self.embedding_size:
            raise ConfigError(
                f"dims: got {list(self.dims)}, must not go beyond embedding_size, which is "
                f"{self.embedding_size}"
            )
        if math.floor(self.feature_rate * self.embedding_size + 0.5) < 1:
            raise ConfigError(
                f"feature_rate: got {self.feature_rate}, which leaves none of the embedding_size "
                f"= {self.embedding_size} dimensions; must be at least {0.5 / self.embedding_size}"
            )

    @property
    def noun(self) -> str:
        """What a class is called."""
        return "characters" if self.data == GLYPHS else "classes"

    @property
    def distorts_characters(self) -> bool:
        if self.distortions == "auto":
            return self.data == GLYPHS
        return self.distortions == "characters"
