"""Row optimizers where a dense one went before: its state, its weights' layout, dtypes, numbers."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from support.updates import OPTIMIZERS, batch, make
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from unicom_ext import checkpoint
from unicom_ext.optim import RowAdamW, RowSGD, clip_grad_norm_

PAIRS = {
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd-plain": (RowSGD, torch.optim.SGD, {"lr": 0.1}),
}
ROWS, DIM = 30, 6


def gradient(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, DIM, generator=generator).to(dtype)


def as_rows(dense, ids=None):
    ids = torch.arange(ROWS) if ids is None else ids
    return torch.sparse_coo_tensor(ids[None], dense[ids], dense.shape, check_invariants=False)


def parameter(dtype=torch.float32):
    return nn.Parameter(
        torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(9)).to(dtype)
    )


def train(optimizer, steps, sparse=False, share=None):
    (param,) = optimizer.param_groups[0]["params"]
    for step in steps:
        dense, ids = gradient(step, param.dtype), None
        if share is not None:
            ids = torch.arange(step % share, ROWS, share)
        param.grad = as_rows(dense, ids) if sparse else dense
        optimizer.step()
    return param


# ---- the state of dense optimizers ---------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_goes_on_from_a_dense_optimizer(pair, implementation, dtype):
    ours, theirs, options = pair
    if theirs is torch.optim.SGD and implementation.get("fused") and dtype == torch.bfloat16:
        pytest.skip("torch's fused SGD is wrong there")
    whole = theirs([parameter(dtype)], **options, **implementation)
    train(whole, range(4))
    state, start = copy.deepcopy(whole.state_dict()), whole.param_groups[0]["params"][0].detach()
    resumed = [ours([nn.Parameter(start.clone())]) for _ in range(2)]
    for optimizer in resumed:
        optimizer.load_state_dict(copy.deepcopy(state))
    # Its dense gradients are summed as there, if in another implementation.
    right = train(whole, range(4, 8))
    tight = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(train(resumed[0], range(4, 8)), right, atol=tight, rtol=tight)
    loose = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    rows = train(resumed[1], range(4, 8), sparse=True)
    torch.testing.assert_close(rows, right, atol=loose, rtol=loose)


@pytest.mark.parametrize("ours", [RowAdamW, RowSGD])
def test_options_a_state_dict_lacks_stay_as_they_are_here(ours):
    options = {"moment_dtype": torch.bfloat16} if ours is RowAdamW else {"exact": True}
    optimizer = ours([parameter()], lr=0.1, **options)
    (name, value), *_ = options.items()
    train(optimizer, range(2), sparse=True)
    state = optimizer.state_dict()
    del state["param_groups"][0][name]
    other = ours([parameter()], lr=0.3, **options)
    other.load_state_dict(state)
    assert other.param_groups[0][name] == value
    assert other.param_groups[0]["lr"] == 0.1


def test_the_dtype_of_moments_is_saved_as_text():
    optimizer = RowAdamW([parameter()], moment_dtype=torch.bfloat16)
    assert optimizer.state_dict()["param_groups"][0]["moment_dtype"] == "torch.bfloat16"
    other = RowAdamW([parameter()])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["moment_dtype"] is torch.bfloat16
    saved_before = optimizer.state_dict()
    saved_before["param_groups"][0]["moment_dtype"] = torch.float32
    other.load_state_dict(saved_before)
    assert other.param_groups[0]["moment_dtype"] is torch.float32


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            RowAdamW,
            "RowAdamW cannot honour amsgrad=True: it needs the largest second moment of every step",
        ),
        (
            lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5),
            RowSGD,
            "RowSGD cannot honour dampening=0.5: rows join at different steps",
        ),
        (
            lambda p: torch.optim.AdamW(p, lr=20.0, weight_decay=0.5),
            RowAdamW,
            "lr * weight_decay must be below 1, got lr 20 and weight_decay 0.5",
        ),
        (
            lambda p: torch.optim.AdamW([nn.Parameter(torch.zeros(7, DIM))]),
            RowAdamW,
            "exp_avg in the state dict must be [30, 6] for a parameter [30, 6], got [7, 6]",
        ),
    ],
)
def test_states_that_rows_cannot_go_on_from(theirs, ours, message):
    dense = theirs([parameter()])
    for param in dense.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    dense.step()
    optimizer = ours([parameter()], lr=0.25)
    train(optimizer, [0], sparse=True)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        optimizer.load_state_dict(dense.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_a_state_without_what_rows_need():
    optimizer = RowAdamW([parameter()])
    train(optimizer, [0], sparse=True)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["log_decay"]
    with pytest.raises(ValueError, match=r"has no log_decay for a parameter \[30, 6\]"):
        optimizer.load_state_dict(state)


def test_a_history_of_an_earlier_version():
    whole = RowSGD([parameter()], lr=0.1, momentum=0.9, exact=True)
    train(whole, range(5), sparse=True, share=3)
    state = copy.deepcopy(whole.state_dict())
    of_param = state["state"][0]
    of_param["history"] = of_param["history"][: int(of_param.pop("remembered"))].clone()
    assert of_param["history"].shape == (5, 4)
    start = whole.param_groups[0]["params"][0].detach().clone()
    resumed = RowSGD([nn.Parameter(start)], exact=True)
    resumed.load_state_dict(state)
    got, right = (train(o, range(5, 9), sparse=True, share=3) for o in (resumed, whole))
    assert torch.equal(got, right)


# ---- layouts -------------------------------------------------------------------------------------


def transposed(values):
    return values.t().contiguous().t()


VIEWS = {
    "transposed": transposed,
    "every second column": lambda v: v.repeat_interleave(2, dim=1)[:, ::2],
    "part of a wider matrix": lambda v: torch.cat([v, v], dim=1)[:, : v.shape[1]],
    "every second row": lambda v: v.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_of_any_layout(kind, view):
    plain, other = make(), make()
    state = {**other.state_dict(), "weight": view(other.weight.detach().clone())}
    other.load_state_dict(state, assign=True)
    assert torch.equal(other.weight, plain.weight)
    assert other.weight.stride() != plain.weight.stride()
    optimizers = [OPTIMIZERS[kind](loss.parameters()) for loss in (plain, other)]
    for step in range(6):
        for loss, optimizer in zip((plain, other), optimizers, strict=True):
            x, labels = batch(step)
            optimizer.zero_grad()
            loss(x, labels).backward()
            clip_grad_norm_(loss.parameters(), 1.0)
            optimizer.step()
            if step == 3:
                optimizer.catch_up()
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # bf16 moments are rounded at random, from values that differ in their last bit
    error = 1e-2 if "bf16" in kind else 1e-5
    torch.testing.assert_close(other.weight, plain.weight, atol=error, rtol=error)
    assert other.weight.stride() == state["weight"].stride()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_and_gradients_of_any_layout(kind):
    plain, other = OPTIMIZERS[kind]([parameter()]), OPTIMIZERS[kind]([parameter()])
    train(plain, range(3), sparse=True)
    train(other, range(3), sparse=True)
    state = copy.deepcopy(other.state_dict())
    for name, value in state["state"][0].items():
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            state["state"][0][name] = value.repeat_interleave(2)[::2]
        elif isinstance(value, torch.Tensor) and value.dim() == 2:
            state["state"][0][name] = transposed(value)
    other.load_state_dict(state)
    (ours,), (theirs,) = (o.param_groups[0]["params"] for o in (plain, other))
    for step in range(3, 6):
        ids = torch.arange(step % 2, ROWS, 2)
        ours.grad, theirs.grad = as_rows(gradient(step), ids), as_rows(gradient(step), ids)
        rows = transposed(gradient(step)[ids])
        wide = ids.repeat_interleave(2)[::2]
        theirs.grad = torch.sparse_coo_tensor(wide[None], rows, (ROWS, DIM), check_invariants=False)
        plain.step()
        other.step()
    ours.grad, theirs.grad = gradient(6), transposed(gradient(6))
    plain.step()
    other.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dense_state_of_a_transposed_weight_becomes_that_of_rows(kind):
    plain, other = parameter(), parameter()
    other.data = transposed(other.detach())
    for param in (plain, other):
        optimizer = OPTIMIZERS[kind]([param])
        for step in range(4):
            param.grad = gradient(step) if step < 2 else as_rows(gradient(step))
            optimizer.step()
    error = 1e-2 if "bf16" in kind else 1e-5
    torch.testing.assert_close(other, plain, atol=error, rtol=error)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("of", ["weight", "gradient", "state"])
def test_dense_steps_of_any_layout(pair, of):
    ours, theirs, options = pair
    plain, other = parameter(), parameter()
    first, second = theirs([plain], **options), ours([other], **options)
    train(first, range(2))
    train(second, range(2))
    if of == "weight":
        other.data = transposed(other.detach())
    elif of == "state":
        state = copy.deepcopy(second.state_dict())
        for name, value in state["state"].get(0, {}).items():
            if value.dim() == 2:
                state["state"][0][name] = transposed(value)
        second.load_state_dict(state)
    for step in range(2, 5):
        plain.grad = gradient(step)
        other.grad = transposed(gradient(step)) if of == "gradient" else gradient(step)
        first.step()
        second.step()
    torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_dense_steps_of_half_precision(pair, dtype):
    ours, theirs, options = pair
    if theirs is torch.optim.AdamW and dtype == torch.float16:
        pytest.skip("torch's eps is 0 there")
    got, right = (train(make([parameter(dtype)], **options), range(3)) for make in (ours, theirs))
    torch.testing.assert_close(got, right, atol=0.02, rtol=0.02)


def test_updates_in_backward_need_contiguous_rows():
    loss = make()
    loss.weight.data = transposed(loss.weight.detach())
    optimizer = RowAdamW(loss.parameters())
    message = (
        "update_in_backward needs prototypes with contiguous rows, got the strides [1, 300]: give "
        "the loss weight.detach().contiguous() first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.update_in_backward(loss)


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_follows_a_weight_that_is_cast(kind, before, after):
    """At the next step, and where it is loaded."""
    cast = OPTIMIZERS[kind]([parameter(before)])
    param = train(cast, range(4), sparse=True, share=2)
    state = copy.deepcopy(cast.state_dict())
    param.data, param.grad = param.detach().to(after), None
    loaded = OPTIMIZERS[kind]([nn.Parameter(param.detach().clone())])
    loaded.load_state_dict(state)
    for optimizer in (cast, loaded):
        train(optimizer, range(4, 7), sparse=True, share=2)
    (other,) = loaded.param_groups[0]["params"]
    assert torch.equal(param, other)
    right = OPTIMIZERS[kind]([parameter(torch.float64)])
    exact = train(right, range(7), sparse=True, share=2)
    coarse = "bf16" in kind or not {torch.float32, torch.float64} >= {before, after}
    error = 0.1 if coarse else 1e-4
    torch.testing.assert_close(param.double(), exact, atol=error, rtol=error)
    arithmetic = torch.promote_types(after, torch.float32)
    for name in ("exp_avg", "momentum_buffer"):
        if name in cast.state[param]:
            kept = "bf16" in kind and torch.float64 not in (before, after)
            wanted = torch.bfloat16 if kept else arithmetic
            assert cast.state[param][name].dtype == wanted
            assert loaded.state[other][name].dtype == wanted


DENSE = {
    **PAIRS,
    "adamw in PyTorch": (RowAdamW, torch.optim.AdamW, {"lr": 0.1, "fused": False}),
    "sgd in PyTorch": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": False}),
}


@pytest.mark.parametrize("pair", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed])
def test_dense_state_follows_a_weight_that_is_cast(pair, before, after, layout):
    ours, theirs, options = pair
    cast = ours([parameter(before)], **options)
    (param,) = cast.param_groups[0]["params"]
    param.data = layout(param.detach())
    train(cast, range(4))
    state = copy.deepcopy(cast.state_dict())
    param.data, param.grad = layout(param.detach().to(after)), None
    # As torch does where it is loaded.
    right = theirs([nn.Parameter(param.detach().clone())], **options)
    right.load_state_dict({**right.state_dict(), "state": state["state"]})
    got, wanted = train(cast, range(4, 7)), train(right, range(4, 7))
    error = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.02}[after]
    torch.testing.assert_close(got, wanted, atol=error, rtol=error)
    for value in cast.state.get(param, {}).values():
        assert value.dim() == 0 or value.dtype == after


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_convolution_that_is_laid_out_anew(pair):
    """Its gradients are laid out as it is then, its moments are not."""
    ours, theirs, options = pair
    results = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        optimizer = kind(model.parameters(), **{**options, "lr": 1e-3})
        images = torch.randn(2, 3, 6, 6)
        for step in range(4):
            if step == 2:
                model.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        assert model.weight.stride() == model.weight.grad.stride() == (27, 1, 9, 3)
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_model_that_is_cast_trains_on(kind, rows_first):
    """Prototypes by rows and a dense encoder of one optimizer."""
    results = []
    for cast_at in (0, 2):
        torch.manual_seed(1)
        model = nn.ModuleDict({"encoder": nn.Linear(22, 22), "loss": make()})
        groups = [{"params": model[name].parameters()} for name in ("encoder", "loss")]
        optimizer = OPTIMIZERS[kind](groups[::-1] if rows_first else groups)
        for step in range(4):
            if step == cast_at:
                model.double()
            x, labels = batch(step, dtype=model["encoder"].weight.dtype)
            model["loss"](model["encoder"](x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    error = 5e-2 if "bf16" in kind else 1e-3
    for got, right in zip(*results, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, right, atol=error, rtol=error)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_that_is_cast_can_be_caught_up(kind):
    optimizer = OPTIMIZERS[kind]([parameter()])
    param = train(optimizer, range(4), sparse=True, share=3)
    in_floats = copy.deepcopy(optimizer)
    in_floats.catch_up()
    param.data, param.grad = param.detach().double(), None
    optimizer.catch_up()
    (right,) = in_floats.param_groups[0]["params"]
    torch.testing.assert_close(param, right.double(), atol=1e-6, rtol=1e-6)
    for name in ("exp_avg", "momentum_buffer"):
        if name in optimizer.state[param]:
            assert optimizer.state[param][name].dtype == torch.float64
    train(optimizer, range(4, 6), sparse=True, share=3)


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = {
    "np.float16": np.float16,
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.ndarray": np.array,
    "np.ndarray of float32": lambda x: np.array(x, dtype=np.float32),
    "tensor": torch.tensor,
    "tensor [1]": lambda x: torch.tensor([x]),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_numbers_of_numpy_and_tensors(number, sparse, tmp_path):
    adamw = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 2**-10, "weight_decay": 0.125}
    sgd = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}
    for ours, options in ((RowAdamW, adamw), (RowSGD, sgd), (RowSGD, {**sgd, "exact": True})):
        given = {
            name: tuple(map(number, value))
            if isinstance(value, tuple)
            else value
            if isinstance(value, bool)
            else number(value)
            for name, value in options.items()
        }
        results = []
        for each in (options, given):
            optimizer = ours([parameter()], **each)
            results.append(train(optimizer, range(3), sparse=sparse, share=2 if sparse else None))
        assert torch.equal(*results)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        ours([parameter()]).load_state_dict(state)
        module = nn.Module()
        module.weight = optimizer.param_groups[0]["params"][0]
        path = tmp_path / f"{ours.__name__}{'exact' in options}"
        parts = {"modules": {"m": module}, "optimizers": {"o": optimizer}}
        checkpoint.save(path, **parts)
        checkpoint.load(path, **parts)


@pytest.mark.parametrize("ours", [RowAdamW, RowSGD])
def test_a_schedule_of_numpys_numbers(ours):
    results = []
    for kind in (float, np.float32):
        optimizer = ours([parameter()], lr=0.5)
        schedule = LambdaLR(optimizer, lambda step, kind=kind: kind(0.5**step))
        for step in range(3):
            param = train(optimizer, [step], sparse=True)
            schedule.step()
        results.append(param)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        np.float32(math.nan),
        torch.tensor(math.nan),
        torch.tensor(True),
        torch.tensor([0.1, 0.2]),
        "0.1",
        None,
        np.float32(-1),
        0.1j,
        np.array(math.nan),
        np.array(-1.0),
        np.array(True),
        np.array(0.1j),
        np.array("0.1"),
        np.array([0.1]),
        np.array([0.1, 0.2]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "momentum"])
def test_what_is_no_number(name, value):
    ours = RowSGD if name == "momentum" else RowAdamW
    allowed = "a number in [0, 1)" if name == "momentum" else "a finite number >= 0"
    message = f"{name} must be {allowed}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ours([parameter()], **{name: value})


def saved_alone(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


SWITCHES = [
    (RowAdamW, "maximize"),
    (RowAdamW, "row_second_moment"),
    (RowAdamW, "fused"),
    (RowSGD, "maximize"),
    (RowSGD, "nesterov"),
    (RowSGD, "exact"),
    (RowSGD, "fused"),
]


@pytest.mark.parametrize(("ours", "name"), SWITCHES)
@pytest.mark.parametrize("given", ["optimizer", "group", "added group", "state dict"])
@pytest.mark.parametrize("value", [True, False])
def test_numpys_switches(ours, name, given, value, tmp_path):
    options = {"momentum": 0.5} if name == "nesterov" else {}
    switch = {name: np.bool_(value)}
    if given == "optimizer":
        optimizer = ours([parameter()], **options, **switch)
    elif given == "group":
        optimizer = ours([{"params": [parameter()], **switch}], **options)
    else:
        optimizer = ours([parameter()], **options)
    if given == "added group":
        optimizer.add_param_group({"params": [parameter()], **switch})
    elif given == "state dict":
        state = optimizer.state_dict()
        state["param_groups"][0][name] = switch[name]
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[-1][name] is value
    train(optimizer, range(2), sparse=True)
    state = saved_alone(optimizer.state_dict(), tmp_path)
    assert state["param_groups"][-1][name] is value
    ours([{"params": g["params"]} for g in optimizer.param_groups]).load_state_dict(state)


@pytest.mark.parametrize(("ours", "name"), SWITCHES)
@pytest.mark.parametrize("value", ["yes", 2, 0.5, (True, False)], ids=repr)
def test_what_is_no_switch(ours, name, value):
    message = f"{name} must be one of (False, True), got {value!r}"
    if isinstance(value, tuple):
        value = np.array(value)
    options = {"momentum": 0.5} if name == "nesterov" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ours([parameter()], **options, **{name: value})


BETAS = {
    "np.ndarray": np.array([0.5, 0.75]),
    "np.ndarray of float32": np.array([0.5, 0.75], dtype=np.float32),
    "0-d arrays": (np.array(0.5), np.array(0.75)),
    "list": [0.5, 0.75],
    "list of np.float32": [np.float32(0.5), np.float32(0.75)],
}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_betas_of_any_kind(betas, tmp_path):
    results = []
    for given, later in (((0.5, 0.75), None), (betas, None), (None, betas)):
        optimizer = RowAdamW([parameter()], **({} if given is None else {"betas": given}))
        if later is not None:
            optimizer.param_groups[0]["betas"] = later
        results.append(train(optimizer, range(3), sparse=True))
        state = saved_alone(optimizer.state_dict(), tmp_path)
        assert list(state["param_groups"][0]["betas"]) == [0.5, 0.75]
        RowAdamW([parameter()]).load_state_dict(state)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), None, np.array(0.9)], ids=repr)
def test_what_is_no_pair_of_betas(betas):
    message = f"betas must be two numbers in [0, 1), got {betas!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RowAdamW([parameter()], betas=betas)


@pytest.mark.parametrize("ours", [RowAdamW, RowSGD])
@pytest.mark.parametrize("sparse", [False, True])
def test_options_of_numpy_that_a_group_got_later(ours, sparse, tmp_path):
    options = {"lr": 0.25, "weight_decay": 0.25, "maximize": True}
    if ours is RowSGD:
        options.update(momentum=0.5, nesterov=True)
    right, optimizer = ours([parameter()], **options), ours([parameter()])
    for name, value in options.items():
        optimizer.param_groups[0][name] = np.bool_(value) if value is True else np.array(value)
    assert torch.equal(*(train(o, range(3), sparse=sparse) for o in (right, optimizer)))
    group = saved_alone(optimizer.state_dict(), tmp_path)["param_groups"][0]
    assert {name: group[name] for name in options} == options


def test_a_group_that_is_given_stays_that_dict():
    group = {"params": [parameter()], "lr": np.float32(0.25)}
    assert RowAdamW([group]).param_groups[0] is group
    assert type(group["lr"]) is float
