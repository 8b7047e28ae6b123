"""Devices by the names that settings have for them."""

from __future__ import annotations

import os

import torch

from unicom_ext.utils.settings import ConfigError

CPU = torch.device("cpu")


def device_of(name: str, problem: str | None = None) -> torch.device:
    """The device of "auto", which is a GPU if there is one, "cpu" or "cuda".

    Under torchrun each process has the GPU of its LOCAL_RANK. problem: why no GPU can be used,
    where the caller knows of something.

    Raises ConfigError where "cuda" cannot be used, and where a machine with GPUs has fewer of them
    than processes: on all of these.
    """
    if name != "cpu" and problem is None:
        problem = None if torch.cuda.is_available() else "torch finds no GPU"
    if name == "cuda" and problem is not None:
        raise ConfigError(f"device: cuda cannot be used: {problem}")
    if name == "cpu" or problem is not None:
        return CPU
    index, count = local_rank(), torch.cuda.device_count()
    processes = max(index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if processes > count:
        raise ConfigError(
            f"device: got {name!r} for {processes} processes on a machine with {count} "
            f"GPU{'s' if count > 1 else ''}; must be 'cpu', or no more processes than GPUs"
        )
    if "LOCAL_RANK" not in os.environ and torch.cuda.is_initialized():
        index = torch.cuda.current_device()
    return torch.device("cuda", index)


def usable_device(name: str, problem: str | None = None) -> torch.device:
    """`device_of`, and the CPU where that raises: for ranks that must meet to say what is wrong."""
    try:
        return device_of(name, problem)
    except ConfigError:
        return CPU


def local_rank() -> int:
    """The number of this process among those of its machine; 0 where nothing says."""
    return int(os.environ.get("LOCAL_RANK", "0"))
