"""Settings of a pipeline: one TOML file with a table for each command. Imports neither torch nor
NumPy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.data.images.settings import DataSettings
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.train.config import Config
from unicom_ext.utils.settings import ConfigError, Settings, check_names, read_toml, setting

IMAGES_PER_CLUSTER = 20  # where the settings leave the number of clusters open
_MANY = 2**31  # stands for that number until the images are counted

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class SharedSettings(DataSettings):
    """The images and the seed of all steps."""

    seed: int = setting(
        0, "of the class split, and of every draw of every step", "0 .. 2^32 - 1",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """How the encoders are compared in the end."""

    dims: tuple[int, ...] = setting(
        (), "leading dimensions to evaluate at; none: the dims of [train]",
        "increasing whole numbers from 1 to train.embedding_size",
        lambda v: list(v) == sorted(set(v)) and all(dim >= 1 for dim in v),
    )  # fmt: skip


_SHARED = tuple(f.name for f in dataclasses.fields(SharedSettings))
_OF_CLUSTERS = ("positives", "multi_label")  # what a training does with clusters
_OF_PRETRAINED = ("encoder", "image_size", "width", "embedding_size", "weights")
# Settings of a command that its table cannot have, by who says what they are.
_ELSEWHERE = {
    "extract": {
        **dict.fromkeys(_SHARED, "is a setting of [data], for all steps"),
        "part": "cannot be set: features are of the images that are trained on",
    },
    "cluster": {"seed": "is a setting of [data], for all steps"},
    "train": {
        **dict.fromkeys(_SHARED, "is a setting of [data], for all steps"),
        "labels": "cannot be set: they are the clusters",
    },
    "finetune": {
        **dict.fromkeys(_SHARED, "is a setting of [data], for all steps"),
        **dict.fromkeys(("labels", *_OF_CLUSTERS), "cannot be set: labels are the true classes"),
        **dict.fromkeys(_OF_PRETRAINED, "cannot be set: it is the encoder of [train]"),
    },
}


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline does; made by `read` or `from_mapping`.

    data      the images, and the seed, of all steps
    extract   features of the images that are trained on
    train     training on the clusters of these features
    finetune  training on true classes after that; None: none is wanted
    evaluate  how the encoders are compared
    tables    the settings as they were given, by table
    """

    data: SharedSettings
    extract: ExtractConfig
    train: Config
    finetune: Config | None
    evaluate: EvaluateSettings
    tables: Mapping[str, Mapping[str, Any]] = field(compare=False)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """From a TOML file. Raises ConfigError, which names the table and the setting."""
        return cls.from_mapping(read_toml(path))

    @classmethod
    def from_mapping(cls, tables: Mapping[str, Any]) -> Self:
        """From settings by table; the ones that are not given have their default.

        finetune has the settings of train where it does not say otherwise, without baselines.
        """
        check_names(tables, ("data", *_ELSEWHERE, "evaluate"), "table")
        for table, values in tables.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{table}: got {values!r}, must be a table of settings")
            for name, why in _ELSEWHERE.get(table, {}).items():
                if name in values:
                    raise ConfigError(f"{table}.{name}: {why}")
        data = _settings(SharedSettings, "data", tables.get("data", {}))
        shared = data.to_dict()
        given = {table: {**tables.get(table, {}), **shared} for table in ("extract", "train")}
        extract = _settings(ExtractConfig, "extract", {**given["extract"], "part": "train"})
        train = _settings(Config, "train", given["train"])
        finetune = None
        if "finetune" in tables:
            own = {name: v for name, v in train.to_dict().items() if name not in _OF_CLUSTERS}
            finetune = _settings(Config, "finetune", {**own, "baselines": [], **tables["finetune"]})
        evaluate = _settings(EvaluateSettings, "evaluate", tables.get("evaluate", {}))
        if evaluate.dims and evaluate.dims[-1] > train.embedding_size:
            raise ConfigError(
                f"evaluate.dims: got {list(evaluate.dims)}, must not go beyond "
                f"train.embedding_size, which is {train.embedding_size}"
            )
        config = cls(data, extract, train, finetune, evaluate, tables)
        config.cluster(_MANY * IMAGES_PER_CLUSTER, captions=True)
        return config

    def cluster(self, images: int, captions: bool) -> ClusterConfig:
        """Settings of the clustering of so many images, with captions or without.

        Without `clusters`, or with 0, there is one for every IMAGES_PER_CLUSTER images, at least
        two. Without `joint`, features are those of image and caption where there are captions.
        """
        given = dict(self.tables.get("cluster", {}))
        if given.get("clusters", 0) == 0:
            given["clusters"] = max(images // IMAGES_PER_CLUSTER, 2)
        given.setdefault("joint", "concat" if captions else "image")
        return _settings(ClusterConfig, "cluster", {**given, "seed": self.data.seed})

    @property
    def dims(self) -> tuple[int, ...]:
        """To evaluate at."""
        return self.evaluate.dims or self.train.dims

    @property
    def devices(self) -> set[str]:
        """What the steps say of where they work."""
        trainings = (self.train, self.finetune or self.train)
        clustering = self.cluster(_MANY * IMAGES_PER_CLUSTER, captions=True)
        return {step.device for step in (self.extract, clustering, *trainings)}

    def to_toml(self) -> str:
        """What `read` makes the same settings of."""
        text = ""
        for table, values in self.tables.items():
            lines = (f"{name} = {json.dumps(value)}\n" for name, value in values.items())
            text += f"[{table}]\n{''.join(lines)}\n"
        return text


def _settings(kind: type[S], table: str, values: Mapping[str, Any]) -> S:
    """Raises ConfigError with the name of the table before that of the setting."""
    try:
        return kind.from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{table}.{error}") from None
