"""What the row optimizers are asked for by checkpoints: their options, and their state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from unicom_ext.optim import states
from unicom_ext.optim.options import plain_option, plain_switch, without_dense_only


class RowStateOptimizer(torch.optim.Optimizer):
    """An optimizer some of whose parameters are updated by rows.

    The state of a parameter that is updated by rows consists of tensors whose first dimension is
    that of the parameter, and of few numbers that are the same for all rows (`shared_state`, where
    they are tensors of one dimension or more).

    All other parameters have the state that torch's own implementation gives them.
    """

    _row_marker: str  # a key that only the state of row parameters has
    # Of its tensors; None for moments, whose dtype depends on the parameter's.
    _row_state: Mapping[str, torch.dtype | None]
    shared_state: tuple[str, ...] = ()  # tensors in it that have no row for each of the parameter's
    # Of a parameter with dense gradients; what has a True must be there.
    _dense_state: Mapping[str, bool]
    # Options of which torch's optimizer of this kind saves the first, this one the others.
    _origins: tuple[str, ...]
    _switches: tuple[str, ...]  # options that are on or off; `fused` may be None too
    _later_options: Mapping[str, Any]  # what they were before they existed

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option cannot be used."""
        raise NotImplementedError

    def _required(self, names: Set[str]) -> tuple[str, ...]:
        """What the state of a row parameter that has these cannot be without."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.update(self._plain_options({**self.defaults, **param_group}))
        super().add_param_group(param_group)

    def _plain_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a group that was given, checked, without NumPy's numbers."""
        switches = {name: plain_switch(name, group[name]) for name in self._switches}
        self._check_group({**group, **switches})
        options = {name: plain_option(group[name]) for name in self.defaults if name in group}
        return options | switches

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's: what was pickled whole before an option existed gets it as it was then."""
        super().__setstate__(state)
        for name, value in self._later_options.items():
            self.defaults.setdefault(name, value)
            for group in self.param_groups:
                group.setdefault(name, value)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's. What belongs to the rows of prototypes that ranks share is of all classes:
        `DTensor`s, or plain tensors where the loss has ``full_state_dict=True``, when every rank
        must call this at the same time."""
        state_dict = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        state_dict["state"] = state = state_dict["state"].copy()
        for index, param in enumerate(params):  # in the same order on every rank
            if index in state:
                state[index] = states.to_save(param, state[index], self.shared_state)
        state_dict["param_groups"] = [
            {key: states.option_to_save(value) for key, value in group.items()}
            for group in state_dict["param_groups"]
        ]
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; also what `torch.optim.AdamW` or `SGD` have saved, from which dense gradients
        go on as there. Options that the state dict lacks stay as they are here.

        The state of rows keeps its own dtypes as far as they suit the parameter. Of the state of
        all classes each rank takes its own.

        Raises ValueError where the state does not fit; nothing has changed then.
        """
        state_dict = self.own_state_dict(state_dict)
        by_rows = {}
        for here, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, index in zip(here["params"], group["params"], strict=False):
                state = state_dict["state"].get(index, {})
                if self._row_marker in state:
                    by_rows[param] = state_dict["state"][index] = self._following(param, state)
                elif state:
                    state_dict["state"][index] = states.dense(param, state)
        super().load_state_dict(state_dict)
        # torch has made all of them of the parameter's dtype.
        self.state.update(by_rows)

    def own_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What `load_state_dict` would take of a state dict: this rank's rows, all options.

        Raises ValueError where it does not fit.
        """
        state, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        for number, here in enumerate(self.param_groups[: len(groups)]):
            saved = groups[number]
            groups[number] = self._loaded_group(saved, here)
            for param, index in zip(here["params"], saved["params"], strict=False):
                if state.get(index):
                    self.check_state(param, state[index].keys())
                    by_rows = self._row_marker in state[index]
                    if not by_rows:
                        self._check_origin(saved)
                    state[index] = states.own(
                        param, state[index], self.shared_state, by_rows=by_rows
                    )
        return {**state_dict, "state": state, "param_groups": groups}

    def _check_origin(self, group: dict[str, Any]) -> None:
        """Of state of dense gradients, whose names other kinds of optimizers have too."""
        if not any(name in group for name in self._origins):
            kind = type(self).__name__
            raise ValueError(
                f"{kind} cannot go on from the state of another kind of optimizer: the options in "
                f"the state dict are {', '.join(sorted(group.keys() - {'params'}))}, without "
                f"{' or '.join(self._origins)}"
            )

    def _loaded_group(self, saved: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
        options = {key: here[key] for key in self.defaults if key in here}
        group = {**options, **without_dense_only(type(self).__name__, saved)}
        for key, value in group.items():
            group[key] = states.option_again(value)
        return {**group, **self._plain_options(group)}

    def check_state(self, param: Tensor, names: Set[str]) -> None:
        """Before state of these names is loaded for a parameter.

        Raises ValueError where it is not what this kind of optimizer saves, or torch's own.
        """
        if self._row_marker in names:
            for name in self._required(names):
                if name not in names:
                    raise ValueError(
                        f"the state dict has no {name} for a parameter {list(param.shape)} that is "
                        f"updated by rows, only {sorted(names)}"
                    )
            return
        needed = {name for name, is_needed in self._dense_state.items() if is_needed}
        if not needed <= names <= self._dense_state.keys():
            kind = type(self).__name__
            raise ValueError(
                f"{kind} cannot go on from the state of another kind of optimizer: of a parameter "
                f"{list(param.shape)} the state dict has {', '.join(sorted(names))}; {kind} takes "
                f"{', '.join(self._dense_state)}, or what it has saved itself of rows, with "
                f"{self._row_marker}"
            )

    def _following(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a row parameter on its device, in dtypes that suit it."""
        return {
            name: states.following(param, value, self._row_state[name])
            if name in self._row_state and isinstance(value, Tensor)
            else value
            for name, value in state.items()
        }
