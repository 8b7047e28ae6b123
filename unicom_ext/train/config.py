"""Settings of a training run: one flat dataclass, from a TOML file and the command line.

The defaults are the demo: they train on the bundled glyphs in about a minute on two cores. This
module imports neither torch nor NumPy, so that the command line can show its options quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

BASELINES = ("raw pixels", "HOG", "LDA", "HOG + LDA")  # unicom_ext.retrieval.baselines has them
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was given and what is allowed."""


def _setting(default: Any, help: str, allowed: str, accepts: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"help": help, "allowed": allowed, "accepts": accepts})


def _whole(default: int, help: str, at_least: int) -> Any:
    return _setting(default, help, f"a whole number >= {at_least}", lambda v: v >= at_least)


def _positive(default: float, help: str) -> Any:
    return _setting(default, help, "a finite number > 0", lambda v: 0 < v < math.inf)


def _not_negative(default: float, help: str) -> Any:
    return _setting(default, help, "a finite number >= 0", lambda v: 0 <= v < math.inf)


def _rate(default: float, help: str) -> Any:
    return _setting(default, help, "a number in (0, 1]", lambda v: 0 < v <= 1)


@dataclass(frozen=True)
class Config:
    """What a run does. Equal configs on the same machine give bit-identical models.

    Raises ConfigError (a ValueError) on values that cannot be used.
    """

    seed: int = _setting(
        0, "of the class split, the weights, and every draw", "0 .. 2^32 - 1",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip
    test_fraction: float = _setting(
        0.5, "share of the classes that are never trained on", "a number in (0, 1)",
        lambda v: 0 < v < 1,
    )  # fmt: skip

    embedding_size: int = _whole(128, "dimensions of an embedding", 1)
    width: int = _whole(16, "channels of the encoder's first layer", 1)

    m1: float = _positive(1.0, "margin: factor on the angle (SphereFace)")
    m2: float = _not_negative(0.3, "margin: added to the angle, in radians (ArcFace)")
    m3: float = _not_negative(0.0, "margin: subtracted from the cosine (CosFace)")
    scale: float = _positive(32.0, "s, which multiplies the cosines")
    sample_rate: float = _rate(0.5, "share of the classes in each step's softmax")
    feature_rate: float = _rate(0.75, "share of the dimensions in each step's softmax")
    precision: str = _setting(
        "auto", "operands of the loss", " or ".join(PRECISIONS), PRECISIONS.__contains__
    )

    epochs: int = _whole(14, "passes over the training images", 1)
    batch_size: int = _whole(128, "images per step", 2)
    learning_rate: float = _positive(8e-3, "of the encoder, at its highest")
    prototype_learning_rate: float = _positive(5e-2, "of the class prototypes, at its highest")
    weight_decay: float = _not_negative(0.05, "of the encoder (AdamW)")
    warmup: float = _setting(
        0.05, "share of the steps in which learning rates rise", "a number in [0, 1)",
        lambda v: 0 <= v < 1,
    )  # fmt: skip
    augment: float = _setting(
        1.0, "strength of the random distortions, 0 for none", "a number in [0, 2]",
        lambda v: 0 <= v <= 2,
    )  # fmt: skip

    dims: tuple[int, ...] = _setting(
        (16, 32, 64, 128), "leading dimensions to evaluate at",
        "increasing whole numbers from 1 to embedding_size",
        lambda v: len(v) > 0 and v[0] >= 1 and list(v) == sorted(set(v)),
    )  # fmt: skip
    baselines: tuple[str, ...] = _setting(
        BASELINES, "what to compare with", f"some of {', '.join(BASELINES)}, or nothing",
        lambda v: set(v) <= set(BASELINES) and len(set(v)) == len(v),
    )  # fmt: skip
    evaluate_every: int = _whole(7, "epochs between evaluations, 0 for the end only", 0)
    checkpoint_every: int = _whole(200, "steps between checkpoints", 1)
    threads: int = _whole(0, "threads of torch, 0 for its own choice", 0)

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = _converted(setting, getattr(self, setting.name))
            if not setting.metadata["accepts"](value):
                raise _refusal(setting, value)
            object.__setattr__(self, setting.name, value)
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

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Settings by name; the ones that are not given have their default."""
        names = [setting.name for setting in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ConfigError(f"{name}: no such setting; {hint}There are {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and TOML have them: lists instead of tuples."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def to_toml(self) -> str:
        lines = []
        for setting in dataclasses.fields(self):
            value = json.dumps(self.to_dict()[setting.name])  # such values look alike in TOML
            lines.append(f"{setting.name} = {value}  # {setting.metadata['help']}\n")
        return "".join(lines)

    def differences(self, other: Config) -> list[str]:
        """One line for each setting that has another value in `other`."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{n}: {mine[n]} here, {theirs[n]} there" for n in mine if mine[n] != theirs[n]]


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, by name; `Config.from_mapping` checks them."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def setting_types() -> dict[str, Any]:
    """The type of each setting: int, float, str, or a tuple of one of them."""
    return get_type_hints(Config)


def parse_list(setting_type: Any, text: str) -> tuple:
    """A comma-separated list for a setting of type `tuple[item, ...]`; "" is the empty list."""
    item = get_args(setting_type)[0]
    return tuple(item(part) for part in text.split(",")) if text else ()


def _converted(setting: dataclasses.Field, value: Any) -> Any:
    """`value` in the type of the setting; TOML and the callers may write 1 for 1.0, a list for a
    tuple. Nothing else is converted: "3" is not a number, and True is not 1."""
    wanted = setting_types()[setting.name]
    if get_origin(wanted) is tuple:
        item = get_args(wanted)[0]
        if isinstance(value, (list, tuple)) and all(type(v) is item for v in value):
            return tuple(value)
    elif type(value) is wanted:
        return value
    elif wanted is float and type(value) is int:
        return float(value)
    raise _refusal(setting, value)


def _refusal(setting: dataclasses.Field, value: Any) -> ConfigError:
    value = list(value) if isinstance(value, tuple) else value
    return ConfigError(f"{setting.name}: got {value!r}, must be {setting.metadata['allowed']}")
