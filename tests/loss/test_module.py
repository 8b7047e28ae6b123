"""`PartialMarginSoftmax`: what it draws, what it keeps, what it hands on to the operator."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from support.problems import Problem, check_fp32, per_sample_margin, random_problem, solve, truth

from unicom_ext import ArcFace, CosFace, PartialMarginSoftmax, reference
from unicom_ext.functional import partial_margin_softmax

NUM_CLASSES, DIM = 1000, 24


def make(**options) -> PartialMarginSoftmax:
    torch.manual_seed(0)
    defaults = {"sample_rate": 0.1, "feature_rate": 0.5, "seed": 11}
    return PartialMarginSoftmax(DIM, NUM_CLASSES, **{**defaults, **options})


def batch(size: int = 16, seed: int = 0, **options) -> Problem:
    return random_problem(size, NUM_CLASSES, DIM, seed=seed, **options)


def drawn(module: PartialMarginSoftmax) -> tuple[list[int], list[int]]:
    selection = module.last_selection
    return selection.class_index.tolist(), selection.feature_index.tolist()


def as_problem(module: PartialMarginSoftmax, problem: Problem, **options) -> Problem:
    """The same call of the function, with what the module has just drawn."""
    selection = module.last_selection
    options = {
        "margin": module.margin,
        "scale": module.scale,
        "class_index": selection.class_index,
        "feature_index": selection.feature_index,
        **options,
    }
    return Problem(problem.embeddings, problem.labels, module.weight.detach(), options)


# --- the loss and its gradient


@pytest.mark.pairs
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.1, 1.0), (1.0, 0.5), (0.1, 0.5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_reference_on_the_selection(rates, training, capability):
    module = make(sample_rate=rates[0], feature_rate=rates[1], margin=CosFace(0.2), scale=30.0)
    module.train(training)
    problem = batch(ignored=3)
    x = problem.embeddings.clone().requires_grad_()
    loss = module(x, problem.labels)
    loss.backward()
    outcome = (loss.detach(), x.grad, module.weight.grad)
    check_fp32(outcome, as_problem(module, problem))


def test_sample_rate_0_is_the_classes_of_the_batch_alone(any_backend):
    module = make(sample_rate=0, feature_rate=1.0, margin=CosFace(0.2), scale=30.0)
    problem = batch(ignored=3)
    x = problem.embeddings.clone().requires_grad_()
    loss = module(x, problem.labels)
    loss.backward()
    positives = problem.labels[problem.labels >= 0].unique()
    assert torch.equal(module.last_selection.class_index, positives)
    check_fp32((loss.detach(), x.grad, module.weight.grad), as_problem(module, problem))


@pytest.mark.parametrize("sparse_grad", [True, False])
@pytest.mark.parametrize("labels", [[-100, -100, -100], []], ids=str)
def test_sample_rate_0_and_nothing_to_learn(sparse_grad, labels, any_backend):
    module = make(sample_rate=0, sparse_grad=sparse_grad)
    x = torch.randn(len(labels), DIM, requires_grad=True)
    loss = module(x, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert len(module.last_selection.class_index) == 0
    assert not x.grad.any()
    assert not module.weight.grad.to_dense().any()


def test_sample_rate_0_evaluates_on_all_classes():
    module = make(sample_rate=0).eval()
    problem = batch(margin=ArcFace(0.3), scale=64.0)
    expected = partial_margin_softmax(
        problem.embeddings, problem.labels, module.weight, **problem.options
    )
    assert torch.equal(module(problem.embeddings, problem.labels), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"margin_grad": "exact"},
        {"beyond_pi": "linear", "margin": ArcFace(1.5)},
        {"interclass_filter": 0.1},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 3},
        {"precision": "bf16"},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_options_reach_the_operator(options):
    module, plain = make(**options), make()
    problem = batch()
    problem.labels[:4] = 3
    assert module.weight.dtype == options.pop("dtype", torch.float32)
    module(problem.embeddings, problem.labels)

    def of(module):
        x = problem.embeddings.clone().requires_grad_()
        loss = module(x, problem.labels, step=0)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, module.weight))

    expected = solve(partial_margin_softmax, as_problem(module, problem, **options))
    got = of(module)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    if options:  # and they matter
        same = [torch.equal(a, b) for a, b in zip(got, of(plain), strict=True)]
        assert not all(same)


def test_defaults_are_those_of_the_function_of_all_classes():
    torch.manual_seed(0)
    module = PartialMarginSoftmax(DIM, NUM_CLASSES)
    problem = batch(margin=ArcFace(0.3), scale=64.0)
    assert module.weight.shape == (NUM_CLASSES, DIM)
    expected = partial_margin_softmax(
        problem.embeddings, problem.labels, module.weight, **problem.options
    )
    assert torch.equal(module(problem.embeddings, problem.labels), expected)


def test_the_margin_of_a_call_comes_before_that_of_the_module(any_backend):
    module = make()
    problem = batch()
    for margin in (CosFace(0.4), per_sample_margin(16)):
        loss = module(problem.embeddings, problem.labels, step=5, margin=margin)
        expected = truth(as_problem(module, problem, margin=margin)).loss
        assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert module.margin == ArcFace(0.3)
    own = module(problem.embeddings, problem.labels, step=5)
    assert own.item() == pytest.approx(float(truth(as_problem(module, problem)).loss), rel=1e-5)


def test_a_per_sample_margin_may_be_the_modules_own():
    module = make(margin=per_sample_margin(16))
    problem = batch()
    loss = module(problem.embeddings, problem.labels)
    assert loss.item() == pytest.approx(float(truth(as_problem(module, problem)).loss), rel=1e-5)


def test_a_sparse_gradient_equals_the_dense_one(capability):
    problem = batch(ignored=2)
    dense, sparse = make(), make(sparse_grad=True)
    for module in (dense, sparse):
        module(problem.embeddings, problem.labels).backward()
    assert sparse.weight.grad.is_sparse
    rows = sparse.weight.grad.coalesce().indices()[0]
    assert torch.equal(rows, sparse.last_selection.class_index)
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_a_sparse_gradient_of_all_classes():
    problem = batch()
    dense, sparse = make(sample_rate=1.0), make(sample_rate=1.0, sparse_grad=True)
    for module in (dense, sparse):
        module(problem.embeddings, problem.labels).backward()
    assert sparse.weight.grad.is_sparse
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_sparse_gradients_accumulate():
    problem = batch()
    dense, sparse = make(), make(sparse_grad=True)
    for module in (dense, sparse):
        for _ in range(3):
            module(problem.embeddings, problem.labels).backward()
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize("sparse", [False, True])
def test_it_learns(sparse):
    module = make(sparse_grad=sparse, sample_rate=0.2, scale=16.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    problem = batch(64)
    module.eval()
    before = module(problem.embeddings, problem.labels).item()
    module.train()
    for _ in range(60):
        optimizer.zero_grad()
        module(problem.embeddings, problem.labels).backward()
        optimizer.step()
    module.eval()
    assert module(problem.embeddings, problem.labels).item() < 0.6 * before


# --- what is drawn


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_more_positives_than_the_quota(label_dtype, capability):
    module = make(sample_rate=0.002, feature_rate=1.0)  # 2 classes
    problem = batch(200)
    x = problem.embeddings.clone().requires_grad_()
    loss = module(x, problem.labels.to(label_dtype))
    loss.backward()
    positives = problem.labels.unique()
    chosen = module.last_selection.class_index
    assert torch.isin(positives, chosen).all()
    assert len(positives) <= len(chosen) <= len(positives) + 2
    assert torch.equal(chosen, chosen.unique())
    check_fp32((loss.detach(), x.grad, module.weight.grad), as_problem(module, problem))


@pytest.mark.parametrize("num_classes", [1, 2, 255, 256, 257, 1023])
def test_class_counts_that_are_multiples_of_nothing(num_classes, capability):
    module = PartialMarginSoftmax(5, num_classes, sample_rate=0.3)
    problem = random_problem(7, num_classes, 5, seed=1)
    x = problem.embeddings.clone().requires_grad_()
    loss = module(x, problem.labels)
    loss.backward()
    check_fp32((loss.detach(), x.grad, module.weight.grad), as_problem(module, problem))


@pytest.mark.pairs
@pytest.mark.parametrize("size", [0, 5])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_batch_without_positives(size, sparse, capability):
    # Empty, or all ignored: an uneven last batch padded with ignored labels.
    module = make(sparse_grad=sparse)
    problem = batch(size, ignored=size)
    x = problem.embeddings.clone().requires_grad_()
    loss = module(x, problem.labels)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not module.weight.grad.to_dense().any()
    assert len(module.last_selection.class_index) == 100
    assert int(module.step) == 1


def test_there_is_no_selection_before_the_first_call():
    module = make()
    assert module.last_selection is None
    assert module.last_metrics is None


# --- the step


def test_each_training_step_draws_anew():
    module, problem = make(), batch()
    seen = set()
    for i in range(20):
        assert int(module.step) == i
        module(problem.embeddings, problem.labels)
        classes, features = drawn(module)
        seen.add((*classes, *features))
    assert len(seen) == 20
    assert int(module.step) == 20


def test_eval_uses_everything_and_does_not_advance():
    module, problem = make(), batch()
    module(problem.embeddings, problem.labels)
    module.eval()
    losses = [module(problem.embeddings, problem.labels) for _ in range(2)]
    assert drawn(module) == (list(range(NUM_CLASSES)), list(range(DIM)))
    assert torch.equal(*losses)
    assert int(module.step) == 1
    module(problem.embeddings, problem.labels, step=17)
    assert drawn(module) == (list(range(NUM_CLASSES)), list(range(DIM)))


def test_a_given_step_is_used_and_the_own_one_stays():
    module, problem = make(), batch()
    for _ in range(3):
        module(problem.embeddings, problem.labels)
    third = drawn(module)
    again = module(problem.embeddings, problem.labels, step=np.int64(2))
    assert drawn(module) == third
    assert int(module.step) == 3
    assert torch.equal(again, module(problem.embeddings, problem.labels, step=torch.tensor(2)))
    assert drawn(module) == third
    assert int(module.step) == 3


def test_evaluation_in_between_does_not_change_what_is_drawn_next():
    plain, interrupted, problem = make(), make(), batch()
    for _ in range(3):
        plain(problem.embeddings, problem.labels)
        interrupted(problem.embeddings, problem.labels)
        interrupted.eval()(problem.embeddings, problem.labels)
        interrupted.train()(problem.embeddings, problem.labels, step=99)
    plain(problem.embeddings, problem.labels)
    interrupted(problem.embeddings, problem.labels)
    assert drawn(plain) == drawn(interrupted)


def test_the_global_random_state_is_neither_used_nor_changed():
    module, problem = make(), batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    module(problem.embeddings, problem.labels, step=0)
    first = drawn(module)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    module(problem.embeddings, problem.labels, step=0)
    assert drawn(module) == first


def test_seeds_draw_differently():
    problem, seen = batch(), set()
    for seed in range(10):
        module = make(seed=seed)
        module(problem.embeddings, problem.labels)
        classes, features = drawn(module)
        seen.add((*classes, *features))
    assert len(seen) == 10


def test_activation_checkpointing_draws_the_same_again():
    problem = batch()
    plain, checkpointed = make(), make()
    step = torch.tensor(4)
    x = problem.embeddings.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: checkpointed(x, problem.labels, step=step), x, use_reentrant=False
    )
    (grad,) = torch.autograd.grad(loss, x)
    right = plain(x, problem.labels, step=step)
    assert torch.equal(loss, right)
    assert torch.equal(grad, torch.autograd.grad(right, x)[0])


# --- saving and copying


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path):
    whole, problem = make(), batch()
    for _ in range(3):
        whole(problem.embeddings, problem.labels)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = make(seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.seed == whole.seed == 11
    for _ in range(3):
        left = whole(problem.embeddings, problem.labels)
        right = resumed(problem.embeddings, problem.labels)
        assert drawn(whole) == drawn(resumed)
        assert torch.equal(left, right)
    assert int(resumed.step) == int(whole.step) == 6


def test_the_state_holds_weight_and_step():
    state = make().state_dict()
    assert state["weight"].shape == (NUM_CLASSES, DIM)
    assert state["step"].dtype == torch.int64
    assert state["step"].shape == ()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike(copied):
    module, problem = make(), batch()
    module(problem.embeddings, problem.labels)
    other = copied(module)
    left = module(problem.embeddings, problem.labels)
    right = other(problem.embeddings, problem.labels)
    assert torch.equal(left, right)
    assert drawn(module) == drawn(other)


def test_seeds_of_64_bits_are_kept():
    for seed in (-(2**63), 2**63 - 1):
        resumed = make()
        resumed.load_state_dict(make(seed=seed).state_dict())
        assert resumed.seed == seed


def test_only_the_weight_is_a_parameter_and_the_step_moves_with_it():
    module = make(dtype=torch.bfloat16)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert module.step.dtype == torch.int64
    module.double()
    assert module.weight.dtype == torch.float64
    assert module.step.dtype == torch.int64  # only floating point values change type
    assert make(device="meta").step.device.type == "meta"


# --- metrics


@pytest.mark.parametrize("training", [True, False])
def test_metrics_of_the_last_call(training, capability):
    module, problem = make(scale=16.0).train(training), batch(64, ignored=5)
    with torch.no_grad():
        problem.embeddings.add_(100 * module.weight[problem.labels % NUM_CLASSES])
    module(problem.embeddings, problem.labels)
    metrics = module.last_metrics
    call = as_problem(module, problem)
    _, right = reference.partial_margin_softmax(
        call.embeddings.double(),
        call.labels,
        call.prototypes.double(),
        **call.options,
        return_metrics=True,
    )
    kept = problem.labels != -100
    for name in ("loss", "target_cosine", "largest_negative"):
        a, b = getattr(metrics, name)[kept], getattr(right, name)[kept]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(metrics.top1, right.top1)
    assert 0 < metrics.top1.sum() < 59
    assert not any(value.requires_grad for value in metrics)
    assert not metrics.loss[~kept].any()


def test_metrics_keep_no_graph():
    module, problem = make(), batch()
    module(problem.embeddings.requires_grad_(), problem.labels)
    assert all(value.grad_fn is None for value in module.last_metrics)


def test_rates_may_be_set():
    made = PartialMarginSoftmax(8, 40, sample_rate=0.2, feature_rate=0.5)
    module = PartialMarginSoftmax(8, 40)
    module.sample_rate, module.feature_rate = 0.2, 0.5
    assert (module.num_sampled, module.num_features) == (made.num_sampled, made.num_features)
    x, y = random_problem(8, 40, 8).embeddings, torch.arange(8)
    assert torch.equal(module(x, y), made(x, y))
    with pytest.raises(ValueError, match=r"sample_rate must be .*, got 1\.5"):
        module.sample_rate = 1.5
    with pytest.raises(ValueError, match=r"feature_rate must be .*, got 0"):
        module.feature_rate = 0
    assert (module.sample_rate, module.feature_rate) == (0.2, 0.5)


def test_repr_tells_the_settings():
    text = repr(make(margin=CosFace(0.25)))
    for part in (str(NUM_CLASSES), str(DIM), "CosFace(0.25)", "0.1", "0.5", "11"):
        assert part in text


def test_the_loss_is_near_log_c_for_random_prototypes_at_small_scale():
    module = PartialMarginSoftmax(512, NUM_CLASSES, margin=ArcFace(0.0), scale=1.0)
    problem = random_problem(32, NUM_CLASSES, 512)
    loss = module(problem.embeddings, problem.labels)
    assert loss.item() == pytest.approx(math.log(NUM_CLASSES), rel=0.02)
