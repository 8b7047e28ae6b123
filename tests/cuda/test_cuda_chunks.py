"""Backward goes through the classes in chunks, of a size that measurements vary
(UNICOM_CUDA_CHUNK_MIB): what comes out, over the emulation, must not depend on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import backends
from support.problems import Outcome, check_fp32, random_problem, row_errors, solve
from support.processes import Process

from unicom_ext import PartialMarginSoftmax
from unicom_ext.functional import partial_margin_softmax as op
from unicom_ext.optim import RowSGD

pytestmark = [pytest.mark.emulated, pytest.mark.slow]  # processes: the variable is read once

LARGE, SMALL = 128, 1  # MiB

# In chunks of 1 MiB; those of 128 hold all classes.
PROBLEMS = {
    "attention, 3 chunks": random_problem(
        70, 2500, 256, closeness=0.5, precision="fp16", reduction="none"
    ),
    "halves, 4 chunks": random_problem(70, 2500, 320, closeness=0.5, precision="fp16"),
    "float32, 3 chunks": random_problem(
        130, 2500, 65, closeness=0.5, workspace_bytes=1 << 20, interclass_filter=0.2
    ),
    "centers, 4 chunks": random_problem(20, 700, 320, closeness=0.5, num_centers=3, sampled=690),
    "float64, 2 chunks": random_problem(
        20, 520, 250, closeness=0.5, dtype=torch.float64, label_smoothing=0.1
    ),
}


def update_in_backward() -> tuple[torch.Tensor, ...]:
    """One step that takes the prototypes' gradient chunk by chunk, of fewer classes than the bound:
    labels stand twice."""
    torch.manual_seed(0)
    options = {"precision": "fp16", "sparse_grad": True}
    loss_fn = PartialMarginSoftmax(320, 5000, sample_rate=0.4, seed=3, **options)
    before = loss_fn.weight.detach().clone()
    RowSGD(loss_fn.parameters(), lr=1.0).update_in_backward(loss_fn)
    x = torch.randn(200, 320, requires_grad=True)
    loss = loss_fn(x, torch.arange(200) % 50 * 100)
    loss.backward()
    return loss.detach(), x.grad, loss_fn.weight.detach() - before


def compute(mib: int, path: Path) -> None:
    os.environ["UNICOM_CUDA_CHUNK_MIB"] = str(mib)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(monkeypatch, "emulated_cuda")
        found = []
        for _ in range(2):
            found.append({name: tuple(solve(op, problem)) for name, problem in PROBLEMS.items()})
            found[-1]["update in backward"] = update_in_backward()
        torch.save(found, path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By the size of chunks: of each problem, computed twice."""
    backends.build_emulation("_C_emulated")
    folder = tmp_path_factory.mktemp("chunks")
    found = {}
    for mib in (LARGE, SMALL):
        process = Process(folder / f"{mib}.txt", compute, mib, folder / f"{mib}.pt")
        assert process.end() == 0, process.text()
        found[mib] = torch.load(folder / f"{mib}.pt")
    return found


@pytest.mark.parametrize("name", [*PROBLEMS, "update in backward"])
def test_chunks_change_rounding_alone(name, outcomes):
    large, small = (outcomes[mib][0][name] for mib in (LARGE, SMALL))
    for mib in (LARGE, SMALL):
        assert all(map(torch.equal, *(found[name] for found in outcomes[mib])))
    loss, *gradients = zip(large, small, strict=True)
    assert torch.equal(*loss)
    exact = 1e-14 if large[0].dtype == torch.float64 else 2e-6
    for a, b in gradients:
        # Where passes have the shape of attention no sum is cut.
        assert torch.equal(a, b) if "attention" in name else row_errors(a, b).max() < exact
    if name in PROBLEMS and "precision" not in PROBLEMS[name].options:
        for outcome in (large, small):
            check_fp32(Outcome(*outcome), PROBLEMS[name])
