"""The operators between which ranks exchange their sums: shards in turn, merged here by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support.problems import random_problem, relative_error, solve

from unicom_ext import functional, sampling
from unicom_ext.ops import library

ops = torch.ops.unicom_ext


def solve_in_shards(problem, borders, precision=0, workspace_bytes=1 << 20):
    """Loss per sample and gradients of their mean from shards of the classes, one after another."""
    options, num_classes = problem.options, len(problem.prototypes)
    scale, margin = options.get("scale", 64.0), options["margin"]
    threshold = options.get("interclass_filter")
    threshold = math.inf if threshold is None else threshold
    smoothing = options.get("label_smoothing", 0.0)
    classes, features = options.get("class_index"), options.get("feature_index")
    total = num_classes if classes is None else len(classes)
    reals = [margin.m1, margin.m2, margin.m3, scale, threshold, smoothing]
    exact, linear = options.get("margin_grad") == "exact", options.get("beyond_pi") == "linear"
    codes = [exact, linear, precision, 1, 0, workspace_bytes, False, 1, True]
    shards, saved = [], []
    for start, stop in pairwise(borders):
        mine = None
        if classes is not None:
            mine = classes[(classes >= start) & (classes < stop)]
        slot = library.ops.label_slots(problem.labels, mine, num_classes, -100, start, stop)
        local = None if mine is None else mine - start
        arguments = (
            problem.embeddings,
            slot,
            problem.prototypes[start:stop],
            local,
            None,
            features,
        )
        *sums, packed, kept = library.ops.loss_sums(*arguments, total, reals, codes)
        shards.append(sums)
        saved.append((arguments, packed, kept))
    exponent = torch.stack([e for _, e, _, _ in shards]).amax(0)
    factors = [torch.exp2(e - exponent).nan_to_num(0.0) for _, e, _, _ in shards]
    columns = [torch.cat([s[:, :1] * f[:, None], s[:, 1:]], 1)
               for (s, *_), f in zip(shards, factors, strict=True)]  # fmt: skip
    inverse_norm = shards[0][3]
    slot = torch.where(problem.labels == -100, -1, -2)
    sample_loss, state = library.ops.loss_merge(
        torch.stack(columns).sum(0), exponent, inverse_norm, slot, None, None, reals, codes
    )
    grad_embeddings, grad_prototypes = 0.0, []
    for arguments, packed, kept in saved:
        dx, dw, _ = library.ops.loss_backward(
            torch.ones((), dtype=torch.float32), *arguments, state, packed, kept, reals, codes,
            True, False, True, False,
        )  # fmt: skip
        grad_embeddings = grad_embeddings + dx
        grad_prototypes.append(dw)
    return sample_loss, grad_embeddings, torch.cat(grad_prototypes)


BORDERS = [[0, 151], [0, 0, 151], [0, 50, 151], [0, 16, 17, 140, 151, 151], [0, 100, 100, 151]]


@pytest.mark.parametrize("borders", BORDERS, ids=str)
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("scale", [30.0, 64.0, 200.0])
@pytest.mark.parametrize("workspace_bytes", [0, 1 << 20])
@pytest.mark.parametrize("form", [{"interclass_filter": 0.6}, {"label_smoothing": 0.1}], ids=str)
def test_shards_together_are_the_whole(borders, selected, scale, workspace_bytes, form):
    selection = {"sampled": 120, "features": 11} if selected else {}
    problem = random_problem(37, 151, 16, closeness=1.0, ignored=3, **selection).having(
        scale=scale, **form
    )
    whole = solve(functional.partial_margin_softmax, problem)
    sample_loss, dx, dw = solve_in_shards(problem, borders, workspace_bytes=workspace_bytes)
    kept = problem.labels != -100
    assert relative_error(sample_loss[kept].mean(), whole.loss) < 1e-6
    assert (sample_loss[~kept] == 0).all()
    assert relative_error(dx, whole.grad_embeddings) < 2e-6
    assert relative_error(dw, whole.grad_prototypes) < 2e-6


@pytest.mark.parametrize("borders", BORDERS, ids=str)
@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_shards_of_halves_together_are_the_whole(borders, scale, emulated):
    """Where forward prepares the embeddings' gradient, to each shard's own exponents."""
    problem = random_problem(37, 151, 16, closeness=1.0, ignored=3, precision="fp16")
    problem = problem.having(scale=scale)
    whole = solve(functional.partial_margin_softmax, problem)
    sample_loss, dx, dw = solve_in_shards(problem, borders, precision=1)
    kept = problem.labels != -100
    assert relative_error(sample_loss[kept].mean(), whole.loss) < 1e-6
    assert relative_error(dx, whole.grad_embeddings) < 5e-4
    assert relative_error(dw, whole.grad_prototypes) < 5e-4


def test_a_shard_without_classes_contributes_nothing():
    problem = random_problem(5, 9, 4)
    slot = torch.full((5,), -2)
    arguments = (problem.embeddings, slot, problem.prototypes[:0], None, None, None)
    reals, codes = (
        [1.0, 0.3, 0.0, 64.0, math.inf, 0.0],
        [False, False, 0, 1, 0, 1 << 20, False, 1, True],
    )
    sums, exponent, largest, _, packed, kept = ops.loss_sums(*arguments, 9, reals, codes)
    assert (sums == 0).all()
    assert (largest == -math.inf).all()
    assert exponent.isfinite().all()
    state = torch.zeros(5, 9, dtype=torch.float64)
    dx, dw, radial = ops.loss_backward(
        torch.ones(()), *arguments, state, packed, kept, reals, codes, True, True, True, False
    )  # fmt: skip
    assert dx.shape == problem.embeddings.shape
    assert (dx == 0).all()
    assert dw.shape == (0, 4)
    assert torch.equal(radial, torch.zeros(5, dtype=torch.float64))


def test_shards_need_the_bound_of_all():
    problem = random_problem(5, 9, 4)
    slot = ops.label_slots(problem.labels, None, 9, -100, 0, 9)
    with pytest.raises(ValueError, match=r"total_sampled must be at least 9, .* got 8"):
        ops.loss_sums(
            problem.embeddings, slot, problem.prototypes, None, None, None, 8,
            [1.0, 0.3, 0.0, 64.0, math.inf, 0.0], [0, 0, 0, 1, 0, 0, 0, 1, 1],
        )  # fmt: skip


@pytest.mark.parametrize("borders", [[0, 300, 1000], [0, 256, 511, 1000]], ids=str)
def test_slots_of_shards(borders):
    labels = torch.tensor([0, 299, 300, 999, -100, 511])
    for start, stop in pairwise(borders):
        classes, count, slot = ops.select_classes(
            labels, torch.tensor(3), 1000, 100, 7, -100, start, stop
        )
        classes = classes[: int(count)]
        whole = sampling.select_classes(1000, 0.1, labels[labels >= 0], seed=7, step=3)
        torch.testing.assert_close(classes, whole[(whole >= start) & (whole < stop)])
        again = ops.label_slots(labels, classes, 1000, -100, start, stop)
        torch.testing.assert_close(slot, again)
        for label, position in zip(labels.tolist(), slot.tolist(), strict=True):
            if label == -100:
                assert position == -1
            elif start <= label < stop:
                assert classes[position] == label
            else:
                assert position == -2
