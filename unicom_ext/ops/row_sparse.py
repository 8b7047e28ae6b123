"""Row-sparse gradients: what they are made of, and a word to optimizers that do not take them."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


def row_sparse(
    rows: Tensor,
    class_index: Tensor | None,
    count: Tensor | None,
    shape: torch.Size,
    num_centers: int = 1,
) -> Tensor:
    """Rows [n * num_centers, d] of a gradient [C * num_centers, d] as a COO tensor.

    They are those of the classes `class_index` [n], of which `count` are valid; None: of all.

    Past `count` the last id is repeated with zero rows. They are cut off on the CPU, where the
    count is at hand; elsewhere reading it would make the host wait, so they stay, and so they do in
    compiled graphs, where it would be a shape that depends on data. Where the count is 0 (a
    rank that drew no class), that is a single row's id, with zeros; after a compiled step an
    optimizer cannot tell it from a class that was sampled and has no gradient.
    """
    _refuse_dense_optimizers()
    if class_index is None:
        ids = torch.arange(shape[0], device=rows.device)
    else:
        ids, count = _of_centers(class_index, count, num_centers)
    traced = type(ids) is not Tensor
    padded = count is not None
    if count is not None and count.device.type == "cpu" and not traced:
        ids, rows, padded = ids[:count], rows[:count], False
    if not traced:
        _note_merged(ids, count if padded else None)
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), rows, shape, is_coalesced=not padded, check_invariants=False
    )


def _of_centers(
    class_index: Tensor, count: Tensor | None, num_centers: int
) -> tuple[Tensor, Tensor | None]:
    """Ids of the prototypes of classes, and how many of them are valid."""
    if num_centers == 1:
        return class_index, count
    center = torch.arange(num_centers, device=class_index.device)
    ids = (class_index[:, None] * num_centers + center).flatten()
    if count is None or not len(ids):
        return ids, count
    count = count * num_centers
    place = torch.arange(len(ids), device=ids.device)
    return torch.where(place < count, ids, ids[-1]), count  # so that equal ones are neighbours


def _note_merged(ids: Tensor, count: Tensor | None) -> None:
    """Note that in a gradient with these ids there is nothing to add up: they ascend, and where
    one repeats, only the first has a row that is not zero.

    Autograd makes another tensor of a gradient, which knows nothing of the first, but keeps the
    memory of its ids. So that is where it is noted. What is accumulated or copied has memory of
    its own, and nothing is known of it.
    """
    storage: Any = ids.untyped_storage()
    storage._unicom_merged = len(ids), count


def merged_gradient(ids: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """A COO tensor of what `merge_rows` of unicom_ext.optim returns."""
    _note_merged(ids, None)
    # On the CPU merged ids are distinct; elsewhere they may repeat.
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0),
        rows,
        shape,
        is_coalesced=ids.device.type == "cpu",
        check_invariants=False,
    )


def is_merged(gradient: Tensor) -> bool:
    """Whether it is known, without a look at the ids, that there is nothing to add up."""
    return gradient.is_coalesced() or _note(gradient)[0] == gradient._nnz()


def merged_ids(gradient: Tensor) -> Tensor:
    """The ids [n] of a gradient that `is_merged`; -1 instead of padding without an id."""
    ids, (_, count) = gradient._indices()[0], _note(gradient)
    return ids if count is None else ids.masked_fill(count == 0, -1)


def _note(gradient: Tensor) -> tuple[int | None, Tensor | None]:
    storage = gradient._indices().untyped_storage()
    return getattr(storage, "_unicom_merged", (None, None))


class Updater(Protocol):
    """What backward calls for a parameter instead of making its gradient.

    param: the parameter.
    pending: a backward has updated the parameter, and the optimizer's step has yet to come.
    nodes: of the graphs that are alive, those whose backward calls this.
    """

    param: Tensor
    pending: bool
    nodes: WeakSet[Any]

    def __call__(
        self, grad_loss: Tensor, operands: tuple[Any, ...], node: Any
    ) -> tuple[Tensor, Tensor]:
        """Update, and return the gradient of the embeddings and what that of the scale needs.

        operands: what the operator takes after grad_loss and before the optimizer's state.
        node: of the graph, which calls.
        """


# By the id of the parameter, which the updater keeps alive. An attribute of the parameter would be
# copied and saved with it, and with it the optimizer.
_updaters: WeakValueDictionary[int, Updater] = WeakValueDictionary()


def attach(param: Tensor, updater: Updater | None) -> None:
    """Let backward call `updater`, as long as it lives, instead of returning the gradient."""
    if updater is None:
        _updaters.pop(id(param), None)
    else:
        _updaters[id(param)] = updater


def updater_of(param: Tensor) -> Updater | None:
    return _updaters.get(id(param))


# Of torch's optimizers these take sparse gradients. All others raise at one in the middle of a
# step, when the groups before it have been moved, and some recommend SparseAdam. A gradient does
# not know its reader, nor a parameter its optimizer: only a hook that all optimizers call can say
# so in time. It is there once a sparse gradient has been made.
_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam, torch.optim.LBFGS)


@cache
def _refuse_dense_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_sparse)


def _refuse_sparse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    kind = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim."))
    if kind is torch.optim.Optimizer or kind in _TAKE_SPARSE:  # the former: not torch's own
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(
                    f"{type(optimizer).__name__} takes no sparse gradients, and a parameter of "
                    f"shape {list(param.shape)} has one. Use unicom_ext.optim.RowAdamW or RowSGD, "
                    "which can hold the dense parameters too, or a loss with sparse_grad=False. "
                    "Nothing has been updated"
                )
