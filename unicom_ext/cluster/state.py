"""What a clustering needs to go on, in `state/state.pt` of its output directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unicom_ext.cluster.config import FREE_TO_CHANGE, ClusterConfig
from unicom_ext.cluster.sums import shift_for
from unicom_ext.data.source import Source
from unicom_ext.utils.files import CheckpointError, glimpse, write_file

FORMAT = "unicom_ext clustering state 1"


def fresh(config: ClusterConfig, source: Source) -> dict[str, Any]:
    """The state before the first pass. Later it has, too:

    centroids          fp32 [k, d] after the last pass
    earlier            names of the shards of a run that this one overwrites
    sums, counts       minibatch: of all rows so far, `UnitSums` with room for these passes' rows
    coarse, first      two-level: the coarse centroids, and the first centroid of each cell
    """
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "source": source.describe(),
        "contents": _contents(source),
        "passes": [],
    }


def save(path: Path, state: dict[str, Any]) -> None:
    write_file(path, lambda file: torch.save(state, file))


def load(path: Path, config: ClusterConfig, source: Source) -> dict[str, Any]:
    """Raises CheckpointError where there is no state, or one of another run."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is nothing to resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts raise
        reason = str(error).strip().split("\n")[0] or "it is empty or cut off"
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a {FORMAT}")
    differences = [
        text
        for text in config.differences(ClusterConfig.from_mapping(state["config"]))
        if text.partition(":")[0] not in FREE_TO_CHANGE
    ]
    if differences:
        raise CheckpointError(f"{path}: is of other settings: {'; '.join(differences)}")
    if config.method == "two-level" and ("first" not in state or "sizes" in state):
        raise CheckpointError(f"{path}: is of version 0.1.0, which made two levels in another way")
    contents = _contents(source)
    then = state.get("contents", contents)  # an older version has saved none
    # By its contents a file is known wherever it lies.
    known, here = dict(state["source"]), source.describe()
    if "contents" in state:
        known["path"] = here["path"]
    if known != here or len(then) != len(contents):
        raise CheckpointError(f"{path}: is of other feature files, or they have changed")
    for file, before, now in zip(source.files, then, contents, strict=True):
        if before != now:
            raise CheckpointError(f"{path}: is of other features: {file} has changed since")
    if "sums" in state and state["sums"].is_floating_point():  # they were doubles once
        unit = 2.0 ** shift_for(len(state["passes"]) * source.rows)
        state["sums"] = (state["sums"] * unit).round().long()
    return {**state, "config": config.to_dict(), "source": here, "contents": contents}


def _contents(source: Source) -> list[str]:
    return [glimpse(file) for file in source.files]
