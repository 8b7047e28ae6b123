"""Process groups and GPUs: NCCL with one rank, and two processes that share a GPU. The same code
runs on the CPU too, so that what fails on a GPU is about the GPU."""

from __future__ import annotations

import pytest
import torch
from support.device_rank import run

from unicom_ext.ops import library

pytestmark = pytest.mark.slow  # processes that import torch

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not library.HAS_CUDA, reason="unicom_ext is built without CUDA"),
]


def together(ranks):
    """What the ranks saved, as one process has it."""
    whole = dict(ranks[0])
    for name in whole:
        if name.startswith("gradient"):
            # Scaled for an encoder whose gradients are averaged over the ranks.
            whole[name] = torch.cat([rank[name] for rank in ranks]) / len(ranks)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_two_processes_are_one(device, tmp_path):
    """Over Gloo, which also takes tensors of a GPU: NCCL has no two ranks on one."""
    (alone,) = run(tmp_path / "alone", 1, device=device)
    got = together(run(tmp_path / "two", 2, device=device, backend="gloo"))
    for name, right in alone.items():
        torch.testing.assert_close(got[name], right, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "gloo"),
        pytest.param("cuda", "gloo", marks=on_gpu),
        pytest.param("cuda", "nccl", marks=on_gpu),
        pytest.param("cuda", "cpu:gloo,cuda:nccl", marks=on_gpu),
    ],
)
def test_a_group_of_one_changes_no_bit(device, backend, tmp_path):
    (alone,) = run(tmp_path / "alone", 1, device=device)
    (got,) = run(tmp_path / "group", 1, device=device, backend=backend)
    for name, right in alone.items():
        assert torch.equal(got[name], right), name


@pytest.mark.parametrize("backend", [pytest.param(b, marks=on_gpu) for b in (None, "nccl")])
def test_a_graph_changes_no_bit(backend, tmp_path):
    """Collectives are part of it."""
    (alone,) = run(tmp_path / "alone", 1, device="cuda", backend=backend)
    (got,) = run(tmp_path / "graph", 1, device="cuda", backend=backend, captured=True)
    for name, right in alone.items():
        assert torch.equal(got[name], right), name
