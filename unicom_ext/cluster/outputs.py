"""What a clustering leaves in its output directory: all of it, and nothing of the user's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from unicom_ext.cluster.pictures import PICTURES
from unicom_ext.data.labels import CLUSTERED, LABELS, POSITIVES
from unicom_ext.data.source import Source
from unicom_ext.utils.settings import ConfigError

CLUSTERS = CLUSTERED
STATE = "state"  # directory of what is needed to go on
STATE_FILE, PASSES, FINAL = "state.pt", ("pass-0", "pass-1"), "final"
PRUNING = "pruning"  # directory of what passes remember of each row, of use to their run only
UNFINISHED = "positives"  # directory of the positives until all are there


def written(output: Path, shards: Iterable[str]) -> list[Path]:
    """The files of a run over shards of these names. The state, without which none is known, is the
    last."""
    labels = [f"{kind}{name}.npy" for name in shards for kind in (LABELS, POSITIVES)]
    names = [*labels, "centroids.npy", *PICTURES]
    return [output / name for name in (*names, CLUSTERS, f"{STATE}/{STATE_FILE}")]


def remove_state(output: Path) -> list[str]:
    """Remove what an earlier run there would need to go on; returns the names of its shards."""
    names = shards_of(output)
    for directory in (
        *PASSES,
        FINAL,
        PRUNING,
        UNFINISHED,
        "coarse",
    ):  # the last is of version 0.1.0
        shutil.rmtree(output / STATE / directory, ignore_errors=True)
    return names


def remove_results(output: Path, shards: Iterable[str]) -> None:
    """Remove the results of an earlier run over shards of these names, but not the state, which is
    that of another run by now."""
    *results, _ = written(output, shards)
    for path in results:
        path.unlink(missing_ok=True)


def check_apart(output: Path, source: Source, read: list[Path]) -> None:
    """Raises ConfigError where the files of a run would lie among those that it reads.

    read: files besides the features that are read until the end.
    """
    own = output.resolve()
    features = [file.path for shard in source.shards for file in shard.files]
    if source.path.is_dir():
        # Where features are looked for: in a directory of those names it would hide the others.
        kinds = [(source.path / kind).resolve() for kind in ("img_emb", "text_emb")]
        if own == source.path.resolve() or {own, *own.parents} & {*kinds}:
            raise ConfigError(
                f"output: {output} is where the feature files of {source.path} lie, must be "
                "another directory"
            )
    # Those of an earlier run are removed.
    replaced = {path.resolve() for path in written(own, [*source.names, *shards_of(output)])}
    for path in (*features, *read):
        if (there := path.resolve()) in replaced or own / STATE in there.parents:
            raise ConfigError(f"output: {output} would have {path} overwritten")
    for path in features:
        if own == path.resolve().parent:
            raise ConfigError(
                f"output: {output} is where {path} lies, beside which labels would be taken for "
                "features, must be another directory"
            )


def shards_of(output: Path) -> list[str]:
    """The names of the shards of earlier runs. What cannot be read names none."""
    names: dict[str, None] = {}
    for read, path in ((_result, output / CLUSTERS), (_state, output / STATE / STATE_FILE)):
        try:
            names |= dict.fromkeys(shard["name"] for shard in read(path)["source"]["shards"])
        except Exception:  # not there, or spoilt, which is a reason to overwrite it
            continue
    return list(names)


def _result(path: Path) -> Any:
    return json.loads(path.read_text())


def _state(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
