"""The part of the loss that owns the prototypes: how they begin, are saved and loaded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch
from torch import Tensor

from unicom_ext.distributed.failures import failures_of
from unicom_ext.loss import checks
from unicom_ext.loss.options import LossOptions
from unicom_ext.loss.prototypes import fill_prototypes
from unicom_ext.loss.standing_still import StandingStill
from unicom_ext.loss.watching import watch
from unicom_ext.loss.wrapping import NeverWrapped

if TYPE_CHECKING:
    from unicom_ext.distributed.shard import ClassShard

_BY_HF = "_is_hf_initialized"


class PrototypeOwner(NeverWrapped):
    """A module with a prototype for each class, or for those of this rank.

    weight: Parameter [C * K, d], or of this rank's classes.  step: int64 scalar buffer.
    seed: of the initial prototypes.  shard: this rank's classes, None without a process group.
    num_classes, embedding_size: C, d.  options: what they are for.
    """

    weight: torch.nn.Parameter
    step: Tensor
    seed: int
    shard: ClassShard | None
    num_classes: int
    embedding_size: int
    options: LossOptions
    _was_meta = False  # whether weight and step may be what memory held before
    # Values of a weight that has left the meta device, as the memory was then. While they are the
    # same nobody has written it.
    _memory: Tensor | None = None
    _given = False  # whether that memory was put in place from outside
    full_state_dict = False  # of losses that were pickled whole before there was one

    def __init__(self) -> None:
        super().__init__()
        self._standing_still = StandingStill()
        self._enlist()

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.setdefault("_standing_still", StandingStill())
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._enlist()

    def _enlist(self) -> None:
        _owners.add(self)
        watch(self)

    @property
    def draws(self) -> bool:
        """Whether a step of training uses some classes or dimensions only."""
        return False

    @property
    def _start(self) -> int:
        """The first class whose prototypes are here."""
        return 0 if self.shard is None else self.shard.start

    @property
    def _num_rows(self) -> int:
        """How many prototypes are here."""
        classes = self.num_classes if self.shard is None else len(self.shard)
        return classes * self.options.num_centers

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the initial prototypes and to step 0.

        To be called after `to_empty` where the loss was made on the meta device; in the models of
        Hugging Face from `_init_weights`.
        """
        if "weight" not in self._parameters:
            raise RuntimeError(
                "reset_parameters() cannot reset a weight that weight_norm, parametrize or prune "
                "has made a function of other parameters; remove that first"
            )
        fill_prototypes(self.weight, self._start * self.options.num_centers, self.seed)
        self._step_beside_weight()
        self.step.zero_()
        self._memory, self._was_meta = None, self.weight.is_meta

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        stored = self._stored()
        lost = stored.is_meta or self._is_unwritten() or not _keeps_values(fn, stored.device)
        lost_step = self.step.is_meta or not _keeps_values(fn, self.step.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if lost:
            self._mark_memory()
            self._was_meta = True
        if self.step.is_meta:
            self._was_meta = True
        elif lost_step:
            with torch.no_grad():
                self.step.zero_()  # `to_empty` leaves what was in the memory before
        return self

    def _stored(self) -> Tensor:
        """The weight, or the first of the parameters that weight_norm or the like makes it of."""
        weight = self._parameters.get("weight")
        return next(self.parameters(), self.step) if weight is None else weight

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Called for each parameter that is put in place, by whomever."""
        before = self._parameters.get("weight")
        super().register_parameter(name, param)
        if name == "weight" and before is not None:
            self._memory = None
            if before.is_meta:
                self._note_memory()
                self._given = self._was_meta = True

    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_initialized_by_hf", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Hugging Face's models set it when they have filled what was missing in a file, by
        `_init_weights`, where few think of the step. What was in the file is marked so too."""
        if value and self._memory is not None and not getattr(self.step, _BY_HF, False):
            with torch.no_grad():
                self.step.zero_()
        self._initialized_by_hf = value

    def _note_memory(self) -> None:
        weight = self._stored().detach()
        self._memory = None if weight.is_meta or not weight.numel() else weight[0].clone()
        self._given = False

    def _mark_memory(self) -> None:
        """Of a weight without values, so that it is known again: memory may hold any, as zeros."""
        weight = self._stored().detach()
        if not weight.is_meta and weight.numel():
            weight[0] = torch.nan
        self._note_memory()

    def _is_unwritten(self) -> bool:
        """Whether the weight is what memory held before. A tensor that was put in place from
        outside is not, but for those of Hugging Face without values from a file."""
        weight = self._stored()
        if self._memory is None or (self._given and not self._is_hf_initialized):
            return False
        if getattr(weight, _BY_HF, False):
            return False
        now, before = weight.detach()[0], self._memory
        if (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
            return False
        return torch.equal(now.view(torch.uint8), before.view(torch.uint8))  # NaN is NaN here

    def _step_beside_weight(self) -> None:
        """A step that was left on the meta device begins at 0 where the weight is."""
        if self.step.is_meta and not self.weight.is_meta:
            self.step = torch.zeros_like(self.step, device=self.weight.device)

    def _check_written(self) -> None:
        """Of a loss that was on the meta device, which it leaves with whatever memory holds."""
        if self.weight.is_meta or (self._memory is not None and self._is_unwritten()):
            raise RuntimeError(
                "the prototypes (weight) of the loss have been on the meta device or in to_empty() "
                "and have no values: call reset_parameters() of the loss (in the models of Hugging "
                "Face from _init_weights), load a state dict, or fill them"
            )
        self._step_beside_weight()
        self._memory, self._was_meta = None, False

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seed, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        self.seed = int(state)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard is not None:
            name = prefix + "weight"
            if name not in destination:
                raise RuntimeError(
                    f"{name} of a loss with process_group must be a parameter to be saved, but "
                    "something like weight_norm, parametrize or prune has put a function of others "
                    "in its place; remove that first"
                )
            if self.full_state_dict:
                self.shard.meet("state_dict of a loss with full_state_dict=True")
                destination[name] = self.shard.all_rows(destination[name])
            else:
                destination[name] = self.shard.as_global(destination[name])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        name = prefix + "weight"
        value = state_dict.get(name)
        if value is not None and self.shard is not None:
            failures_of(self.shard.group).optimizer_steps = 0  # the ranks are of one mind again
        if isinstance(value, Tensor) and (self.shard is not None or not checks.is_local(value)):
            try:
                expected = [self._num_rows, self.embedding_size]
                if self.shard is not None:
                    expected[0] = self.num_classes * self.options.num_centers
                    if not checks.is_local(value) and self.options.num_centers > 1:
                        expected = [self.num_classes, self.options.num_centers, expected[1]]
                if list(value.shape) != expected:
                    raise ValueError(
                        f"{name} must be of all classes, {expected}, of which this rank takes its "
                        f"own; got {list(value.shape)}"
                    )
                rows = own_rows(self, name, value)
            except ValueError as error:
                *_, error_msgs = rest
                error_msgs.append(str(error))
                rows = self.weight.detach()
            state_dict = {**state_dict, name: rows}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if name in state_dict:
            self._memory, self._was_meta = None, self.weight.is_meta
            self._step_beside_weight()


def _keeps_values(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether what is applied to the tensors of a module keeps their values: that of `to_empty`
    does not."""
    value = secrets.randbits(62)
    result = fn(torch.tensor(value, device=device))
    if type(result) is not Tensor or result.is_meta:  # where nothing has values, as in fake tensors
        return True
    return int(result) == value


# Where a parameter is replaced (`load_state_dict(assign=True)`, a copy) no note on it stays.
_owners: WeakSet[PrototypeOwner] = WeakSet()


def loss_of(param: Tensor) -> PrototypeOwner | None:
    """The loss whose prototypes a parameter is; None for all others."""
    return next((loss for loss in _owners if loss._parameters.get("weight") is param), None)


def own_rows(loss: PrototypeOwner, name: str, value: Tensor) -> Tensor:
    """This rank's rows of a tensor of a state dict that has a row for each class of a loss.

    value: [C, ...]; with a process group a `DTensor`, or a plain tensor.

    Raises ValueError where it holds other classes.
    """
    if loss.shard is not None:
        return loss.shard.own_rows(name, value)
    if not checks.is_local(value):
        raise ValueError(
            f"{name} is a DTensor of one rank, and this loss has no process_group: load it with "
            "unicom_ext.checkpoint or torch.distributed.checkpoint, or save it from a loss with "
            "full_state_dict=True"
        )
    return value
