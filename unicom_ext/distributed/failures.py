"""A rank that cannot go on makes every rank raise, and none wait for it.

Between steps `agree` says who failed and why; it sends Python objects, and is slow. Within a step
of the loss see `Failures`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankFailed(RuntimeError):
    """Another rank raised or died; the message says which, and why as far as is known."""


def agree(
    settings: Mapping[str, object], failure: Exception | None, group: dist.ProcessGroup | None
) -> None:
    """Raise on every rank if one has failed, or if the settings differ between ranks.

    Slow (it sends Python objects): for construction, checkpoints, and to say what went wrong.

    Args:
        settings: by name, whatever can be pickled and compared.
        failure: what has gone wrong on this rank, or None.
        group: whose ranks all call this; None for one process alone.

    Raises:
        Exception: `failure`, on the rank that gave it.
        RuntimeError: another rank has failed; it names the rank and repeats its words.
        ValueError: the settings differ; it names the first that does.
    """
    reports = words_of_all(dict(settings), failure, group)
    for name in settings:
        check_same(name, [theirs.get(name) for theirs in reports])


def words_of_all(
    word: object, failure: BaseException | None, group: dist.ProcessGroup | None
) -> list[Any]:
    """Each rank's `word`, in rank order; or raise on every rank if one has failed."""
    reports = exchange(word, failure, group)
    for rank, (reason, _) in enumerate(reports):
        if reason is not None:
            raise RankFailed(f"rank {rank} of the process group raised {reason}")
    return [theirs for _, theirs in reports]


def exchange(
    word: object, failure: BaseException | None, group: dist.ProcessGroup | None
) -> list[tuple[str | None, Any]]:
    """What failed on each rank, None where nothing did, and each rank's `word`.

    Raises this rank's failure, when the others know of it.
    """
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    reports: list[Any] = [(reason, word)]
    if group is not None:
        reports *= dist.get_world_size(group)
        dist.all_gather_object(reports, reports[0], group=group)
    if failure is not None:
        raise failure
    return reports


def check_same(name: str, values: list[object]) -> None:
    """ValueError unless the ranks' values are the same, with which rank has which."""
    if all(value == values[0] for value in values):
        return
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    listed = ", ".join(
        f"{value} on rank{'s' if len(of) > 1 else ''} {', '.join(of)}"
        for value, of in ranks.items()
    )
    raise ValueError(f"{name} must be the same on every rank, got {listed}")


def _host_sees(device: torch.device) -> bool:
    """Whether the host can read a number there without waiting for what was queued before it."""
    return device.type == "cpu"


class Failures:
    """What went wrong on a rank within a step of the loss, until every rank has raised.

    No rank leaves a step in its middle. One that fails (bad arguments, no memory) goes on with
    nothing to contribute and counts itself, in a number that is summed along with the softmax. What
    is not zero if ranks do not agree about the step is added to it.

    - On CPUs the host then looks at the number, and all raise.
    - On CUDA looking would make the host wait. The step ends with the loss NaN and all gradients
      zero, backward included, and every rank raises at the beginning of the next step (or of
      `checkpoint.save`), when the number has long been there. The rank that failed warns at once.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)  # which has threads that must not outlive it
        self.own: Exception | None = None
        # Which have updated what the ranks share; an int64 scalar where only a device knows.
        self.optimizer_steps: int | Tensor = 0
        self._count: Tensor | None = None  # on the host, of what went wrong in the last step
        self._settings: Callable[[], Mapping[str, object]] = dict  # of that step
        self._arrival: torch.cuda.Event | None = None

    def keep(self, error: Exception, device: torch.device) -> None:
        """This rank has failed in this step."""
        self.own = error
        if not _host_sees(device):
            rank = dist.get_rank(self._group())
            warnings.warn(
                f"{type(error).__name__}: {error} (on rank {rank}; every rank raises when it calls "
                "the loss again)",
                stacklevel=2,
            )

    @contextmanager
    def kept(self, device: torch.device) -> Iterator[None]:
        """`keep` what is raised within."""
        try:
            yield
        except Exception as error:
            self.keep(error, device)

    def settle(self, count: Tensor, settings: Callable[[], Mapping[str, object]]) -> None:
        """Raise on every rank if one has failed in this step, or they do not agree: now, or in
        `raise_earlier`.

        count: float64 scalar, not 0 where it is so.  settings: in what ranks must agree.
        """
        self._settings = settings
        if _host_sees(count.device):
            if count > 0:
                self._raise()
        elif count.device.type == "cuda":
            if not torch.cuda.is_current_stream_capturing():
                self._count = torch.empty((), dtype=count.dtype, pin_memory=True)
                self._count.copy_(count, non_blocking=True)
                self._arrival = torch.cuda.Event()
                self._arrival.record()
        else:
            self._count = count

    def raise_earlier(self) -> None:
        """Raise on every rank if one has failed in the step before."""
        if self._count is None or (
            self._arrival is not None and torch.cuda.is_current_stream_capturing()
        ):
            return
        count, self._count = self._count, None
        if self._arrival is not None:
            self._arrival.synchronize()  # for forward only, which is a backward pass ago
        if count > 0:
            self._raise()

    def _raise(self) -> None:
        own, self.own = self.own, None
        self.optimizer_steps = 0  # which was said, if they differ: what comes after begins anew
        agree(self._settings(), own, self._group())


_failures: weakref.WeakKeyDictionary[dist.ProcessGroup, Failures] = weakref.WeakKeyDictionary()


def failures_of(group: dist.ProcessGroup) -> Failures:
    return _failures.setdefault(group, Failures(group))
