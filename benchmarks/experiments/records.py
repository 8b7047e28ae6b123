"""A file of results, a line of JSON for each, that may be left at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that was cut short."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise click.ClickException(f"{path}, line {number}: is not JSON: {error}") from error
    return records


class Records:
    """The file, open for one process alone; a line that was cut short is removed from it.

    Raises click.ClickException where another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise click.ClickException(f"{path}: another process is writing to it") from None
        try:
            self.all = read(path)
        except click.ClickException:
            self._file.close()
            raise
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.all.append(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
