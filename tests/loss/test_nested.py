"""Nested dimensions: prefixes whose length a step draws."""

from __future__ import annotations

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from unicom_ext import CosFace, PartialMarginSoftmax, reference
from unicom_ext.loss.nested import prefix_length
from unicom_ext.ops import counter
from unicom_ext.sampling import select_features

CPU_ONLY = True
INT64 = st.integers(-(2**63), 2**63 - 1)


def make(dim=24, num_classes=200, **options) -> PartialMarginSoftmax:
    options = {"feature_rate": 0.5, "seed": 11, **options}
    return PartialMarginSoftmax(dim, num_classes, feature_selection="nested", **options)


def lengths(loss, steps, **options):
    found = []
    for _ in range(steps):
        loss(torch.ones(2, loss.embedding_size), torch.tensor([0, 1]), **options)
        index = loss.last_selection.feature_index
        assert index.tolist() == list(range(len(index)))
        found.append(len(index))
    return found


# ---- the length


@given(st.integers(1, 5000), st.data(), INT64, INT64)
def test_any_seed_and_step_give_a_length_in_range(dim, data, seed, step):
    mean = data.draw(st.integers(1, dim))
    length = prefix_length(dim, mean, seed, step)
    assert min(mean, max(2, mean // 8)) <= length <= dim
    assert length == prefix_length(dim, mean, seed, step)
    if mean in (1, 2, dim):
        assert length == mean


@pytest.mark.parametrize(("dim", "mean"), [(64, 32), (64, 8), (64, 60), (5, 3), (512, 384)])
@pytest.mark.parametrize("steps_vary", [True, False])
def test_the_mean_length_is_that_of_random_dimensions(dim, mean, steps_vary):
    n = 20_000
    drawn = np.array(
        [prefix_length(dim, mean, *((3, i) if steps_vary else (i, 3))) for i in range(n)]
    )
    assert abs(drawn.mean() - mean) < 4 * drawn.std() / n**0.5
    # Before it is rounded, P(length < l) is ((l - low) / (d - low))^(1/a).
    first = max(2, mean // 8)
    power = (dim - mean) / (mean - first)
    assert first <= drawn.min() < mean < drawn.max() == dim
    for length in np.linspace(first + 1, dim - 1, 5).round():
        share = (drawn >= length).mean()
        low, high = (
            1 - (max(at - first, 0) / (dim - first)) ** (1 / power) for at in (length, length - 1)
        )
        assert low - 0.02 < share < high + 0.02


def test_halfway_lengths_are_equally_likely():
    drawn = np.bincount([prefix_length(10, 6, 0, step) for step in range(8000)], minlength=11)
    assert drawn[:2].sum() == 0
    assert np.allclose(drawn[3:10] / 8000, 1 / 8, atol=0.015)
    assert np.allclose(drawn[[2, 10]] / 8000, 1 / 16, atol=0.012)


def test_lengths_stay_what_they_are():
    # A resumed run must draw what it would have drawn, with other versions too.
    assert [prefix_length(512, 256, 7, step) for step in range(6)] == LENGTHS
    assert select_features(512, 0.5, seed=7, step=3, feature_selection="nested").tolist() == list(
        range(LENGTHS[3])
    )


LENGTHS = [189, 129, 97, 194, 409, 126]


# ---- the loss


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.2, 0.25)], ids=str)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_loss_and_gradients_are_those_of_the_prefix(rates, sparse_grad):
    torch.manual_seed(0)
    loss = make(
        sample_rate=rates[0], feature_rate=rates[1], margin=CosFace(0.2), scale=20.0,
        sparse_grad=sparse_grad,
    )  # fmt: skip
    labels = torch.randint(200, (9,))
    for step in range(4):
        x = torch.randn(9, 24, requires_grad=True)
        loss.zero_grad()
        value = loss(x, labels)
        value.backward()
        length = prefix_length(24, loss.num_features, 11, step)
        drawn = loss.last_selection
        assert drawn.feature_index.tolist() == list(range(length))
        right_x = x.detach().double().requires_grad_()
        right_w = loss.weight.detach().double().requires_grad_()
        right = reference.partial_margin_softmax(
            right_x, labels, right_w, margin=CosFace(0.2), scale=20.0,
            class_index=drawn.class_index, feature_index=torch.arange(length),
        )  # fmt: skip
        right.backward()
        torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), right_x.grad, rtol=1e-4, atol=1e-6)
        grad = loss.weight.grad.to_dense() if sparse_grad else loss.weight.grad
        assert grad[:, length:].count_nonzero() == 0
        error = (grad.double() - right_w.grad).norm() / right_w.grad.norm()
        assert error < 1e-5


def test_draws_are_those_of_seed_and_step():
    first = lengths(make(), 8)
    assert len(set(first)) > 4
    assert lengths(make(), 8) == first
    assert lengths(make(seed=12), 8) != first
    assert [lengths(make(), 1, step=s)[0] for s in (3, torch.tensor(5))] == [first[3], first[5]]


def test_a_resumed_run_goes_on_as_it_would_have():
    loss = make()
    lengths(loss, 3)
    again = make(seed=0)
    again.load_state_dict(loss.state_dict())
    copies = [again, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    after = lengths(loss, 5)
    assert [lengths(other, 5) for other in copies] == [after] * 3


def test_it_may_be_set():
    loss = make()
    loss.feature_selection = "random"
    loss(torch.ones(1, 24), torch.tensor([0]))
    assert len(loss.last_selection.feature_index) == 12
    message = r"feature_selection must be one of \('random', 'nested'\), got 'matryoshka'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        loss.feature_selection = "matryoshka"
    assert loss.feature_selection == "random"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PartialMarginSoftmax(8, 9, feature_selection="matryoshka")
    with pytest.raises(ValueError, match=f"^{message}$"):
        select_features(8, 0.5, seed=0, step=0, feature_selection="matryoshka")


def test_in_eval_mode_and_at_rate_1_all_dimensions_take_part():
    assert lengths(make().eval(), 2) == [24, 24]
    assert lengths(make(feature_rate=1.0), 2) == [24, 24]


def test_a_loss_pickled_before_there_was_a_choice_draws_any():
    loss = PartialMarginSoftmax(8, 9, feature_rate=0.5)
    state = loss.__getstate__() if hasattr(loss, "__getstate__") else dict(loss.__dict__)
    state.pop("_feature_selection")
    old = PartialMarginSoftmax.__new__(PartialMarginSoftmax)
    old.__setstate__(state)
    assert old.feature_selection == "random"


def test_activation_checkpointing_repeats_the_length():
    torch.manual_seed(0)
    x, labels = torch.randn(4, 24), torch.arange(4)
    grads = []
    for wrap in (False, True):
        loss, inputs = make(), x.clone().requires_grad_()
        for _ in range(3):
            out = checkpoint(loss, inputs, labels, use_reentrant=False) if wrap else loss(
                inputs, labels
            )  # fmt: skip
            out.backward()
        assert int(loss.step) == 3
        grads.append((inputs.grad, loss.weight.grad))
    for plain, repeated in zip(*grads, strict=True):
        assert torch.equal(plain, repeated)


def test_a_gradient_of_torch_func():
    loss = make()
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    x, labels = torch.randn(4, 24), torch.arange(4)

    def call(weight):
        return torch.func.functional_call(loss, {"weight": weight}, (x, labels))

    grad = torch.func.grad(call)(parameters["weight"])
    loss.step.zero_()
    loss(x, labels).backward()
    torch.testing.assert_close(grad, loss.weight.grad)


# ---- on a device, and in graphs


class Elsewhere(torch.Tensor):
    """A step on a device of which the host counts the readings."""

    reads = 0

    @property
    def device(self):
        return torch.device("xpu")

    def __int__(self):
        Elsewhere.reads += 1
        return int(self.as_subclass(torch.Tensor))


def test_the_host_waits_for_a_device_only_where_it_cannot_know_the_step(monkeypatch):
    monkeypatch.setattr(Elsewhere, "reads", 0)
    step = torch.zeros((), dtype=torch.int64).as_subclass(Elsewhere)
    for expected in range(5):
        assert counter.on_host(step) == expected
        counter.advance(step)
    assert Elsewhere.reads == 1
    step.fill_(70)
    assert counter.on_host(step) == 70
    counter.advance(step)
    assert counter.on_host(step) == 71
    assert Elsewhere.reads == 2
    step.fill_(3)
    counter.advance(step)
    assert counter.on_host(step) == 4
    assert Elsewhere.reads == 3
    given = torch.full((), 9).as_subclass(Elsewhere)
    counter.known_on_host(given, 9)
    assert counter.on_host(given) == 9
    assert Elsewhere.reads == 3


def test_a_captured_graph_is_refused(monkeypatch):
    class OnCuda(Elsewhere):
        @property
        def device(self):
            return torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step = torch.zeros((), dtype=torch.int64).as_subclass(OnCuda)
    with pytest.raises(RuntimeError) as raised:
        counter.on_host(step)
    assert str(raised.value) == (
        'feature_selection="nested" draws how many dimensions take part on the host, and a CUDA '
        'graph would replay the first draw: use feature_selection="random" in graphs'
    )


@pytest.mark.slow
def test_compiled_whole_it_is_refused_and_in_parts_it_is_the_same():
    x, labels = torch.randn(4, 24), torch.arange(4)
    with pytest.raises(Exception, match='to compile the loss whole use feature_selection="random"'):
        torch.compile(make(), fullgraph=True, backend="eager")(x, labels)
    eager, compiled = make(), make()

    def backend(module, inputs):
        # The length is drawn by integers of more than 64 bits, which no kernel has.
        assert operator.xor not in [node.target for node in module.graph.nodes]
        return module.forward

    step = torch.compile(compiled, backend=backend)
    for _ in range(4):
        assert torch.allclose(step(x, labels), eager(x, labels))
        assert torch.equal(compiled._drawn[2], eager._drawn[2])
