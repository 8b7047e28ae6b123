"""The loss with its classes on 1, 2, 3 and 4 ranks: equal to one process with all their batches."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import wire_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import load
from support.problems import Problem, per_sample_margin, random_problem, relative_error, solve
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from unicom_ext import (
    ArcFace,
    CombinedMargin,
    CosFace,
    PartialMarginSoftmax,
    SphereFace,
    checkpoint,
    functional,
    sharding,
)
from unicom_ext.distributed import failures

WORLD_SIZES = [1, 2, 3, 4]


def make(num_classes, dim, **options) -> PartialMarginSoftmax:
    return PartialMarginSoftmax(dim, num_classes, **{"seed": 11, **options})


def own(sizes: list[int], rank: int) -> slice:
    """Where the samples of a rank are among those of all."""
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def cut(margin: CombinedMargin, part: slice) -> CombinedMargin:
    m2, m3 = (m[part] if isinstance(m, torch.Tensor) else m for m in (margin.m2, margin.m3))
    return CombinedMargin(margin.m1, m2, m3)


def derive(module, x, labels, margin, upstream, step=None):
    """Loss, gradient of the embeddings, gradient of the weight (dense)."""
    module.weight.grad = None
    x = x.clone().requires_grad_()
    loss = module(x, labels, step=step, margin=margin)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), x.grad, module.weight.grad.to_dense()


def compare(group, problem: Problem, sizes: list[int], options: dict, steps: int = 1) -> dict:
    """On a rank: how far its part is from one process with the batches of all ranks."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    sizes = sizes[:world_size]
    total = sum(sizes)
    x, labels = problem.embeddings[:total], problem.labels[:total]
    num_classes, dim = problem.prototypes.shape
    margin = cut(options.pop("margin", ArcFace(0.3)), slice(total))
    one = make(num_classes, dim, **options)
    shared = make(num_classes, dim, process_group=group, **options)
    rows = slice(shared.shard.start, shared.shard.stop)
    with torch.no_grad():
        one.weight.copy_(problem.prototypes)
        shared.weight.copy_(problem.prototypes[rows])
    upstream = torch.tensor(1.5)
    part = own(sizes, rank)
    own_upstream = upstream
    if options.get("reduction") == "none":
        upstream = torch.rand(total, generator=torch.Generator().manual_seed(5)) + 0.5
        own_upstream = upstream[part]
    if problem.upstream is not None:
        upstream = problem.upstream
    worst = {"loss": 0.0, "grad_embeddings": 0.0, "grad_prototypes": 0.0, "metrics": 0.0}
    for _ in range(steps):
        right = derive(one, x, labels, margin, upstream)
        got = derive(shared, x[part], labels[part], cut(margin, part), own_upstream)
        right_loss = right[0][part] if options.get("reduction") == "none" else right[0]
        times = world_size if options.get("grad_average", True) else 1
        for name, a, b in (
            ("loss", got[0], right_loss),
            ("grad_embeddings", got[1], right[1][part] * times),
            ("grad_prototypes", got[2], right[2][rows]),
            ("metrics", shared.last_metrics.loss, one.last_metrics.loss[part]),
            ("metrics", shared.last_metrics.target_cosine, one.last_metrics.target_cosine[part]),
        ):
            worst[name] = max(worst[name], relative_error(a, b))
            assert a.dtype == b.dtype
        selected = one.last_selection
        classes = selected.class_index
        classes = classes[(classes >= rows.start) & (classes < rows.stop)]
        assert torch.equal(shared.last_selection.class_index, classes)
        assert torch.equal(shared.last_selection.feature_index, selected.feature_index)
        if options.get("want_metrics"):
            a, b = shared.last_metrics, one.last_metrics
            torch.testing.assert_close(
                a.largest_negative, b.largest_negative[part], rtol=1e-6, atol=1e-7
            )
            assert torch.equal(a.top1, b.top1[part])
        else:
            assert shared.last_metrics.top1 is None
        assert int(shared.step) == int(one.step)
    return worst


def check_equal(ranks, world_size, problem, sizes, tolerance=1e-6, steps=1, **options):
    for rank, errors in enumerate(ranks.run(world_size, compare, problem, sizes, options, steps)):
        for name, error in errors.items():
            assert error <= tolerance, f"{name} on rank {rank}: relative error {error:.3g}"


# ---- equal to one process ----

EVEN = [6, 6, 6, 6]
UNEVEN = [5, 0, 7, 1]

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"margin": CosFace(0.2)},
    {"margin": SphereFace(1.5)},
    {"margin": CombinedMargin(1.1, 0.3, 0.1)},
    {"margin": per_sample_margin(24)},
    {"margin": CombinedMargin(1.0, 0.2, per_sample_margin(24).m3), "reduction": "none"},
    {"margin_grad": "exact"},
    {"beyond_pi": "linear", "margin": ArcFace(1.5)},
    {"interclass_filter": 0.1},
    {"ignore_index": 3},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"sparse_grad": True},
    {"grad_average": False},
    {"uneven_batches": False},
    {"workspace_bytes": 0},
    {"want_metrics": True},
    {"scale": 200.0},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(ranks, world_size, options):
    ignored = 0 if "ignore_index" in options else 3
    problem = random_problem(24, 151, 16, closeness=0.5, ignored=ignored)
    problem.labels[4:6] = 3
    problem.labels[7] = problem.labels[20]
    rates = {"sample_rate": 0.3, "feature_rate": 0.5}
    check_equal(ranks, world_size, problem, EVEN, steps=2, **rates, **options)


@pytest.mark.pairs
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.1, 1.0), (1.0, 0.5), (0, 1.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_uneven_and_empty_batches(ranks, world_size, rates, reduction):
    problem = random_problem(13, 1000, 16, closeness=0.5, ignored=2)
    options = {"sample_rate": rates[0], "feature_rate": rates[1], "reduction": reduction}
    check_equal(ranks, world_size, problem, UNEVEN, steps=2, want_metrics=True, **options)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 9, 255, 257, 600])
def test_class_counts_that_divide_by_nothing(ranks, world_size, num_classes):
    # With 1, 2, 3, 5 and 9 classes some of four ranks own none.
    problem = random_problem(24, num_classes, 8, closeness=0.5)
    for sample_rate in (0.0, 0.3, 1.0):
        check_equal(ranks, world_size, problem, UNEVEN, sample_rate=sample_rate)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("scale", [64.0, 200.0])
def test_labels_of_one_rank_only(ranks, rank, scale):
    problem = random_problem(24, 600, 8)
    start, stop = sharding.class_range(600, 4, rank)
    problem.labels[:] = start + problem.labels % (stop - start)
    check_equal(ranks, 4, problem, EVEN, sample_rate=0.1, scale=scale)


@pytest.mark.parametrize("sizes", [[0, 0, 0, 0], [3, 0, 2, 1]], ids=str)
@pytest.mark.parametrize("scale", [64.0, 200.0])
@pytest.mark.parametrize("sample_rate", [0.3, 0.0])
def test_nothing_to_learn(ranks, sizes, scale, sample_rate):
    problem = random_problem(6, 151, 8, ignored=6)
    check_equal(ranks, 3, problem, sizes, tolerance=0, sample_rate=sample_rate, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_embeddings_of_half_precision(ranks, dtype):
    problem = random_problem(24, 151, 16, closeness=0.5)
    problem = Problem(problem.embeddings.to(dtype), problem.labels, problem.prototypes)
    # The sum over ranks is rounded once: gradients differ by that.
    check_equal(ranks, 3, problem, UNEVEN, tolerance=float(torch.finfo(dtype).eps))


@settings(max_examples=30)
@given(
    world_size=st.sampled_from(WORLD_SIZES),
    num_classes=st.integers(1, 700),
    sizes=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    sample_rate=st.floats(0.01, 1),
    scale=st.sampled_from([1.0, 64.0, 150.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.integers(0, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_problem(
    ranks, world_size, num_classes, sizes, sample_rate, scale, reduction, ignored, seed
):
    problem = random_problem(sum(sizes), num_classes, 12, seed=seed % 1000, ignored=ignored)
    options = {"sample_rate": sample_rate, "scale": scale, "reduction": reduction, "seed": seed}
    # Where one class outweighs the others gradients cancel: 1e-6 is for what is conditioned.
    check_equal(ranks, world_size, problem, sizes, tolerance=1e-5, **options)


def twice(group, problem, sizes):
    results = []
    for _ in range(2):
        module = make(600, 16, sample_rate=0.3, feature_rate=0.5, process_group=group)
        part = own(sizes, dist.get_rank(group))
        margin, upstream = ArcFace(0.3), torch.ones(())
        results.append(
            derive(module, problem.embeddings[part], problem.labels[part], margin, upstream)
        )
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), float(results[0][0])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_two_runs_are_bit_identical_and_ranks_have_the_same_loss(ranks, world_size):
    results = ranks.run(world_size, twice, random_problem(24, 600, 16), EVEN)
    assert all(same for same, _ in results)
    assert len({loss for _, loss in results}) == 1


def backward_twice(group, sparse):
    module = make(600, 16, sample_rate=0.3, process_group=group, sparse_grad=sparse)
    x = torch.randn(6, 16, requires_grad=True)
    loss = module(x, torch.arange(6) + dist.get_rank(group))
    first = torch.autograd.grad(loss, (x, module.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, module.weight))
    return all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_second_backward_through_a_kept_graph(ranks, sparse):
    assert ranks.run(2, backward_twice, sparse) == [True, True]


def call_function(group, problem, sizes):
    """The function with this rank's part of class_index, and the whole in one process."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    num_classes = len(problem.prototypes)
    start, stop = sharding.class_range(num_classes, world_size, rank)
    part = own(sizes, rank)
    right = solve(functional.partial_margin_softmax, problem)
    options = dict(problem.options)
    classes = options.pop("class_index", None)
    if classes is not None:
        classes = classes[(classes >= start) & (classes < stop)]
    mine = Problem(
        problem.embeddings[part],
        problem.labels[part],
        problem.prototypes[start:stop],
        options | {"class_index": classes, "process_group": group, "num_classes": num_classes},
        None if problem.upstream is None else problem.upstream[part],
    )
    got = solve(functional.partial_margin_softmax, mine)
    loss = right.loss[part] if right.loss.dim() else right.loss
    return max(
        relative_error(got.loss, loss),
        relative_error(got.grad_embeddings, right.grad_embeddings[part] * world_size),
        relative_error(got.grad_prototypes, right.grad_prototypes[start:stop]),
    )


@pytest.mark.pairs
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sampled", [None, 60])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_function(ranks, world_size, sampled, reduction):
    sizes = UNEVEN[:world_size]
    problem = random_problem(
        sum(sizes), 151, 16, ignored=2, sampled=sampled, features=9, reduction=reduction
    )
    assert max(ranks.run(world_size, call_function, problem, sizes)) < 1e-6


def golden(group, path: Path):
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    problem, right = load(path)
    options = dict(problem.options, reduction="mean")
    start, stop = sharding.class_range(len(problem.prototypes), world_size, rank)
    classes = options["class_index"]
    options["class_index"] = classes[(classes >= start) & (classes < stop)]
    part = own([len(problem.labels) // world_size] * world_size, rank)
    mine = Problem(
        problem.embeddings[part],
        problem.labels[part],
        problem.prototypes[start:stop],
        options | {"process_group": group, "num_classes": len(problem.prototypes)},
    )
    got = solve(functional.partial_margin_softmax, mine)
    return (
        abs(float(got.loss) / float(right["loss"][rank]) - 1),
        relative_error(got.grad_embeddings, torch.from_numpy(right["grad_embeddings"])[part]),
        relative_error(got.grad_prototypes, torch.from_numpy(right["grad_prototypes"])[start:stop]),
    )


def test_golden_vector_of_two_ranks(ranks):
    path = Path(__file__).parents[1] / "data" / "golden" / "unicom_2ranks.npz"
    for errors in ranks.run(2, golden, path):
        assert max(errors) < 1e-5


# ---- initial prototypes ----


def test_initial_prototypes_depend_on_seed_and_class_alone():
    whole = make(1000, 12).weight.detach()
    assert abs(float(whole.std()) / 0.01 - 1) < 0.03
    assert abs(float(whole.mean())) < 1e-3
    assert torch.equal(make(1300, 12).weight[:1000], whole)
    assert torch.equal(make(300, 12, dtype=torch.float64).weight, whole[:300].double())
    assert torch.equal(make(300, 12, dtype=torch.bfloat16).weight, whole[:300].bfloat16())
    other = make(1000, 12, seed=12).weight
    assert abs(float(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1])) < 0.05
    rows = whole / whole.norm(dim=1, keepdim=True)
    assert float((rows @ rows.T).fill_diagonal_(0).abs().max()) < 0.99  # no class is another


def initial_rows(group):
    shared = make(1000, 12, process_group=group)
    return shared.shard.start, shared.weight.detach()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_initial_prototypes_are_the_same_at_any_number_of_ranks(ranks, world_size):
    parts = ranks.run(world_size, initial_rows)
    assert [start for start, _ in parts] == sorted(start for start, _ in parts)
    assert torch.equal(torch.cat([rows for _, rows in parts]), make(1000, 12).weight)


@given(num_classes=st.integers(1, 10**9), world_size=st.integers(1, 2000))
def test_class_ranges_cover_all_classes_once(num_classes, world_size):
    ranges = [sharding.class_range(num_classes, world_size, rank) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_classes
    for (_, stop), (start, _) in pairwise(ranges):
        assert stop == start
    sizes = torch.tensor([stop - start for start, stop in ranges])
    assert sizes.max() == -(-num_classes // world_size)
    chunks = [len(c) for c in torch.arange(min(num_classes, 3000)).chunk(world_size)]
    if num_classes <= 3000:  # torch.chunk is what DTensor shards by
        assert [s for s in sizes.tolist() if s] == chunks


# ---- bad input: every rank raises ----


def disagree(group, name, mine, theirs):
    value = theirs if dist.get_rank(group) == 1 else mine
    arguments = {"embedding_size": 8, "num_classes": 100, name: value}
    try:
        PartialMarginSoftmax(**arguments, process_group=group)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        ("num_classes", 100, 101),
        ("embedding_size", 8, 9),
        ("seed", 0, 7),
        ("sample_rate", 0.5, 0.25),
        ("feature_rate", 1.0, 0.5),
        ("dtype", torch.float32, torch.float64),
        ("margin", ArcFace(0.3), CosFace(0.35)),
        ("scale", 64.0, 32.0),
        ("reduction", "mean", "sum"),
    ],
)
def test_ranks_that_disagree(ranks, name, mine, theirs):
    messages = ranks.run(3, disagree, name, mine, theirs)
    assert len(set(messages)) == 1
    expected = f"ValueError: {name} must be the same on every rank, got {mine} on ranks 0, 2, "
    assert messages[0] == expected + f"{theirs} on rank 1"


def test_a_bad_option_on_one_rank(ranks):
    first, second, third = ranks.run(3, disagree, "scale", 64.0, -1.0)
    assert second == "ValueError: scale must be a finite number > 0, got -1.0"
    assert first == third == f"RankFailed: rank 1 of the process group raised {second}"


def bad_call(group, changes, rank, again=True):
    """What each rank raises when one has bad arguments; then all go on with good ones."""
    module = make(50, 6, process_group=group, sample_rate=0.5, check_inputs=True)
    good = {"embeddings": torch.ones(4, 6), "labels": torch.arange(4)}
    mine = {**good, **changes} if dist.get_rank(group) == rank else good
    try:
        module(**mine)
        message = None
    except (ValueError, TypeError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    assert int(module.step) == 0
    assert module.last_selection is None
    assert module(**good).isfinite()
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 50, 3])}, "in [0, 50) or ignore_index (-100), got 50 at"),
        ({"labels": torch.tensor([0, -1, 50, 3])}, "got -1 at position 1"),
        ({"labels": torch.arange(5)}, "labels must have shape [4], or [4, P] for several"),
        ({"labels": [0, 1, 2, 3]}, "labels must be an int32 or int64 tensor, or a pair"),
        ({"embeddings": torch.ones(4, 7)}, "embeddings must be [B, 6]"),
        ({"embeddings": torch.full((4, 6), torch.nan)}, "embeddings must be finite"),
        ({"margin": per_sample_margin(3)}, "margin.m2 must have shape [4], got [3]"),
        ({"margin": 0.3}, "margin must be a CombinedMargin"),
        ({"step": 0.5}, "step must be an int"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_argument_on_one_rank(ranks, changes, message):
    messages = ranks.run(3, bad_call, changes, 2)
    assert message in messages[2]
    assert not messages[2].startswith("RuntimeError")
    assert (
        messages[0]
        == messages[1]
        == f"RankFailed: rank 2 of the process group raised {messages[2]}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 5}, "step must be the same on every rank, got 0 on ranks 0, 1, 5 on rank 2"),
        ({"embeddings": torch.ones(4, 6).double()}, "embeddings.dtype must be the same"),
        (
            {"margin": per_sample_margin(4)},
            "ArcFace(0.3) on ranks 0, 1, CombinedMargin(m1=1.0, m2=per",
        ),
    ],
    ids=str,
)
def test_arguments_that_differ_between_ranks(ranks, changes, message):
    messages = ranks.run(3, bad_call, changes, 2)
    assert len(set(messages)) == 1
    assert message in messages[0]


def bad_class_index(group):
    rank = dist.get_rank(group)
    start, stop = sharding.class_range(50, 3, rank)
    classes = torch.arange(start, stop)
    try:
        functional.partial_margin_softmax(
            torch.ones(4, 6),
            torch.tensor([0, 20, 30, 49]),
            torch.ones(stop - start, 6),
            class_index=classes if rank != 1 else classes[4:],  # without the label 20
            margin=ArcFace(0.3),
            scale=64.0,
            process_group=group,
            num_classes=50,
        )
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_failure_between_the_messages(ranks):
    messages = ranks.run(3, bad_class_index)
    assert "class_index must hold every label, but 20 at position" in messages[1]
    assert (
        messages[0]
        == messages[2]
        == f"RankFailed: rank 1 of the process group raised {messages[1]}"
    )


def wrong_prototypes(group):
    errors = []
    for rows, num_classes in ((50, 50), (25, None)):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            functional.partial_margin_softmax(
                torch.ones(4, 6), torch.arange(4), torch.ones(rows, 6), margin=ArcFace(0.3),
                scale=64.0, process_group=group, num_classes=num_classes,
            )  # fmt: skip
        errors.append(str(caught.value))
    return errors


def test_prototypes_that_are_not_the_ranks_own(ranks):
    for rank, (rows, classes) in enumerate(ranks.run(2, wrong_prototypes)):
        assert f"prototypes must be [25, d] on rank {rank} of 2, the classes from" in rows
        assert "got [50, 6]" in rows
        assert "num_classes must be the number of classes of all ranks" in classes


def without_exchange(group):
    module = make(50, 6, process_group=group, uneven_batches=False)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.profiler.profile() as profile:
        module(x, torch.arange(4)).backward()
    return [event.name for event in profile.events() if event.name.startswith("gloo:")]


def test_equal_batches_need_no_exchange_of_sizes(ranks):
    for calls in ranks.run(3, without_exchange):
        # Labels and embeddings; one sum; the gradients, which each rank then sums.
        assert sorted(calls) == ["gloo:all_gather"] * 2 + ["gloo:all_reduce", "gloo:all_to_all"]


BAD_WITH_EQUAL_BATCHES = [
    ({"labels": torch.tensor([0, 1, 99, 3])}, "got 99 at position 2"),
    ({"labels": torch.arange(5)}, "labels must have shape [4], or [4, P] for several"),
    ({"labels": [0, 1, 2, 3]}, "labels must be an int32 or int64 tensor, or a pair"),
    ({"embeddings": torch.ones(4, 7)}, "embeddings must be [B, 6]"),
    ({"embeddings": torch.full((4, 6), torch.nan)}, "embeddings must be finite"),
    ({"embeddings": torch.ones(4, 6, dtype=torch.int64)}, "embeddings must be a float32, float64"),
    ({"margin": 0.3}, "margin must be a CombinedMargin"),
    ({"step": 0.5}, "step must be an int"),
]  # fmt: skip


def bad_call_with_equal_batches(group, changes, seen_at_once):
    """Messages of the call with bad arguments and of the one after it, for what they raise; the
    loss and the gradients of the former; and whether a third call is good."""
    module = make(
        50, 6, process_group=group, uneven_batches=False, check_inputs=True, sample_rate=0.5,
        sparse_grad=not seen_at_once,
    )  # fmt: skip
    good = {"embeddings": torch.ones(4, 6), "labels": torch.arange(4), "step": 0}
    bad = {**good, **changes} if dist.get_rank(group) == 1 else dict(good)
    if bad["embeddings"].is_floating_point():
        bad["embeddings"] = bad["embeddings"].clone().requires_grad_()
    messages, loss, gradients = [], None, []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        if not seen_at_once:  # as on CUDA
            patch.setattr(failures, "_host_sees", lambda device: False)
        for arguments in (bad, good):
            try:
                result = module(**arguments)
                if arguments is bad:
                    result.backward()
                    loss = float(result.detach())
                    gradients = [module.weight.grad.to_dense(), bad["embeddings"].grad]
                messages.append(None)
            except (ValueError, TypeError, RuntimeError) as error:
                notes = getattr(error, "__notes__", [])
                messages.append(" ".join([f"{type(error).__name__}: {error}", *notes]))
        again = bool(module(**good).isfinite())
        failures.failures_of(group).raise_earlier()  # the good call left nothing behind
    return messages, loss, gradients, [str(w.message) for w in warned], again


@pytest.mark.parametrize(("changes", "message"), BAD_WITH_EQUAL_BATCHES, ids=str)
def test_a_bad_argument_on_one_rank_with_equal_batches(ranks, changes, message):
    for rank, outcome in enumerate(ranks.run(3, bad_call_with_equal_batches, changes, True)):
        (first, second), *_, again = outcome
        assert message in first
        assert first.startswith("RankFailed: rank") == (rank != 1)
        assert second is None
        assert again


@pytest.mark.parametrize(("changes", "message"), BAD_WITH_EQUAL_BATCHES, ids=str)
def test_a_bad_argument_where_the_host_cannot_look(ranks, changes, message):
    """The step ends with the loss NaN and no gradients, and in the next one every rank raises."""
    for rank, outcome in enumerate(ranks.run(3, bad_call_with_equal_batches, changes, False)):
        (first, second), loss, gradients, warned, again = outcome
        assert first is None
        assert math.isnan(loss)
        assert all(g is None or not g.any() for g in gradients)
        assert message in second
        assert second.startswith("RankFailed: rank 1 of") == (rank != 1)
        assert len(warned) == (rank == 1)
        assert again


def saved_after_a_failure(group, path):
    module = make(50, 6, process_group=group, uneven_batches=False)
    x, labels = torch.ones(4, 6), torch.arange(5 if dist.get_rank(group) == 1 else 4)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(failures, "_host_sees", lambda device: False)
        module(x, labels)
        with pytest.raises(
            (ValueError, RuntimeError), match=r"must have shape \[4\], .* got \[5\]"
        ):
            checkpoint.save(path, modules={"loss": module})
        checkpoint.save(path, modules={"loss": module})


def test_a_failed_step_is_not_saved_in_silence(ranks, tmp_path):
    ranks.run(2, saved_after_a_failure, tmp_path / "c")


def distributed_tensors(group):
    mesh, messages = DeviceMesh.from_group(group, "cpu"), []
    good = {"embeddings": torch.ones(4, 6), "labels": torch.arange(4)}
    for options in (
        {},
        {"process_group": group},
        {"process_group": group, "uneven_batches": False},
    ):
        module = make(50, 6, **options)
        for name, value in good.items():
            with pytest.raises(TypeError) as caught:
                module(**{**good, name: DTensor.from_local(value, mesh, [Shard(0)])})
            messages.append(str(caught.value))
        assert module(**good).isfinite()
    return messages


def test_distributed_tensors_are_refused(ranks):
    for messages in ranks.run(2, distributed_tensors):
        for message, name in zip(messages, 3 * ["embeddings", "labels"], strict=True):
            assert message.startswith(f"{name} must be this rank's own, got a DTensor")


def a_label_of_no_class(group):
    module = make(50, 6, process_group=group, uneven_batches=False)
    label = 99 if dist.get_rank(group) == 1 else 3
    with pytest.raises(ValueError, match="got 99 at position 6") as caught:
        module(torch.ones(4, 6), torch.tensor([0, 1, label, 2]))
    return "".join(getattr(caught.value, "__notes__", []))


def test_positions_of_bad_labels_count_through_all_batches(ranks):
    for note in ranks.run(3, a_label_of_no_class):
        assert "in rank order" in note


def destroyed(group):
    other = dist.new_group([0, 1])
    module = make(50, 6, process_group=other)
    batch = torch.ones(2, 6), torch.arange(2)
    module(*batch).backward()
    dist.destroy_process_group(other)
    with pytest.raises(ValueError, match="process_group was destroyed"):
        module(*batch)
    with pytest.raises(ValueError, match="process_group was destroyed"):
        make(50, 6, process_group=other)
    # Gloo's threads end with the group, so nothing of ours may keep it, the loss neither: a thread
    # that is left when the interpreter ends can abort a process that had done all its work.
    left = weakref.ref(other)
    del other
    gc.collect()
    assert left() is None
    with pytest.raises(ValueError, match="process_group was destroyed"):
        module(*batch)


def test_a_group_that_was_destroyed(ranks):
    # All four ranks must make the new group.
    ranks.run(4, destroyed_on_the_first_two)


def destroyed_on_the_first_two(group):
    if dist.get_rank(group) < 2:
        return destroyed(group)
    outsider = dist.new_group([0, 1])
    with pytest.raises(ValueError, match="that this rank is in"):
        make(50, 6, process_group=outsider)


def compiled(group, whole, options):
    """Compiled steps are those of a module that is not; returns how many selections were drawn."""
    module = make(200, 6, process_group=group, sample_rate=0.5, feature_rate=0.5, **options)
    torch.compiler.reset()
    step = torch.compile(lambda x, y: module(2 * x, y) * 2, backend="aot_eager", fullgraph=whole)
    labels = torch.arange(4) + dist.get_rank(group)
    drawn = set()
    for _ in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        plain = module(2 * x, labels, step=int(module.step)) * 2
        upstream = torch.ones_like(plain)
        right = torch.autograd.grad(plain, (x, module.weight), upstream)
        loss = step(x, labels)
        assert torch.equal(loss, plain)
        for got, expected in zip(
            torch.autograd.grad(loss, (x, module.weight), upstream), right, strict=True
        ):
            got, expected = (g.to_dense() if g.is_sparse else g for g in (got, expected))
            torch.testing.assert_close(got, expected)
        drawn.add(tuple(module.last_selection.feature_index.tolist()))
    return len(drawn)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({"reduction": "none"}, {"want_metrics": True}, {"sparse_grad": True})
        ),
    ],
    ids=str,
)
def test_one_graph_holds_the_whole_step(ranks, options):
    options = {"uneven_batches": False, **options}
    assert ranks.run(2, compiled, True, options) == [3, 3]


@pytest.mark.slow
def test_graphs_compile_around_an_exchange_of_sizes(ranks):
    assert ranks.run(2, compiled, False, {}) == [3, 3]
    for outcome in ranks.outcomes(2, compiled, True, {}):
        assert "give the loss uneven_batches=False to compile it whole" in str(outcome)


# ---- bytes on the wire ----


def measured_bytes(group, batch, dim, options):
    module = make(300, dim, process_group=group, **options)
    x = torch.randn(batch, dim, requires_grad=True)
    labels = torch.arange(batch)
    margin = per_sample_margin(batch) if options.get("reduction") == "none" else None
    steps = 4

    def step():
        loss = module(x, labels, margin=margin)
        loss.backward(torch.ones_like(loss))

    step()  # connections are made
    dist.barrier(group)
    before = wire_bytes.bytes_sent()
    for _ in range(steps):
        step()
    sent = (wire_bytes.bytes_sent() - before) / steps
    dist.barrier(group)
    return sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"uneven_batches": False}, {"reduction": "none"}], ids=str)
def test_the_communication_volume_is_what_is_sent(ranks, world_size, options):
    batch, dim = 96, 256
    sent = ranks.run(world_size, measured_bytes, batch, dim, options)
    volume = sharding.communication_volume(
        batch,
        dim,
        world_size,
        uneven_batches=options.get("uneven_batches", True),
        reduction=options.get("reduction", "mean"),
        per_sample_margins=2 if options.get("reduction") == "none" else 0,
    )
    if world_size == 1:
        assert sent == [0]
        assert volume.total == 0
        return
    # Gloo adds a header to each message and handles a few without a ring.
    average = sum(sent) / world_size
    assert volume.total <= average < 1.02 * volume.total + 4000
