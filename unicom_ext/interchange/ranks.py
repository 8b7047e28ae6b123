"""Files of ranks: whether they are one head of one run, with every rank there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicom_ext.interchange.files import OPTIMIZER, SCHEDULER, File, beside
from unicom_ext.interchange.rows import class_counts
from unicom_ext.utils.files import CheckpointError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # each rank has its own
# Parameters are the same on all ranks but for what the order of a sum may do; those of other runs
# differ in the first digit.
_SAME = 1e-3


@dataclass(frozen=True)
class Head:
    """The files of one head in rank order, those of one rank put together; counts: its classes."""

    files: list[File]
    counts: list[int]

    @property
    def weight(self) -> Tensor:
        """Of the first rank."""
        return self.files[0].rows["weight"].whole


def in_order(files: Sequence[File]) -> Head:
    """Check that files of ranks belong together.

    Raises CheckpointError: a rank is missing or there twice, or they are of different runs.
    """
    by_rank = _by_rank(files)
    _check_complete(by_rank, [file.path for file in files])
    ranks = [by_rank[rank] for rank in range(len(by_rank))]
    first = ranks[0]
    for other in ranks[1:]:
        _check_same(first, other)
    counts = []
    for file in ranks:
        weight = file.rows["weight"].whole
        for name, rows in file.rows.items():
            if rows.whole.shape != weight.shape:
                raise CheckpointError(
                    f"{file.path}: {name} is {list(rows.whole.shape)}, must be "
                    f"{list(weight.shape)} as the prototypes"
                )
        counts.append(len(weight))
    if counts != class_counts(sum(counts), len(counts)):
        raise CheckpointError(
            f"{_listed([file.path for file in ranks])}: have {counts} classes, but PartialFC gives "
            f"C // n to each of n ranks and one more to the first C % n: of {sum(counts)} classes "
            f"{class_counts(sum(counts), len(counts))}. Are files of several runs among them?"
        )
    _check_no_copies(ranks)
    return Head(ranks, counts)


def _check_no_copies(files: Sequence[File]) -> None:
    """Raises CheckpointError where two ranks have the same prototypes."""
    by_first: dict[bytes, File] = {}
    for file in files:
        weight = file.rows["weight"].whole
        if len(weight) == 0:
            continue
        twin = by_first.setdefault(bytes(_bytes(weight[0]).tolist()), file)
        if twin is not file and torch.equal(_bytes(twin.rows["weight"].whole), _bytes(weight)):
            raise CheckpointError(
                f"{twin.path} and {file.path} have the same prototypes: is one a copy of the other?"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _by_rank(files: Sequence[File]) -> dict[int, File]:
    by_rank: dict[int, File] = {}
    for file in files:
        if file.rank is None and {other.path for other in files} != {file.path}:
            raise CheckpointError(
                f"{file.path}: its name does not say of which rank it is, as "
                f"{file.path.stem}_gpu_0{file.path.suffix} would"
            )
        rank = file.rank or 0
        there = by_rank.get(rank)
        if there is None:
            by_rank[rank] = File(
                file.path, file.kind, rank, dict(file.rows), file.trainer, file.encoder
            )
        elif there.rows.keys() & file.rows.keys():
            raise CheckpointError(f"{there.path} and {file.path} are both of rank {rank}")
        else:  # the oldest have the momentum in a file of its own
            there.rows.update(file.rows)
    return by_rank


def _check_complete(by_rank: dict[int, File], given: Sequence[Path]) -> None:
    paths = [by_rank[rank].path for rank in sorted(by_rank)]
    missing = [rank for rank in range(max(by_rank) + 1) if rank not in by_rank]
    if missing:
        raise CheckpointError(
            f"{_listed(paths)}: are of the ranks {', '.join(map(str, sorted(by_rank)))}; "
            f"{_ranks(missing)} missing"
        )
    for rank, file in by_rank.items():
        if "weight" not in file.rows:
            raise CheckpointError(f"{file.path}: the weight of rank {rank} is missing beside it")
    resolved = {path.resolve() for path in given}
    others = {path.resolve(): path for like in given for path in beside(like)}
    left_out = [path for there, path in others.items() if there not in resolved]
    if left_out:
        raise CheckpointError(
            f"{_listed(left_out)}: beside the files that are given, but not among them; without "
            "them their classes would be lost"
        )


def _check_same(first: File, other: File) -> None:
    here, there = _facts(first), _facts(other)
    for what in {**here, **there}:
        if not same(here.get(what), there.get(what)):
            raise CheckpointError(
                f"{first.path} and {other.path} are not of one run: {what} is {here.get(what)} "
                f"and {there.get(what)}"
            )
    for name, value in first.encoder.items():
        if value.is_floating_point() and not name.endswith(STATISTICS) and value.numel():
            ours, theirs = (v.detach().float().nan_to_num() for v in (value, other.encoder[name]))
            if not (ours - theirs).abs().max() <= _SAME * ours.abs().max():
                raise CheckpointError(
                    f"{first.path} and {other.path} are not of one run: {name} of the backbone "
                    "differs"
                )


def _facts(file: File) -> dict[str, Any]:
    """What the files of all ranks have in common, by what it is called in messages."""
    weight = file.rows["weight"].whole
    facts: dict[str, Any] = {
        "what they hold": ", ".join([*sorted(file.rows), *sorted(file.trainer)]),
        "the embedding size": weight.shape[1],
        **{f"the dtype of {name}": rows.whole.dtype for name, rows in file.rows.items()},
    }
    for key, value in file.trainer.items():
        if key == SCHEDULER:
            facts |= {f"{name} of the scheduler": v for name, v in value.items()}
        elif key == OPTIMIZER:
            for number, group in enumerate(optimizer_groups(file)):
                of_group = {**group, "the number of parameters": len(group["params"])}
                del of_group["params"]
                facts |= {
                    f"{name} of the optimizer's group {number}": v for name, v in of_group.items()
                }
        else:
            facts[key] = value
    return facts | {f"{name} of the backbone": list(v.shape) for name, v in file.encoder.items()}


def optimizer_groups(file: File) -> list[dict[str, Any]]:
    """The groups in a trainer's file.

    Raises CheckpointError: the state is not that of an optimizer of torch.
    """
    optimizer = file.trainer[OPTIMIZER]
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    is_state = isinstance(state, dict) and isinstance(groups, list) and groups
    if not is_state or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError(
            f"{file.path}: {OPTIMIZER} holds {', '.join(map(str, optimizer)) or 'nothing'}, must "
            "hold state and param_groups as the state dict of an optimizer of torch does"
        )
    numbers = [number for group in groups for number in group["params"]]
    if not all(isinstance(n, int) for n in numbers) or len(set(numbers)) < len(numbers):
        raise CheckpointError(
            f"{file.path}: the optimizer's groups have the parameters {numbers}, must have a "
            "number for each"
        )
    for number, of_param in state.items():
        if number not in numbers or not isinstance(of_param, dict):
            raise CheckpointError(
                f"{file.path}: the optimizer has a {type(of_param).__name__} as the state of "
                f"{number!r}, must have a dict, for parameters of its groups alone"
            )
    return groups


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} " + (
        "is" if len(numbers) == 1 else "are"
    )


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def same(a: Any, b: Any) -> bool:
    """Whether two values of a state are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b) or bool(a != a and b != b)  # NaN
