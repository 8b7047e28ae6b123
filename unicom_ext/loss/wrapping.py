"""Guards against wrappers that take the prototypes for parameters of which every rank has a copy.

DistributedDataParallel would overwrite them with those of rank 0, FSDP would cut each rank's once
more, and both would average gradients that need no averaging. What a wrapper was told to leave out
is not wrapped, and accepted.

The guards act while the wrapper is made, on every rank alike and before anything is sent: ranks
own different numbers of classes, and where shapes differ DistributedDataParallel leaves rank 0
waiting for the others, and FSDP's first all-gather ends a process or hangs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_WRAPPED = (
    "PartialMarginSoftmax must not be wrapped in DistributedDataParallel or FSDP, nor be a part of "
    "a module that is: ranks own different prototypes, whose gradients need no averaging. Wrap the "
    "encoder alone (or fully_shard(model, ignored_params=set(loss.parameters()))), and give the "
    "loss process_group=torch.distributed.group.WORLD to share its classes with the other ranks"
)


class NeverWrapped(nn.Module):
    """Base of the loss: TypeError where a wrapper takes its parameters over."""

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        # FSDP2 changes a module's parameters without a word to it. But then it comes here, to
        # learn of loading, and its DTensors are in their places already.
        if any(hasattr(param, "placements") for param in self._parameters.values()):
            raise TypeError(_WRAPPED)
        return super().register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


def _refuse(wrapper: nn.Module, name: str, module: nn.Module) -> None:
    """Called for every module that becomes a part of another, as when a wrapper takes one in.

    DDP does so before it compares the ranks' shapes; FSDP1 when it has flattened the parameters.
    """
    if name == "module" and isinstance(wrapper, DistributedDataParallel):
        ignored = wrapper.parameters_to_ignore
        left_out: Any = {param for name, param in module.named_parameters() if name in ignored}
    elif name == "_fsdp_wrapped_module" and _is_fsdp1(wrapper):
        left_out = wrapper._ignored_params
    else:
        return
    for part in module.modules():
        if isinstance(part, NeverWrapped):
            params = set(part.parameters())  # those that FSDP1 has flattened are none any more
            if not params or not params <= left_out:
                raise TypeError(_WRAPPED)


def _is_fsdp1(wrapper: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes a second to import
    return fsdp is not None and isinstance(wrapper, fsdp.FullyShardedDataParallel)


register_module_module_registration_hook(_refuse)
