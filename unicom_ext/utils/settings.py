"""Settings of a command: one flat dataclass, from a TOML file and the command line.

Imports neither torch nor NumPy, so that the command line can show its options quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was given and what is allowed."""


def setting(default: Any, help: str, allowed: str, accepts: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"help": help, "allowed": allowed, "accepts": accepts})


def whole(default: int, help: str, at_least: int, at_most: int | None = None) -> Any:
    allowed = f">= {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    return setting(
        default,
        help,
        f"a whole number {allowed}",
        lambda v: v >= at_least and (at_most is None or v <= at_most),
    )


def positive(default: float, help: str) -> Any:
    return setting(default, help, "a finite number > 0", lambda v: 0 < v < math.inf)


def not_negative(default: float, help: str) -> Any:
    return setting(default, help, "a finite number >= 0", lambda v: 0 <= v < math.inf)


def rate(default: float, help: str) -> Any:
    return setting(default, help, "a number in (0, 1]", lambda v: 0 < v <= 1)


def one_of(default: str, help: str, choices: tuple[str, ...]) -> Any:
    allowed = " or ".join(choices)
    metadata = {"help": help, "allowed": allowed, "accepts": choices.__contains__}
    return field(default=default, metadata={**metadata, "choices": choices})


def switch(default: bool, help: str) -> Any:
    return setting(default, help, "true or false", lambda v: True)


@dataclass(frozen=True)
class Settings:
    """What the settings of every command share.

    Raises ConfigError on values that cannot be used.
    """

    def __post_init__(self) -> None:
        types = setting_types(type(self))
        for setting in dataclasses.fields(self):
            value = _converted(setting, types[setting.name], getattr(self, setting.name))
            if not setting.metadata["accepts"](value):
                raise _refusal(setting, value)
            object.__setattr__(self, setting.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Settings by name; the ones that are not given have their default."""
        check_names(values, [setting.name for setting in dataclasses.fields(cls)], "setting")
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

    def differences(self, other: Self, free: Collection[str] = ()) -> list[str]:
        """One line for each setting that has another value in `other`, but for those in `free`."""
        mine, theirs = self.to_dict(), other.to_dict()
        names = [n for n in mine if mine[n] != theirs[n] and n not in free]
        return [f"{n}: {mine[n]} here, {theirs[n]} there" for n in names]


def check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raises ConfigError for the first name that is not known."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{name}: no such {what}; {hint}There are {', '.join(known)}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, by name; `Config.from_mapping` checks them."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def setting_types(settings: type[Settings]) -> dict[str, Any]:
    """The type of each setting: int, float, str, bool, or a tuple of one of them."""
    return get_type_hints(settings)


def parse_list(setting_type: Any, text: str) -> tuple[Any, ...]:
    """A comma-separated list for a setting of type `tuple[item, ...]`; "" is the empty list."""
    item = get_args(setting_type)[0]
    return tuple(item(part) for part in text.split(",")) if text else ()


def _converted(setting: dataclasses.Field[Any], wanted: Any, value: Any) -> Any:
    """`value` in the type of the setting; TOML and the callers may write 1 for 1.0, a list for a
    tuple. Nothing else is converted: "3" is not a number, and True is not 1."""
    if get_origin(wanted) is tuple:
        item = get_args(wanted)[0]
        if isinstance(value, (list, tuple)) and all(type(v) is item for v in value):
            return tuple(value)
    elif type(value) is wanted:
        return value
    elif wanted is float and type(value) is int:
        return float(value)
    raise _refusal(setting, value)


def _refusal(setting: dataclasses.Field[Any], value: Any) -> ConfigError:
    value = list(value) if isinstance(value, tuple) else value
    return ConfigError(f"{setting.name}: got {value!r}, must be {setting.metadata['allowed']}")
