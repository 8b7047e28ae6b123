"""Settings of a clustering. Imports neither torch nor NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unicom_ext.data import JOINTS
from unicom_ext.utils.settings import (
    ConfigError,
    Settings,
    not_negative,
    one_of,
    rate,
    setting,
    switch,
    whole,
)

METHODS = ("lloyd", "minibatch", "two-level")
ENGINES = ("unicom", "faiss")
DEVICES = ("auto", "cpu", "cuda")
INITS = ("kmeans++", "random")
# What may differ when a run goes on: how long it lasts, and on what; not what it computes.
FREE_TO_CHANGE = (
    "passes", "refine_passes", "tolerance", "device", "threads", "prune", "min_size",
    "min_cosine", "positives",
)  # fmt: skip
CLUSTERS_PER_CELL = 256  # with fewer, products of a search are not what it costs


@dataclass(frozen=True)
class ClusterConfig(Settings):
    """What a clustering does: a field for each option of ``unicom-ext cluster``, whose ``--help``
    says what they are.

    Raises:
        ConfigError: a ValueError, for values that cannot be used.
    """

    clusters: int = whole(1000, "k, how many clusters to find", 1)
    passes: int = whole(20, "at most so many passes over the rows", 1)
    tolerance: float = not_negative(
        1e-4, "stop when a pass improves the objective by less than this share; 0: never"
    )
    joint: str = one_of("image", "the features: of the image, of the text, or of both", JOINTS)
    image_weight: float = setting(
        0.5, "share of the image in average and concat", "a number in (0, 1)", lambda v: 0 < v < 1
    )
    init: str = setting(
        "kmeans++", "initial centroids: kmeans++, random, or a .npy file [k, d]",
        "kmeans++, random, or the name of a .npy file",
        lambda v: v in INITS or v.lower().endswith(".npy"),
    )  # fmt: skip
    method: str = one_of(
        "lloyd", "lloyd: whole passes; minibatch: an update after each batch; two-level: coarse "
        "clusters first, then fine ones inside each, for k >= 100,000", METHODS,
    )  # fmt: skip
    early_passes: int = whole(0, "lloyd: so many first passes look at a part of the rows only", 0)
    early_fraction: float = rate(0.1, "how large a part")
    rows_per_cluster: int = whole(
        0, "train on so many rows for each cluster, a sample drawn once; 0: on all. Labels and the "
        "objective in the end are of all rows", 0,
    )  # fmt: skip
    batch_rows: int = whole(65536, "minibatch: rows of a batch", 1)
    coarse: int = whole(
        0, "two-level: coarse clusters; 0: one for each 256 clusters, at most the square root of k",
        0,
    )  # fmt: skip
    refine_passes: int = whole(
        0, "two-level: so many passes at the end compare rows with all centroids, and so do labels "
        "then", 0,
    )  # fmt: skip
    prune: bool = switch(
        True, "leave out products that cannot change a label; the result is the same"
    )
    merge_above: float = setting(
        1.0, "in the end clusters become one whose centroids have a cosine above this; 1: none",
        "a number in (0, 1]", lambda v: 0 < v <= 1,
    )  # fmt: skip
    min_size: int = whole(0, "smaller clusters are dissolved, their rows labelled -1", 0)
    min_cosine: float = setting(
        0.0, "so are clusters whose mean cosine to the centroid is below this",
        "a number in [0, 1]", lambda v: 0 <= v <= 1,
    )  # fmt: skip
    positives: int = whole(
        1, "above 1: write so many nearest clusters of each row too, positives_XXXX.npy", 1
    )
    seed: int = setting(0, "of every draw", "0 .. 2^32 - 1", lambda v: 0 <= v < 2**32)
    engine: str = one_of("unicom", "what finds the nearest centroid", ENGINES)
    device: str = one_of(
        "auto", "where the unicom engine works; auto: on a GPU where there is one it can use. The "
        "result is the same", DEVICES,
    )  # fmt: skip
    image_column: str = setting("image_embedding", "column in Parquet files", "a name", bool)
    text_column: str = setting("text_embedding", "column in Parquet files", "a name", bool)
    threads: int = whole(0, "threads of torch, 0 for its own choice", 0, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_passes >= self.passes:
            raise ConfigError(
                f"early_passes: got {self.early_passes}, must be fewer than passes, which is "
                f"{self.passes}"
            )
        if self.positives > self.clusters:
            raise ConfigError(
                f"positives: got {self.positives}, must be from 1 to clusters = {self.clusters}"
            )
        if self.method != "lloyd" and self.early_passes:
            raise ConfigError(f"early_passes: is for method lloyd only, got {self.method}")
        if self.method != "two-level" and self.refine_passes:
            raise ConfigError(f"refine_passes: is for method two-level only, got {self.method}")
        if self.rows_per_cluster and (self.method == "minibatch" or self.early_passes):
            other = "method minibatch" if self.method == "minibatch" else "early_passes"
            raise ConfigError(f"rows_per_cluster: cannot be used with {other}")
        if self.method == "two-level" and not 2 <= self.num_coarse <= self.clusters:
            raise ConfigError(
                f"coarse: got {self.num_coarse}, must be from 2 to clusters = {self.clusters}"
            )

    @property
    def num_coarse(self) -> int:
        """How many coarse clusters the method ``two-level`` makes."""
        of_all = min(math.isqrt(self.clusters), self.clusters // CLUSTERS_PER_CELL)
        return self.coarse or max(2, of_all)

    @property
    def drawn_init(self) -> str:
        """How centroids are drawn where they are not given."""
        return self.init if self.init in INITS else INITS[0]
