"""Each process of a machine has a GPU of its own, or all of them say that there are too few."""

from __future__ import annotations

import pytest
import torch
from support.images import exactly

from unicom_ext.utils.devices import device_of, usable_device
from unicom_ext.utils.settings import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """A machine with two GPUs, as far as anybody asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_the_gpu_of_its_local_rank(monkeypatch, name):
    assert device_of(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device_of(name) == usable_device(name) == torch.device("cuda", rank)
    assert device_of("cpu") == CPU


def test_alone_it_has_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of("auto") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("variables", [
    {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"},
    {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"},
    {"LOCAL_RANK": "2"},
])  # fmt: skip
def test_more_processes_than_gpus(monkeypatch, name, variables):
    """All of them see it: one that went on with a GPU would wait for the others."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=exactly(
        f"device: got {name!r} for 3 processes on a machine with 2 GPUs; must be 'cpu', or no more "
        "processes than GPUs"
    )):  # fmt: skip
        device_of(name)
    assert usable_device(name) == CPU
    assert device_of("cpu") == CPU


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_of("auto") == CPU
    with pytest.raises(ConfigError, match="device: cuda cannot be used: torch finds no GPU"):
        device_of("cuda")
    assert usable_device("cuda") == CPU


def test_a_reason_of_the_caller():
    assert device_of("auto", "it is not built for it") == CPU
    with pytest.raises(ConfigError, match="device: cuda cannot be used: it is not built for it"):
        device_of("cuda", "it is not built for it")
