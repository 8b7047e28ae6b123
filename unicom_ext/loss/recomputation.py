"""Activation checkpointing: a call that backward repeats draws what it drew at first.

`torch.utils.checkpoint` runs a part of a model once more in backward, and its gradients are those
of the second run. It restores torch's own random states, but the selections of the loss depend on
a step, which has gone on since. So each call that may be repeated is noted with the step it drew
for, as long as its graph lives, and a call in backward looks for the one that it repeats.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from unicom_ext.ops.counter import MUST_DRAW_AGAIN

_KEPT = 1024  # calls of each loss whose graphs live


@dataclass(frozen=True, eq=False)
class _Draw:
    """The step that one call drew for, and how to know that call again."""

    step: Tensor
    graph: ref[Any]  # dead when the graph is
    labels: Tensor
    labels_version: int
    embeddings: ref[Tensor]  # whose memory checkpointing wants to save
    embeddings_version: int

    def has_labels(self, labels: Tensor) -> bool:
        mine = self.labels
        if mine._version != self.labels_version or mine.shape != labels.shape:
            return False
        return _is_same(mine, labels) or bool((mine == labels).all())

    def has_embeddings(self, embeddings: Tensor) -> bool:
        mine = self.embeddings()
        return (
            mine is not None
            and mine._version == self.embeddings_version
            and _is_same(mine, embeddings)
        )


_draws: WeakKeyDictionary[nn.Module, deque[_Draw]] = WeakKeyDictionary()


def note(loss: nn.Module, embeddings: Tensor, labels: Tensor, step: Tensor) -> None:
    """Remember the step of this call of the loss, if it may be repeated.

    Checkpointing intercepts what is saved for backward. Each time it does so with new functions,
    of which the graph holds on to one, and nobody else does.
    """
    hooks = _saving_hooks()
    if hooks is None:
        return
    try:
        graph = ref(hooks[1])
    except TypeError:  # hooks of somebody else: checkpointing's are plain functions
        return
    draws = _draws.get(loss, ())
    living = deque((draw for draw in draws if draw.graph() is not None), maxlen=_KEPT)
    living.append(
        _Draw(
            step.clone(),
            graph,
            labels,
            labels._version,
            ref(embeddings),
            embeddings._version,
        )
    )
    _draws[loss] = living


def repeated_step(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The step that the call drew for which backward now repeats.

    It is known by its labels; where several calls had the same, by embeddings that came from
    outside of what is checkpointed.

    Raises:
        RuntimeError: it cannot be told which call that was.
    """
    found = [draw for draw in _draws.get(loss, ()) if draw.graph() is not None]
    other_kind = _saving_hooks() is None  # of checkpointing, of which we have noted no call
    if other_kind:
        found = []
    found = [draw for draw in found if draw.has_labels(labels)]
    found = [draw for draw in found if draw.has_embeddings(embeddings)] or found
    if len(found) != 1:
        raise RuntimeError(
            f"{MUST_DRAW_AGAIN}, but {len(found) or 'none'} of the calls that may be repeated had "
            "these labels. Give step= to the call that is checkpointed, another number each time; "
            + ("or checkpoint with use_reentrant=False; " if other_kind else "")
            + "or leave the loss out, it keeps no logits"
        )
    return found[0].step


def _saving_hooks() -> Any:
    """What intercepts tensors that are saved for backward; None where nothing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same memory; also where one is the other's `detach()`."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a._version == b._version
        and a.device == b.device
    )
