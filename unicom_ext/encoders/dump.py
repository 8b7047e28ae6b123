"""The directory of a dump of features, and how new files take the place of earlier ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unicom_ext.data.labels import TRUE_LABELS
from unicom_ext.data.source import ENCODER, EXTRACTED
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import list_files, natural_key, write_file
from unicom_ext.utils.settings import ConfigError

SHARD_ROWS = 10_000
FACTS = EXTRACTED
LABELS, THUMBNAILS = TRUE_LABELS, "images.npy"
NEW = "extract.tmp"  # where files are until all are whole
_NAME = (
    r"(img_emb/img_emb|text_emb/text_emb)_[0-9]{4,}\.npy|metadata/metadata_[0-9]{4,}\.jsonl|"
    + "|".join(map(re.escape, (LABELS, THUMBNAILS, ENCODER)))
)
FREE_TO_CHANGE = ("device", "workers")  # which do not change the features


def shard_name(kind: str, number: int) -> str:
    ending = "jsonl" if kind == "metadata" else "npy"
    return f"{kind}/{kind}_{number:04d}.{ending}"


class Dump:
    """New files are written to `new`, where a killed call finds them again, and all moved in at
    last. What an earlier call has written stays until then.

    Args:
        output: the directory.
        facts: settings and data of the features.
        files: their names.

    Raises SourceError where files that are not of an earlier dump are in the way, or lie among its
    shards.
    """

    def __init__(self, output: Path, facts: dict[str, Any], files: Sequence[str]) -> None:
        self.output, self.new = output, output / NEW
        self.facts, self.files = facts, files
        self._earlier = self._earlier_files()

    def finished(self, overwrite: bool) -> dict[str, Any] | None:
        """The facts of these features if they are there already, after the last move where it was
        killed in that.

        Raises SourceError where there are others, unless they are to be overwritten.
        """
        there = _read(self.output / FACTS)
        if there is not None and not overwrite:
            if found := _differences(there, self.facts):
                raise SourceError(
                    f"{self.output / FACTS}: is of other features ({'; '.join(found)}); overwrite "
                    "them, or name another directory"
                )
            if _read(self.new / FACTS) is None and self._whole:
                return there
        begun = _read(self.new / FACTS)
        if begun is None or _differences(begun, self.facts) or "files" not in begun:
            return None
        return self._move_in(begun)

    @property
    def _whole(self) -> bool:
        """Whether all files are there: who deletes some wants them anew."""
        return all((self.output / name).exists() for name in self.files)

    def begin(self) -> None:
        """Make room for new files, or keep those of a killed call for the same features."""
        begun = _read(self.new / FACTS)
        if begun is not None and not _differences(begun, self.facts):
            return
        shutil.rmtree(self.new, ignore_errors=True)
        for name in self.files:
            (self.new / name).parent.mkdir(parents=True, exist_ok=True)
        _write(self.new / FACTS, self.facts)

    def end(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Put the new files, all of which are whole, in the place of the earlier ones. Returns what
        extract.json holds: `facts`, and the names of the files. Raises SourceError where one of
        them is gone."""
        for name in self.files:
            if not (self.new / name).exists():
                raise SourceError(f"{self.new / name}: is not there any more")
        whole = {**self.facts, **facts, "files": list(self.files), "earlier": self._earlier}
        _write(self.new / FACTS, whole)
        return self._move_in(whole)

    def _move_in(self, facts: dict[str, Any]) -> dict[str, Any]:
        """May be repeated after a kill."""
        earlier = facts.pop("earlier")
        for name in earlier:
            if (self.new / name).exists() or name not in facts["files"]:
                (self.output / name).unlink(missing_ok=True)
        for name in facts["files"]:
            (self.output / name).parent.mkdir(exist_ok=True)
            if (self.new / name).exists():
                (self.new / name).rename(self.output / name)
        _write(self.output / FACTS, facts)
        shutil.rmtree(self.new)
        return facts

    def _earlier_files(self) -> list[str]:
        """The names of the files of an earlier dump, and of one that is being moved in."""
        there = {self.output / name for name in self.files if (self.output / name).exists()}
        for kind in ("img_emb", "text_emb"):
            if (self.output / kind).is_dir():
                there.update(list_files(self.output / kind, ".npy", f"{kind}_"))
        names = _listed(self.output / FACTS)
        moving = (_read(self.new / FACTS) or {}).get("files", [])
        strange = there - {self.output / name for name in (*names, *moving)}
        for path in sorted(strange, key=natural_key):
            raise SourceError(f"{path}: is there already, and not of an earlier dump")
        return names


def _listed(path: Path) -> list[str]:
    """The names in the list of an earlier dump; none where there is no list."""
    if not path.exists():
        return []
    names = (_read(path) or {}).get("files")
    if not isinstance(names, list) or not all(re.fullmatch(_NAME, str(name)) for name in names):
        raise SourceError(f"{path}: is there already, and not of an earlier dump")
    return names


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What two sets of facts differ in."""
    mine = ExtractConfig.from_mapping(here["config"])
    try:
        theirs = ExtractConfig.from_mapping(there["config"])
    except (ConfigError, KeyError, TypeError):
        return ["other settings"]
    if found := mine.differences(theirs, FREE_TO_CHANGE):
        return found
    if (data := there.get("data")) != here["data"]:
        return [f"other images: {here['data']} here, {data} there"]
    contents, own = there.get("contents", {}), here["contents"]
    changed = [n for n in sorted(contents.keys() | own.keys()) if contents.get(n) != own.get(n)]
    return [f"{'a caption' if n == 'captions' else f'what {n} names'} has changed" for n in changed]


def _read(path: Path) -> dict[str, Any] | None:
    """None where it is not there."""
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise SourceError(f"{path}: is there already, and not of an earlier dump")
    return facts


def _write(path: Path, facts: dict[str, Any]) -> None:
    content = json.dumps(facts, indent=1).encode()
    write_file(path, lambda file: file.write(content))
