"""Loss and gradients that a published implementation computed in float32 (its own code, PyTorch).

Two differences are deliberate:
- cosface_both: that code caps the loss of each sample at -log 1e-30 = 69.08, ours does not. With
  the cap put on, the losses agree; the gradients agree as they are.
- unicom_2ranks: a run on two ranks. Embeddings and labels are those of both ranks, one after the
  other, and every rank has the loss of the global batch; the embedding gradients are multiplied
  by the number of ranks, because data-parallel wrappers average over them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.golden import FILES, load
from support.problems import relative_error, solve

from unicom_ext import functional, reference


def check(implementation, path: Path, dtype: torch.dtype) -> None:
    problem, golden = load(path)
    problem = problem.to(dtype)
    losses = solve(implementation, problem).loss
    if path.stem == "cosface_both":
        assert float(losses.max()) > -math.log(1e-30)  # or there would be nothing to cap
        assert float(losses.mean()) == pytest.approx(14.3164, rel=1e-5)
        losses = losses.clamp(max=-math.log(1e-30))
    for loss in golden["loss"]:
        assert float(losses.mean()) == pytest.approx(loss, rel=1e-5)

    mean = solve(implementation, problem.having(reduction="mean"))
    grad_embeddings = torch.from_numpy(golden["grad_embeddings"]) / int(golden["world_size"])
    assert relative_error(mean.grad_embeddings, grad_embeddings) < 1e-5
    assert relative_error(mean.grad_prototypes, torch.from_numpy(golden["grad_prototypes"])) < 1e-5


def test_the_files_are_there():
    assert len(FILES) == 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference(path):
    check(reference.partial_margin_softmax, path, torch.float64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_op(path, dtype, capability):
    check(functional.partial_margin_softmax, path, dtype)
