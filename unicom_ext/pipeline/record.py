"""What a pipeline has done, in pipeline.json of its output directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from unicom_ext.encoders.contents import contents
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import digest_of, glimpse, write_file

RECORD = "pipeline.json"
FORMAT = "unicom_ext pipeline 1"
_PATHS = ("weights", "init")  # settings that are nothing but the name of a file


def key_of(step: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 of all that decides what a step makes.

    What weights and the like name counts by what is in it, and files wherever they lie.
    """
    files = contents(settings)
    if "init" in settings and (init := digest_of(Path(settings["init"]))):
        files["init"] = init
    values = {n: "" if n in _PATHS and n in files else value for n, value in settings.items()}
    text = json.dumps([step, version, values, files, dict(inputs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Record:
    """Which steps are whole, and what they were made of. Each change is on the disk at once.

    Raises SourceError where the file is none of a pipeline, or where directories of steps are there
    and no pipeline has made them.
    """

    def __init__(self, output: Path, directories: Collection[str]) -> None:
        self._output, self._path = output, output / RECORD
        self._steps: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            for name in directories:
                if (output / name).exists():
                    raise SourceError(
                        f"{output / name}: is there already, and not of a pipeline; name another "
                        "directory"
                    )
            return
        try:
            content = json.loads(self._path.read_text())
            if content["format"] != FORMAT:
                raise ValueError
            self._steps = content["steps"]
        except (OSError, ValueError, KeyError, TypeError):
            raise SourceError(f"{self._path}: is not what a pipeline has written") from None

    def is_whole(self, step: str, key: str, result: Path) -> bool:
        """Whether the step was finished with this key, and its result is still what it was."""
        entry = self._steps.get(step, {})
        found = _glimpse(result)
        return found is not None and (entry.get("key"), entry.get("result")) == (key, found)

    def is_begun(self, step: str, key: str) -> bool:
        """Whether what an unfinished step has left is of this key."""
        return self.is_of(step, key) and "result" not in self._steps[step]

    def is_of(self, step: str, key: str) -> bool:
        """Whether the step was finished, or begun, with this key."""
        return self._steps.get(step, {}).get("key") == key

    def last_whole(self, steps: Collection[str]) -> str | None:
        """The last of these steps that was finished."""
        return next((name for name in reversed([*steps]) if self._whole(name)), None)

    def keep(self, steps: Collection[str]) -> None:
        """Forget all other steps."""
        self._steps = {name: entry for name, entry in self._steps.items() if name in steps}
        self._write()

    def begin(self, step: str, key: str) -> None:
        self._steps[step] = {"key": key}
        self._write()

    def finish(self, step: str, result: Path, seconds: float) -> None:
        """seconds: that it took, without those of calls that were killed."""
        self._steps[step] |= {"result": _glimpse(result), "seconds": seconds}
        self._write()

    def _whole(self, step: str) -> bool:
        return self._steps.get(step, {}).get("result") is not None

    def _write(self) -> None:
        content = {"format": FORMAT, "steps": self._steps}
        text = json.dumps(content, indent=1).encode()
        write_file(self._path, lambda file: file.write(text))


def _glimpse(path: Path) -> str | None:
    return glimpse(path) if path.is_file() else None
