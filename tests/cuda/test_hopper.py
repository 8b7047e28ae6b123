"""The loss on Hopper's own kernels (TMA and wgmma) over the emulation, beside float64 and the
kernels of every GPU: up to 256 dimensions by passes in the shape of attention, above chunk by
chunk. Blocks of several tiles are in tests/emulation/sanitized_tiles.cpp."""

from __future__ import annotations

import math
import os

import pytest
import torch
from support import backends
from support.problems import (
    Outcome,
    Problem,
    distance,
    random_problem,
    relative_error,
    solve,
    truth,
)
from support.processes import Process

from unicom_ext import PartialMarginSoftmax
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.ops import library

pytestmark = pytest.mark.usefixtures("emulated")

# Around the edges of boxes (64), of tiles of keys (96) and classes (256), and of blocks (128).
EDGES = (1, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257)
DEPTHS = (1, 63, 64, 65, 96, 127, 128, 129, 191, 192, 193, 255, 256)
# Each edge once in the batch, in the classes and in the depth, beside different ones.
ATTENDED = [
    (EDGES[i], max(2, EDGES[(3 * i + 7) % 13]), DEPTHS[(7 * i + 2) % 13]) for i in range(13)
]
CHUNKED = [
    (EDGES[i], max(2, EDGES[(3 * i + 7) % 13]), 256 + EDGES[(7 * i + 2) % 4]) for i in range(13)
]


def on_both(problem: Problem) -> tuple[Outcome, Outcome]:
    """On Hopper's kernels, and on those of every GPU."""
    on_hopper = solve(partial_margin_softmax, problem)
    with backends.emulating(compute_capability=8):
        return on_hopper, solve(partial_margin_softmax, problem)


def check(problem: Problem, off: float, nearer: float = 1 / 20) -> None:
    """As near to the truth as the budget of its precision allows, and nearer to the other kernels,
    which multiply the same halves, but make halves of other multiples of the probabilities where
    passes have the shape of attention."""
    on_hopper, elsewhere = on_both(problem)
    scale, right = problem.options["scale"], truth(problem)
    assert torch.allclose(on_hopper.loss.double(), right.loss, rtol=off, atol=off * scale)
    assert torch.allclose(on_hopper.loss, elsewhere.loss, rtol=1e-5, atol=1e-6 * scale)
    for a, b, c in zip(on_hopper[1:], elsewhere[1:], right[1:], strict=True):
        size = max(1, float(c.norm()))  # in one dimension gradients are zero
        assert distance(a, c) < off * size
        assert distance(a, b) < off * nearer * size


@pytest.mark.parametrize(("precision", "off"), [("fp16", 1e-2), ("bf16", 6e-2)])
@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_shapes_around_the_edges_of_tiles(shape, precision, off):
    check(random_problem(*shape, closeness=0.5, precision=precision, reduction="none"), off)


@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_shapes_of_more_dimensions(shape):
    problem = random_problem(*shape, closeness=0.5, precision="fp16", reduction="none")
    check(problem, 1e-2, 1 / 100)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.0},
        {"scale": 500.0},
        {"interclass_filter": 0.1},
        {"positives": 4},
        {"positives": 3, "multi_label": "separate"},
        {"label_smoothing": 0.2},
        {"ignored": 20},
        {"sampled": 200, "features": 65},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(130, 270, 96), (40, 210, 320)], ids=str)
def test_options(shape, options):
    options = {"closeness": 0.5, "precision": "fp16", "reduction": "none", **options}
    # Rounding takes some cosines to the other side of the filter.
    off = 3e-2 if "interclass_filter" in options else 1e-2
    check(random_problem(*shape, **options), off)


def test_samples_that_have_come_to_their_prototypes():
    problem = random_problem(70, 300, 64, precision="fp16", reduction="none")
    converged = Problem(
        problem.prototypes[problem.labels], problem.labels, problem.prototypes, problem.options
    )
    on_hopper, elsewhere = on_both(converged)
    assert torch.allclose(on_hopper.loss, elsewhere.loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"interclass_filter": 0.1}], ids=str)
def test_without_negatives(options):
    problem = random_problem(5, 1, 16, precision="fp16", reduction="none", **options)
    for outcome in on_both(problem):
        assert all(torch.equal(part, torch.zeros_like(part)) for part in outcome)


def test_fewer_classes_than_there_is_room_for():
    """Labels that stand twice bring fewer classes than the bound allows."""
    results = []
    for capability in (8, 9):
        with backends.emulating(compute_capability=capability):
            torch.manual_seed(0)
            module = PartialMarginSoftmax(64, 700, sample_rate=0.4, precision="fp16", seed=3)
            x = torch.randn(150, 64, requires_grad=True)
            loss = module(x, torch.arange(150) % 7)
            loss.backward()
            assert len(module.last_selection.class_index) < 280 + 150
            results.append((loss.detach(), x.grad, module.weight.grad))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 5e-4


@pytest.mark.parametrize("generation", [8, 9])
@pytest.mark.parametrize("count", [0, 1, 256, 257])
@pytest.mark.parametrize("dim", [64, 320])
def test_a_shard_of_fewer_classes_than_the_bound(dim, count, generation):
    """It has no class of the batch, and is what it would be with the bound that fits."""
    problem = random_problem(130, 600, dim)
    slot = torch.full((130,), -2)
    state = torch.ones(130, 9, dtype=torch.float64)
    options = [1.0, 0.3, 0.0, 64.0, math.inf, 0.0], [False, False, 1, 1, 0, 0, False, 1, True]
    classes = torch.arange(0, 600, 2)
    results = []
    for selection in ((classes, torch.tensor(count)), (classes[:count], None)):
        operands = (problem.embeddings, slot, problem.prototypes, *selection, None)
        with backends.emulating(compute_capability=generation):
            sums, exponent, largest, _, *saved = library.ops.loss_sums(*operands, 600, *options)
            state[:, 2], power = sums[:, 0].frexp()
            state[:, 2] = torch.where(sums[:, 0] > 0, 1 / state[:, 2], 0)
            state[:, 3] = exponent + power
            gradients = library.ops.loss_backward(
                torch.ones(()), *operands, state, *saved, *options, True, True, True, False
            )
        results.append((sums, largest, *gradients))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if count == 0 else relative_error(a, b) < 2e-4
    assert bool(results[0][0].any()) == (count > 0)


def test_a_frozen_encoder_and_a_frozen_head():
    """Each gradient alone is what it is beside the other."""
    problem = random_problem(70, 200, 65, closeness=0.5, precision="fp16")
    both = solve(partial_margin_softmax, problem)
    for wants_x in (True, False):
        x = problem.embeddings.clone().requires_grad_(wants_x)
        w = problem.prototypes.clone().requires_grad_(not wants_x)
        partial_margin_softmax(x, problem.labels, w, **problem.options).backward()
        if wants_x:
            assert torch.equal(x.grad, both.grad_embeddings)
        else:
            assert torch.allclose(w.grad, both.grad_prototypes, atol=1e-6)


def test_a_learned_scale():
    results = []
    for capability in (8, 9):
        with backends.emulating(compute_capability=capability):
            problem = random_problem(70, 200, 65, closeness=0.5, precision="fp16")
            scale = torch.tensor(30.0, requires_grad=True)
            options = {**problem.options, "scale": scale}
            partial_margin_softmax(
                problem.embeddings, problem.labels, problem.prototypes, **options
            ).backward()
            results.append(scale.grad)
    assert relative_error(*results) < 1e-4


def test_what_raises_the_exponents_late():
    """Each class is nearer than all before it, by more than halves can hold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(66, 64, generator=generator)
    noise = torch.randn(400, 64, generator=generator)
    w = torch.linspace(-1, 1, 400)[:, None] * x.mean(0) + 0.01 * noise
    problem = random_problem(66, 400, 64, precision="fp16", scale=64.0, reduction="none")
    check(Problem(x.mean(0) + 0.1 * x, problem.labels, w, problem.options, problem.upstream), 1e-2)


@pytest.mark.parametrize("shape", [(130, 600, 130), (70, 300, 300)], ids=str)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_order_of_threads_changes_nothing(precision, shape):
    problem = random_problem(*shape, closeness=0.5, precision=precision)
    outcomes = []
    for schedule in (0, 1, 77):
        with backends.emulating(schedule=schedule):
            outcomes.append(solve(partial_margin_softmax, problem))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"precision": "fp16"}, True),
        ({"precision": "bf16"}, True),
        ({"precision": "fp32"}, False),
        ({"precision": "fp16", "num_centers": 2}, False),
    ],
    ids=str,
)
def test_where_the_path_is_taken(options, taken):
    problem = random_problem(100, 300, 64, **options)
    x, w = problem.embeddings.requires_grad_(), problem.prototypes.requires_grad_()
    boxes = [backends.boxes_loaded()]
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    boxes.append(backends.boxes_loaded())
    loss.backward()
    boxes.append(backends.boxes_loaded())
    assert [boxes[1] > boxes[0], boxes[2] > boxes[1]] == [taken, options["precision"] != "fp32"]
    with backends.emulating(compute_capability=8):
        solve(partial_margin_softmax, problem)
    assert backends.boxes_loaded() == boxes[2]


def solve_with(settings):
    problem = random_problem(9, 70, 65, precision="fp16")
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(monkeypatch, "emulated_cuda")
        for setting in settings:
            os.environ.update(setting)
            try:
                solve(partial_margin_softmax, problem)
            except RuntimeError as error:
                print(error)
    print(backends.boxes_loaded() > 0)


@pytest.mark.slow  # a process of its own: the variable is read once
@pytest.mark.parametrize(("given", "uses_tma"), [("0", False), ("1", True)])
def test_measurements_may_turn_them_off(given, uses_tma, tmp_path):
    process = Process(tmp_path / "printed", solve_with, [{"UNICOM_CUDA_HOPPER": given}])
    assert process.end() == 0, process.text()
    assert process.text().split() == [str(uses_tma)]


@pytest.mark.slow
def test_bad_settings_of_measurements_are_named(tmp_path):
    bad = {
        "UNICOM_CUDA_HOPPER": ("0 or 1", ["off", "", "10"]),
        "UNICOM_CUDA_CHUNK_MIB": ("a whole number from 1 to 65536", ["0", "65537", "1.5", ""]),
    }
    messages, settings, good = [], [], {}
    for name, (allowed, values) in bad.items():
        for value in values:
            settings.append({**good, name: value})
            messages.append(f"{name} must be {allowed}, got '{value}'")
        good[name] = "1"
    process = Process(tmp_path / "printed", solve_with, [*settings, good])
    assert process.end() == 0, process.text()
    assert process.text().splitlines() == [*messages, "True"]
