"""Row optimizers against torch's dense ones, their own plain reference, and their documentation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unicom_ext.optim import RowAdamW, RowSGD, plain

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(ids, rows, num_rows):
    ids = torch.as_tensor(ids).unsqueeze(0)
    return torch.sparse_coo_tensor(ids, rows, (num_rows, rows.shape[1]), check_invariants=False)


def schedule(step, steps=100, lr=0.05):
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-4


def random_ids(num_rows, share, generator):
    return (torch.rand(num_rows, generator=generator) < share).nonzero()[:, 0]


class Twins:
    """One matrix under a row optimizer and a copy of it under another optimizer."""

    def __init__(self, row_optimizer, other_optimizer, rows=40, dim=33, seed=0, dtype=None):
        self.generator = torch.Generator().manual_seed(seed)
        start = torch.randn(rows, dim, generator=self.generator, dtype=torch.float64)
        self.ours = nn.Parameter(start.to(dtype or torch.float32))
        self.other = nn.Parameter(self.ours.detach().clone())
        self.row_optimizer = row_optimizer([self.ours])
        self.other_optimizer = other_optimizer([self.other])

    def step(self, ids, lr=None, columns=None, sparse_for_both=False):
        rows, dim = self.ours.shape
        gradient = torch.randn(len(ids), dim, generator=self.generator).to(self.ours.dtype)
        if columns is not None:
            gradient[:, columns] = 0
        self.ours.grad = sparse(ids, gradient, rows)
        self.other.grad = (
            sparse(ids, gradient, rows)
            if sparse_for_both
            else torch.zeros_like(self.other).index_copy_(0, ids, gradient)
        )
        for optimizer in (self.row_optimizer, self.other_optimizer):
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    def difference(self):
        return float((self.ours - self.other).detach().double().abs().max())


# ---- the dense optimizers ------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("features", [1.0, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_with_every_row_is_torchs(features, maximize, capability):
    options = {"lr": 1e-2, "weight_decay": 0.1, "maximize": maximize}
    twins = Twins(lambda p: RowAdamW(p, **options), lambda p: torch.optim.AdamW(p, **options))
    for step in range(100):
        unselected = torch.randperm(33, generator=twins.generator)[: round(33 * (1 - features))]
        twins.step(torch.arange(40), lr=schedule(step), columns=unselected)
    assert twins.difference() < 1e-6
    assert float((twins.ours.detach() - 0).abs().max()) > 0.1


@pytest.mark.pairs
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_exact_sgd_is_torchs_under_partial_sampling(momentum, nesterov, share, capability):
    options = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.02}
    twins = Twins(
        lambda p: RowSGD(p, exact=True, **options), lambda p: torch.optim.SGD(p, **options)
    )
    for step in range(100):
        ids = random_ids(40, share, twins.generator) if share < 1 else torch.arange(40)
        twins.step(ids, lr=schedule(step))
    if share < 1:
        assert twins.difference() > 1e-3  # rows lag behind until they come up again,
        twins.row_optimizer.catch_up()  # or are asked to
    assert twins.difference() < 1e-6 * float(twins.other.detach().abs().max())
    if momentum:
        ours, theirs = (
            o.state[p]["momentum_buffer"]
            for o, p in (
                (twins.row_optimizer, twins.ours),
                (twins.other_optimizer, twins.other),
            )
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_exact_sgd_when_options_change_and_the_history_is_full(monkeypatch):
    monkeypatch.setattr("unicom_ext.optim.sgd._LONGEST_HISTORY", 7)
    twins = Twins(
        lambda p: RowSGD(p, lr=0.05, momentum=0.9, exact=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        dtype=torch.float64,
    )
    for step in range(60):
        for optimizer in (twins.row_optimizer, twins.other_optimizer):
            optimizer.param_groups[0]["momentum"] = 0.9 if step < 30 else 0.5
            optimizer.param_groups[0]["weight_decay"] = 0.1 if step % 7 else 0.0
        twins.step(random_ids(40, 0.2, twins.generator), lr=schedule(step))
        assert int(twins.row_optimizer.state[twins.ours]["remembered"]) < 7
    twins.row_optimizer.catch_up()
    assert twins.difference() < 1e-12


@pytest.mark.pairs
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momenta", [(0.9, 0.0), (0.0, 0.9), (0.9, 0.0, 0.9), (0.5, 0.0, 0.0, 0.7)])
def test_exact_sgd_when_momentum_is_switched_off(momenta, weight_decay, fused, capability):
    """Steps that a row missed may have had momentum where that of its update has none; the buffer
    stays as it is meanwhile."""
    options = {"lr": 0.02, "momentum": momenta[0], "weight_decay": weight_decay}
    twins = Twins(
        lambda p: RowSGD(p, exact=True, fused=fused, **options),
        lambda p: torch.optim.SGD(p, **options),
        dtype=torch.float64,
    )
    for momentum in momenta:
        for optimizer in (twins.row_optimizer, twins.other_optimizer):
            optimizer.param_groups[0]["momentum"] = momentum
        for _ in range(10):
            twins.step(random_ids(40, 0.3, twins.generator))
    twins.row_optimizer.catch_up()
    assert twins.difference() < 1e-12


def test_sgd_without_momentum_is_torchs_lazily():
    # Decay is then all that happens to a row without gradient, and it is caught up.
    twins = Twins(
        lambda p: RowSGD(p, lr=0.05, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.3),
    )
    for step in range(100):
        twins.step(random_ids(40, 0.1, twins.generator), lr=schedule(step))
    twins.row_optimizer.catch_up()
    assert twins.difference() < 1e-6


def test_sgd_with_every_row_is_torchs(capability):
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}
    twins = Twins(lambda p: RowSGD(p, **options), lambda p: torch.optim.SGD(p, **options))
    for step in range(50):
        twins.step(torch.arange(40), lr=schedule(step))
    assert twins.difference() < 2e-6


# ---- rows that were not sampled -----------------------------------------------------------------


OPTIMIZERS = [
    lambda p, **o: RowAdamW(p, **{"weight_decay": 0.0, "lr": 0.1, **o}),
    lambda p, **o: RowSGD(p, **{"momentum": 0.9, "lr": 0.1, **o}),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "sgd"])
def test_rows_that_were_not_sampled_stand_still(make):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 5))
    optimizer = make([param])
    param.grad = sparse([0, 1, 2, 3, 4, 5], torch.randn(6, 5), 6)
    optimizer.step()
    before = param.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)}
    for _ in range(3):
        param.grad = sparse([1, 4], torch.randn(2, 5), 6)
        optimizer.step()
    still = [0, 2, 3, 5]
    assert torch.equal(param[still], before[still])
    assert not torch.equal(param[[1, 4]], before[[1, 4]])
    for name, value in state.items():
        if value.dim() and len(value) == 6 and name != "log_decay":
            now = optimizer.state[param][name]
            assert torch.equal(now[still], value[still])
            assert not torch.equal(now[[1, 4]], value[[1, 4]])


def test_weight_decay_is_caught_up_over_a_schedule():
    param = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = RowAdamW([param], weight_decay=0.5)
    factor = 1.0
    for step in range(50):
        lr = schedule(step)
        factor *= 1 - lr * 0.5
        optimizer.param_groups[0]["lr"] = lr
        param.grad = sparse([0], torch.zeros(1, 4, dtype=torch.float64), 3)
        optimizer.step()
    # A zero gradient moves nothing: row 0 has only decayed, the others not yet.
    assert param[0, 0].item() == pytest.approx(factor, rel=1e-13)
    assert torch.equal(param[1:].detach(), torch.ones(2, 4, dtype=torch.float64))
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = sparse([2], torch.zeros(1, 4, dtype=torch.float64), 3)
    optimizer.step()
    assert param[2, 0].item() == pytest.approx(factor, rel=1e-13)
    assert param[1, 0].item() == 1
    optimizer.catch_up()
    assert torch.allclose(param, torch.full_like(param, factor), rtol=1e-13)
    optimizer.catch_up()
    assert torch.allclose(param, torch.full_like(param, factor), rtol=1e-13)


def test_the_first_step_of_a_row_is_the_first_step_of_adam_whenever_it_comes():
    param = nn.Parameter(torch.zeros(2, 3))
    optimizer = RowAdamW([param], lr=0.1)
    for _ in range(50):
        param.grad = sparse([0], torch.ones(1, 3), 2)
        optimizer.step()
    param.grad = sparse([1], 7 * torch.ones(1, 3), 2)
    optimizer.step()
    torch.testing.assert_close(param[1].detach(), torch.full((3,), -0.1))


# ---- the fused pass and its reference -----------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, **o: RowAdamW(p, lr=0.01, weight_decay=0.1, **o),
        lambda p, **o: RowAdamW(p, lr=0.01, row_second_moment=True, **o),
        lambda p, **o: RowAdamW(p, lr=0.01, moment_dtype=torch.bfloat16, **o),
        lambda p, **o: RowAdamW(
            p, lr=0.01, moment_dtype=torch.bfloat16, row_second_moment=True, **o
        ),
        lambda p, **o: RowSGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **o),
        lambda p, **o: RowSGD(p, lr=0.05, momentum=0.9, exact=True, nesterov=True, **o),
        lambda p, **o: RowSGD(p, lr=0.05, weight_decay=0.1, maximize=True, **o),
    ],
    ids=["adamw", "row-second", "bf16", "bf16-row-second", "sgd", "sgd-exact", "sgd-plain"],
)
def test_the_fused_pass_is_its_reference(make, dtype, capability):
    for dim in (1, 33, 64):
        twins = Twins(
            lambda p: make(p, fused=True), lambda p: make(p, fused=False), dim=dim, dtype=dtype
        )
        for step in range(12):
            # In any order and repeated, as micro-batches leave them.
            ids = torch.randint(40, (25,), generator=twins.generator)
            ids = ids.sort().values if step % 3 else ids
            twins.step(ids, lr=schedule(step), sparse_for_both=True)
        assert twins.difference() < {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 0.05)
        ours, theirs = (
            o.state[p]
            for o, p in ((twins.row_optimizer, twins.ours), (twins.other_optimizer, twins.other))
        )
        assert ours.keys() == theirs.keys()
        for name in ours:
            if isinstance(ours[name], torch.Tensor):
                assert ours[name].dtype == theirs[name].dtype
                bound = 0.05 if torch.bfloat16 in (dtype, ours[name].dtype) else 2e-3
                torch.testing.assert_close(ours[name], theirs[name], atol=bound, rtol=bound)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_roots_and_quotients_of_any_size(eps, capability):
    # Zeros, squares that underflow, are subnormal or overflow: at every place in a vector.
    sizes = torch.tensor([0, 1e-40, 1e-25, 3e-21, 1e-19, 1e-10, 1, 1e10, 1e18, 1e25, math.inf])
    gradient = sizes.repeat(6)[None] * torch.linspace(-2, 3, 66)
    values = []
    for fused in (True, False):
        param = nn.Parameter(torch.zeros(1, 66))
        optimizer = RowAdamW([param], lr=0.01, eps=eps, fused=fused)
        for _ in range(2):
            param.grad = sparse([0], gradient, 1)
            optimizer.step()
        values.append(param.detach())
    torch.testing.assert_close(*values, rtol=2e-6, atol=0, equal_nan=True)
    assert values[0].isfinite().sum() >= 36


def test_bf16_moments_are_rounded_by_the_documented_bits(capability):
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(300, 50))
    optimizer = RowAdamW([param], moment_dtype=torch.bfloat16, betas=(0.0, 0.999))
    gradient = torch.randn(300, 50)
    param.grad = sparse(torch.arange(300), gradient, 300)
    optimizer.step()
    bits = plain.rounding_bits(torch.arange(300), torch.ones(300), 50)
    expected = plain.round_to_bf16(gradient, bits & 0xFFFF)
    assert torch.equal(optimizer.state[param]["exp_avg"], expected)


def test_bf16_moments_do_not_stand_still():
    # 0.999 v + 0.001 g^2 differs from v by less than half a digit of bf16 from some v on.
    param = nn.Parameter(torch.zeros(20, 512))
    optimizer = RowAdamW([param], moment_dtype=torch.bfloat16)
    for _ in range(3000):
        param.grad = sparse(torch.arange(20), torch.ones(20, 512), 20)
        optimizer.step()
    second = optimizer.state[param]["exp_avg_sq"].double()
    assert float(second.mean()) == pytest.approx(1 - 0.999**3000, rel=2e-3)


def test_rounding_bits_are_even():
    bits = plain.rounding_bits(torch.arange(500), torch.full((500,), 3), 512)
    for low in (bits & 0xFFFF, bits >> 16):
        assert abs(float(low.double().mean()) / 65535 - 0.5) < 0.003
        pairs = torch.stack([low[:, 1:].flatten(), low[:, :-1].flatten()]).double()
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01


def test_a_row_second_moment_is_the_mean_square_of_the_row(capability):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(3, 70))
    optimizer = RowAdamW([param], row_second_moment=True, lr=0.1, weight_decay=0.0)
    gradient, before = torch.randn(2, 70), param.detach().clone()
    param.grad = sparse([0, 2], gradient, 3)
    optimizer.step()
    mean = gradient.square().mean(dim=1)
    torch.testing.assert_close(
        optimizer.state[param]["exp_avg_sq"], 1e-3 * torch.tensor([mean[0], 0, mean[1]])
    )
    moved = before[[0, 2]] - 0.1 * gradient / mean.sqrt().unsqueeze(1)
    torch.testing.assert_close(param.detach()[[0, 2]], moved)


@given(st.data())
def test_repeated_ids_add_up_in_any_order(data):
    num_rows, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 35))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20)), dtype=int)
    gradient = torch.randn(len(ids), dim, dtype=torch.float64)
    start = torch.randn(num_rows, dim, dtype=torch.float64)
    results = []
    for fused in (True, False):
        param = nn.Parameter(start.clone())
        param.grad = sparse(ids, gradient, num_rows)
        RowSGD([param], lr=1.0, fused=fused).step()
        results.append(param.detach())
    expected = start.index_add(0, ids, gradient, alpha=-1)
    for result in results:
        torch.testing.assert_close(result, expected)


def test_results_do_not_depend_on_threads(set_threads):
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(2000, 40))
        optimizer = RowAdamW([param], moment_dtype=torch.bfloat16)
        for _ in range(3):
            ids = torch.randint(2000, (1500,))
            param.grad = sparse(ids, torch.randn(1500, 40), 2000)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- mixed parameters and checkpoints -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda g: RowAdamW(g, lr=0.02), lambda g: torch.optim.AdamW(g, lr=0.02)),
        (
            lambda g: RowSGD(g, lr=0.02, momentum=0.9),
            lambda g: torch.optim.SGD(g, lr=0.02, momentum=0.9),
        ),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("fused", [None, False])
def test_dense_parameters_are_updated_as_by_torch(ours, theirs, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2))
    copied = copy.deepcopy(model)
    prototypes = nn.Parameter(torch.randn(9, 4))
    a = ours([{"params": model.parameters(), "fused": fused}, {"params": [prototypes], "lr": 0.3}])
    b = theirs(copied.parameters())
    for _ in range(20):
        x = torch.randn(8, 5)
        for network, optimizer in ((model, a), (copied, b)):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            if network is model:
                prototypes.grad = sparse([3], torch.ones(1, 4), 9)
            optimizer.step()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(p, q)


VARIANTS = {
    "adamw": lambda p: RowAdamW(p, lr=0.1),
    "adamw-bf16": lambda p: RowAdamW(p, lr=0.1, moment_dtype=torch.bfloat16),
    "adamw-row": lambda p: RowAdamW(p, lr=0.1, row_second_moment=True),
    "sgd": lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-exact": lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, exact=True),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(make, dtype, tmp_path):
    def run(param, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            ids = random_ids(50, 0.3, generator)
            rows = torch.randn(len(ids), 6, generator=generator).to(dtype)
            param.grad = sparse(ids, rows, 50)
            optimizer.param_groups[0]["lr"] = schedule(step)
            optimizer.step()

    start = torch.randn(50, 6).to(dtype)
    whole, interrupted = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(whole, make([whole]), range(20))
    first = make([interrupted])
    run(interrupted, first, range(11))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = nn.Parameter(interrupted.detach().clone())
    second = make([resumed])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, value in first.state[interrupted].items():
        if isinstance(value, torch.Tensor):
            assert second.state[resumed][name].dtype == value.dtype
            assert torch.equal(second.state[resumed][name], value)
    run(resumed, second, range(11, 20))
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_row_state_has_the_parameters_rows(make):
    # What a sharded checkpoint cuts: everything else is the same on every rank.
    param = nn.Parameter(torch.zeros(50, 6))
    optimizer = make([param])
    optimizer.init_row_state([param])
    before = optimizer.state[param].copy()
    param.grad = sparse([3], torch.ones(1, 6), 50)
    optimizer.step()
    after = optimizer.state[param]
    assert before.keys() == after.keys()
    for value in after.values():
        if isinstance(value, torch.Tensor) and value.dim():
            assert len(value) == 50 or value.shape[1:] == (4,)


def test_a_parameter_may_change_between_dense_and_sparse_gradients():
    twins = Twins(lambda p: RowAdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1))
    for step in range(12):
        twins.step(torch.arange(40))
        gradient = torch.randn(40, 33, generator=twins.generator)
        if step % 4 == 0:
            twins.ours.grad, twins.other.grad = gradient.clone(), gradient.clone()
            twins.row_optimizer.step()
            twins.other_optimizer.step()
    assert twins.difference() < 2e-6
    dense_first = Twins(lambda p: RowAdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1))
    for _ in range(3):
        gradient = torch.randn(40, 33, generator=dense_first.generator)
        dense_first.ours.grad, dense_first.other.grad = gradient.clone(), gradient.clone()
        dense_first.row_optimizer.step()
        dense_first.other_optimizer.step()
    for _ in range(3):
        dense_first.step(torch.arange(40))
    assert dense_first.difference() < 2e-6


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: RowAdamW(p, amsgrad=True), "RowAdamW cannot honour amsgrad=True"),
        (lambda p: RowAdamW(p, capturable=True), "cannot honour capturable"),
        (lambda p: RowSGD(p, dampening=0.1), "RowSGD cannot honour dampening=0.1"),
        (lambda p: RowAdamW(p, lr=-1.0), "lr must be a finite number >= 0, got -1.0"),
        (lambda p: RowAdamW(p, betas=(0.9, 1.0)), r"betas\[1\] must be a number in \[0, 1\)"),
        (lambda p: RowAdamW(p, eps=math.nan), "eps must be"),
        (lambda p: RowAdamW(p, lr=2.0, weight_decay=0.5), "lr \\* weight_decay must be below 1"),
        (lambda p: RowAdamW(p, moment_dtype=torch.float16), "moment_dtype must be"),
        (lambda p: RowSGD(p, momentum=1.0), "momentum must be a number in"),
        (lambda p: RowSGD(p, nesterov=True), "nesterov=True needs a momentum"),
        (lambda p: RowSGD([{"params": p, "lr": math.inf}]), "lr must be a finite number"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2, 2))])


def test_dense_only_options_that_are_off_are_fine_and_unknown_ones_are_not():
    param = nn.Parameter(torch.zeros(2, 2))
    RowAdamW([param], amsgrad=False, foreach=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        RowAdamW([param], beta=0.9)


@pytest.mark.parametrize("make", [RowAdamW, RowSGD])
def test_gradients_that_rows_cannot_use(make):
    good, bad = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
    optimizer = make([good, bad], lr=0.1)

    def refused(message):
        good.grad = torch.ones(4, 3)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(good.detach(), torch.ones(4, 3))
        assert not optimizer.state[good]

    bad.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=False)
    refused(r"must be a matrix \[rows, dim\], got the shape \[4\]")
    bad.data = torch.ones(4, 3)
    bad.grad = None
    bad.grad = torch.eye(4, 3).to_sparse()
    refused("one sparse dimension, got 2")


def test_ids_out_of_range_are_refused_before_anything_changes():
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = RowAdamW([param])
    for ids in ([0, 4], [-1, 2], [5, 1]):
        param.grad = sparse(ids, torch.ones(2, 3), 4)
        with pytest.raises(ValueError, match=r"ids must be in \[0, 4\)"):
            optimizer.step()
    assert torch.equal(param.detach(), torch.ones(4, 3))
    assert float(optimizer.state[param]["row_step"].sum()) == 0


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_a_state_dict_of_another_shape(make):
    def stepped(rows):
        param = nn.Parameter(torch.ones(rows, 3))
        optimizer = make([param])
        param.grad = sparse([0], torch.ones(1, 3), rows)
        optimizer.step()
        return param, optimizer

    _, other = stepped(5)
    param, optimizer = stepped(4)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"in the state dict must be \[4(, 3)?\].*got \[5"):
        optimizer.load_state_dict(other.state_dict())
    for name, value in before["state"][0].items():
        now = optimizer.state[param][name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


def test_init_row_state_of_a_stranger_and_of_a_vector():
    vector = nn.Parameter(torch.ones(3))
    optimizer = RowAdamW([vector])
    with pytest.raises(ValueError, match="must be among the optimizer's parameters"):
        optimizer.init_row_state([nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ValueError, match="must be a matrix"):
        optimizer.init_row_state([vector])
