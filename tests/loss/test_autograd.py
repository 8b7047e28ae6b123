"""How the operator behaves inside torch: gradients, graphs, threads, compilation, autocast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.problems import (
    Problem,
    per_sample_margin,
    random_problem,
    relative_error,
    solve,
    truth,
)
from torch.library import opcheck

from unicom_ext import PartialMarginSoftmax, _engine
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace, SphereFace

ops = torch.ops.unicom_ext


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        problem.embeddings.clone().requires_grad_(),
        problem.prototypes.clone().requires_grad_(),
    )


def assert_all_equal(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- gradients


@pytest.mark.pairs
@pytest.mark.parametrize(
    "margin",
    [ArcFace(0.3), CosFace(0.35), SphereFace(1.35), CombinedMargin(1.1, 0.2, 0.1), "each"],
    ids=repr,
)
@pytest.mark.parametrize("beyond_pi", ["keep", "linear"])
def test_gradcheck(margin, beyond_pi, any_backend):
    problem = random_problem(
        7,
        11,
        6,
        ignored=1,
        sampled=9,
        features=5,
        dtype=torch.float64,
        margin=per_sample_margin(7) if margin == "each" else margin,
        scale=8.0,
        margin_grad="exact",
        beyond_pi=beyond_pi,
        interclass_filter=0.3,
        reduction="none",
    )
    x, w = leaves(problem)
    assert torch.autograd.gradcheck(
        lambda x, w: partial_margin_softmax(x, problem.labels, w, **problem.options),
        (x, w),
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_a_reduced_loss(reduction, any_backend):
    problem = random_problem(
        7, 11, 6, dtype=torch.float64, scale=8.0, margin_grad="exact", reduction=reduction
    )
    x, w = leaves(problem)
    assert torch.autograd.gradcheck(
        lambda x, w: partial_margin_softmax(x, problem.labels, w, **problem.options),
        (x, w),
        fast_mode=True,
    )


@pytest.mark.parametrize("needed", ["embeddings", "prototypes", "neither"])
def test_gradients_nobody_asked_for_are_not_there(needed, capability):
    problem = random_problem(33, 131, 37)
    both = solve(partial_margin_softmax, problem)
    x, w = problem.embeddings.clone(), problem.prototypes.clone()
    x.requires_grad_(needed == "embeddings")
    w.requires_grad_(needed == "prototypes")
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    assert torch.equal(loss.detach(), both.loss)
    assert loss.requires_grad == (needed != "neither")
    if needed != "neither":
        loss.backward()
    if needed == "embeddings":
        assert torch.equal(x.grad, both.grad_embeddings)
    elif needed == "prototypes":
        assert torch.equal(w.grad, both.grad_prototypes)
    assert x.requires_grad == (x.grad is not None)
    assert w.requires_grad == (w.grad is not None)


def test_no_grad(any_backend):
    problem = random_problem(33, 131, 37)
    x, w = leaves(problem)
    with torch.no_grad():
        loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    with torch.inference_mode():
        inference = partial_margin_softmax(x, problem.labels, w, **problem.options)
    assert not loss.requires_grad
    assert torch.equal(loss, solve(partial_margin_softmax, problem).loss)
    assert torch.equal(loss, inference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_flow_on_to_what_made_the_inputs(dtype, any_backend):
    problem = random_problem(33, 131, 37, dtype=dtype)
    plain = solve(partial_margin_softmax, problem)
    x, w = leaves(problem)
    partial_margin_softmax(2 * x, problem.labels, w.clone(), **problem.options).backward()
    # The loss does not depend on the length of a row, so its gradient halves and doubles again.
    assert torch.equal(x.grad, plain.grad_embeddings)
    assert torch.equal(w.grad, plain.grad_prototypes)


# --- several passes


def test_a_second_backward_through_a_kept_graph(any_backend):
    problem = random_problem(33, 131, 37, sampled=80)
    x, w = leaves(problem)
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert_all_equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w))


def test_the_gradient_of_a_gradient_is_refused():
    # Taken for nothing, a penalty on the gradient would have no effect, in silence.
    problem = random_problem(9, 17, 8)
    x, w = leaves(problem)
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    grads = torch.autograd.grad(loss, (x, w), create_graph=True)
    assert_all_equal(grads, solve(partial_margin_softmax, problem)[1:])
    for grad in grads:
        with pytest.raises(RuntimeError, match="differentiated only once"):
            (loss + grad.square().sum()).backward(retain_graph=True)


def test_two_forwards_before_two_backwards(capability):
    problems = [
        random_problem(33, 131, 37, seed=1, sampled=80),
        random_problem(40, 200, 16, seed=2, margin=CosFace(0.2), precision="fp32"),
        random_problem(33, 131, 37, seed=3, dtype=torch.float64),
    ]
    alone = [solve(partial_margin_softmax, problem) for problem in problems]
    inputs = [leaves(problem) for problem in problems]
    losses = [
        partial_margin_softmax(x, problem.labels, w, **problem.options)
        for (x, w), problem in zip(inputs, problems, strict=True)
    ]
    for i in (1, 0, 2):
        grads = torch.autograd.grad(losses[i], inputs[i])
        assert_all_equal(grads, alone[i][1:])


def test_threads_do_not_disturb_each_other(capability):
    problems = [random_problem(65, 700, 48, seed=seed, sampled=300) for seed in range(4)]
    alone = [solve(partial_margin_softmax, problem) for problem in problems]

    def forward(problem):
        x, w = leaves(problem)
        return partial_margin_softmax(x, problem.labels, w, **problem.options), x, w

    def backward(node):
        loss, x, w = node
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            nodes = list(pool.map(forward, problems))
            for got, right in zip(pool.map(backward, nodes), alone, strict=True):
                assert_all_equal(got, right)
            for got, right in zip(
                pool.map(lambda p: solve(partial_margin_softmax, p), problems), alone, strict=True
            ):
                assert_all_equal(got, right)


def test_changing_an_input_before_backward_is_an_error(any_backend):
    problem = random_problem(33, 131, 37)
    x, w = leaves(problem)
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inputs_are_never_modified(dtype, any_backend):
    problem = random_problem(
        33,
        131,
        37,
        sampled=80,
        features=30,
        ignored=4,
        dtype=dtype,
        margin=per_sample_margin(33),
        reduction="none",
    )
    x, w = leaves(problem)
    inputs = {
        "embeddings": x,
        "labels": problem.labels,
        "prototypes": w,
        "m2": problem.options["margin"].m2,
        "m3": problem.options["margin"].m3,
        "class_index": problem.options["class_index"],
        "feature_index": problem.options["feature_index"],
        "upstream": problem.upstream,
    }
    before = {name: (value.detach().clone(), value._version) for name, value in inputs.items()}
    loss = partial_margin_softmax(x, problem.labels, w, **problem.options)
    loss.backward(problem.upstream.to(loss))
    for name, (value, version) in before.items():
        assert torch.equal(inputs[name], value), name
        assert inputs[name]._version == version, name


# --- the same bits


SIZES = [(70, 5000, 32), (1, 3000, 40), (600, 300, 17), (3, 70, 500)]


@pytest.mark.pairs
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float64}, {"precision": "bf16"}, {"scale": 1000.0}],
    ids=["fp32", "fp64", "bf16", "maximum"],
)
def test_the_same_bits_at_any_number_of_threads_and_again(shape, options, capability, set_threads):
    problem = random_problem(*shape, features=shape[2] * 3 // 4, **options)
    problem.labels[::3] = problem.labels[0]  # sums of duplicates have an order too
    set_threads(1)
    one = solve(partial_margin_softmax, problem)
    assert_all_equal(one, solve(partial_margin_softmax, problem))
    for threads in (2, 3):
        set_threads(threads)
        assert_all_equal(one, solve(partial_margin_softmax, problem))


def test_samples_do_not_depend_on_their_neighbours(capability):
    problem = random_problem(70, 700, 48, reduction="none")
    whole = partial_margin_softmax(
        problem.embeddings, problem.labels, problem.prototypes, **problem.options
    )
    for part in (slice(0, 1), slice(3, 10), slice(10, 70)):
        alone = partial_margin_softmax(
            problem.embeddings[part], problem.labels[part], problem.prototypes, **problem.options
        )
        assert torch.equal(whole[part], alone)


# --- torch.library and torch.compile


def loss_arguments(
    problem: Problem, reduction: int = 1, workspace_bytes: int = 1 << 20, sparse: bool = False
) -> tuple:
    x, w = leaves(problem)
    classes = problem.options.get("class_index")
    centers = problem.options.get("num_centers", 1)
    num_classes = len(w) // centers
    slot = ops.label_slots(problem.labels, classes, num_classes, -100, 0, num_classes)
    features = problem.options.get("feature_index")
    return (
        *(
            x,
            slot,
            w,
            classes,
            None,
            features,
            None,
            None,
            torch.tensor(64.0).double().requires_grad_(),
        ),
        [1.0, 0.3, 0.1, 64.0, float("inf"), 0.1 if centers == 1 else 0.0],
        [False, False, 0, reduction, 0, workspace_bytes, sparse, centers, True],
    )


@pytest.mark.slow
@pytest.mark.pairs
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize(("reduction", "workspace_bytes"), [(0, 0), (1, 1 << 20), (2, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_the_loss(selected, reduction, workspace_bytes, dtype):
    selection = {"sampled": 80, "features": 5} if selected else {}
    problem = random_problem(7, 120, 6, ignored=1, dtype=dtype, **selection)
    opcheck(ops.loss, loss_arguments(problem, reduction, workspace_bytes))


@pytest.mark.parametrize("workspace_bytes", [0, 1500, 1 << 20])
@pytest.mark.parametrize("sampled", [None, 20])
def test_shapes_of_several_centers(sampled, workspace_bytes):
    problem = random_problem(7, 90, 6, sampled=sampled, num_centers=3)
    opcheck(ops.loss, loss_arguments(problem, 1, workspace_bytes), test_utils="test_faketensor")


@pytest.mark.parametrize("centers", [1, 3])
def test_opcheck_of_the_backward_operator(centers):
    problem = random_problem(7, 11, 6, sampled=9, features=5, num_centers=centers)
    arguments = loss_arguments(problem)
    *_, state, packed, kept = ops.loss(
        *(a.detach() if torch.is_tensor(a) else a for a in arguments)
    )
    x, slot, w, classes, count, features = (
        a.detach() if torch.is_tensor(a) else a for a in arguments[:6]
    )
    reals, codes = arguments[9:]
    for compact in (False, True):
        opcheck(
            ops.loss_backward,
            (
                *(torch.ones(()), x, slot, w, classes, count, features, state, packed, kept),
                *(reals, codes, True, True, True, compact),
            ),
        )


def test_opcheck_of_the_operators_between_collectives():
    problem = random_problem(7, 11, 6, sampled=9, features=5)
    x, slot, w, classes, count, features, _, _, _, reals, codes = loss_arguments(problem)
    tensors = (x.detach(), slot, w.detach(), classes, count, features)
    arguments = (*tensors, 20, reals, codes)
    opcheck(ops.loss_sums, arguments)
    sums, exponent, _largest, inverse_norm, *_ = ops.loss_sums(*arguments)
    opcheck(ops.loss_merge, (sums, exponent, inverse_norm, slot, None, None, reals, codes))


def test_opcheck_of_the_selections():
    labels, step = torch.tensor([3, 700, -100, 3]), torch.tensor(5)
    opcheck(ops.select_classes, (labels, step, 1000, 100, 0, -100, 0, 1000))
    opcheck(ops.select_features, (step, 64, 16, 0))
    opcheck(ops.label_slots, (labels, torch.arange(0, 1000), 1000, -100, 0, 1000))
    opcheck(ops.label_slots, (labels.int(), None, 1000, -100, 0, 1000))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_calls_draw_a_new_selection_each(fresh_compiler):
    eager, compiled_module = (
        PartialMarginSoftmax(16, 500, sample_rate=0.1, feature_rate=0.5, seed=3) for _ in range(2)
    )
    compiled_module.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    drawn = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(20):
            problem = random_problem(8, 500, 16, seed=i)
            x = problem.embeddings.requires_grad_()
            right = eager(x, problem.labels)
            (right_grad,) = torch.autograd.grad(right, x)
            loss = compiled(x, problem.labels)
            (grad,) = torch.autograd.grad(loss, x)
            assert torch.equal(loss, right)
            assert torch.equal(grad, right_grad)
            selection = compiled_module.last_selection
            assert torch.equal(selection.class_index, eager.last_selection.class_index)
            assert torch.equal(selection.feature_index, eager.last_selection.feature_index)
            drawn.add((*selection.class_index.tolist(), *selection.feature_index.tolist()))
    assert len(drawn) == 20
    assert int(compiled_module.step) == 20


@pytest.mark.first
@pytest.mark.slow
def test_the_default_compiler(fresh_compiler):
    module = PartialMarginSoftmax(16, 50, sample_rate=0.5, feature_rate=0.5, seed=1)
    compiled = torch.compile(module, fullgraph=True)
    problem = random_problem(8, 50, 16)
    x = problem.embeddings.requires_grad_()
    for step in range(2):
        loss = compiled(x, problem.labels)
        right = module(x, problem.labels, step=step)
        assert torch.equal(loss, right)
        inputs = (x, module.weight)
        assert_all_equal(torch.autograd.grad(loss, inputs), torch.autograd.grad(right, inputs))


def test_the_compiled_function_with_per_sample_margins(fresh_compiler):
    problem = random_problem(8, 50, 16, sampled=20, reduction="none")
    right = solve(partial_margin_softmax, problem.having(margin=per_sample_margin(8)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y, w, *, margin, **options):
        margin = per_sample_margin_of(margin)
        return partial_margin_softmax(x, y, w, margin=margin, **options)

    def per_sample_margin_of(tensors):  # as AdaFace does, from what it sees in the batch
        return CombinedMargin(1.0, tensors[0] * 1.0, tensors[1] * 1.0)

    tensors = torch.stack([per_sample_margin(8).m2, per_sample_margin(8).m3])
    assert_all_equal(solve(compiled, problem.having(margin=tensors)), right)


def test_compiled_batches_of_different_sizes(fresh_compiler):
    module = PartialMarginSoftmax(16, 500, sample_rate=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, batch in enumerate((8, 5, 13)):
        problem = random_problem(batch, 500, 16)
        x = problem.embeddings.requires_grad_()
        loss = compiled(x, problem.labels, step=torch.tensor(i))
        right = module(x, problem.labels, step=torch.tensor(i))
        assert torch.equal(loss, right)
        assert_all_equal(torch.autograd.grad(loss, x), torch.autograd.grad(right, x))


# --- autocast


def test_autocast_uses_bf16_where_the_cpu_has_it(capability):
    problem = random_problem(64, 300, 512, closeness=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = solve(partial_margin_softmax, problem)
        explicit = solve(partial_margin_softmax, problem.having(precision="fp32"))
    fast = "avx512_bf16" in _engine.cpu_capabilities()
    chosen = problem.having(precision="bf16" if fast else "fp32")
    assert_all_equal(got, solve(partial_margin_softmax, chosen))
    assert_all_equal(explicit, solve(partial_margin_softmax, problem.having(precision="fp32")))
    assert got.loss.dtype == torch.float32


def test_a_bf16_encoder_under_autocast(capability):
    torch.manual_seed(0)
    layer, module = torch.nn.Linear(32, 16), PartialMarginSoftmax(16, 50)
    problem = random_problem(8, 50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer(problem.embeddings)
        x.retain_grad()
        loss = module(x, problem.labels)
    loss.backward()
    assert x.dtype == x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == module.weight.grad.dtype == torch.float32
    right = truth(Problem(x.detach(), problem.labels, module.weight.detach(), problem.options))
    assert relative_error(loss.detach(), right.loss) < 1e-2
    assert relative_error(x.grad, right.grad_embeddings) < 3.7e-2
    assert relative_error(module.weight.grad, right.grad_prototypes) < 3.7e-2
