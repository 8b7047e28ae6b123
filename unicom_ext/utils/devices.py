"""Devices by the names that settings have for them."""

from __future__ import annotations

import torch

from unicom_ext.utils.settings import ConfigError


def device_of(name: str) -> torch.device:
    """The device of "auto", which is a GPU if there is one, "cpu" or "cuda".

    Raises ConfigError where there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch finds no GPU")
    return torch.device(name)
