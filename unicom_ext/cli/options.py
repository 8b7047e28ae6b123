"""Options of commands out of `Settings`, and settings out of what was given for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from unicom_ext.utils.settings import ConfigError, Settings, parse_list, setting_types

Command = Callable[..., Any]


def setting_options(settings: type[Settings]) -> Callable[[Command], Command]:
    """One option for each setting, None where it is not given."""

    def decorate(command: Command) -> Command:
        types = setting_types(settings)
        for setting in reversed(dataclasses.fields(settings)):
            wanted, default = types[setting.name], setting.default
            is_list = isinstance(default, tuple)
            shown = ",".join(map(str, default)) if is_list else default
            choices = setting.metadata.get("choices")
            command = click.option(
                f"--{setting.name.replace('_', '-')}",
                type=str if is_list else wanted,
                metavar="LIST" if is_list else choices and f"[{'|'.join(choices)}]",
                help=f"{setting.metadata['help']}  [default: {shown}]",
            )(command)
        return command

    return decorate


def given_settings(settings_type: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line, by name, lists parsed.

    Raises ConfigError on what is not a list.
    """
    types = setting_types(settings_type)
    settings = {}
    for name, value in given.items():
        if value is None:
            continue
        default = getattr(settings_type, name)
        if isinstance(default, tuple):
            try:
                value = parse_list(types[name], value)
            except ValueError:
                raise ConfigError(
                    f"{name}: got {value!r}, must be a comma-separated list such as "
                    f"{','.join(map(str, default))}"
                ) from None
        settings[name] = value
    return settings


def counts(name: str, text: str) -> tuple[int, ...]:
    """A comma-separated list of the option `name`; raises ConfigError on anything else."""
    try:
        numbers = parse_list(tuple[int, ...], text)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(
            f"{name}: got {text!r}, must be a comma-separated list of whole numbers, each at "
            "least 1"
        )
    return numbers
