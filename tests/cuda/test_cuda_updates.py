"""The row optimizers' CUDA kernels over the emulation, beside the CPU's: what test_optim.py does
not see of them, sparse gradients that keep their padding above all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import backends
from support.updates import OPTIMIZERS, batch
from support.updates import make as make_module
from torch import nn

from unicom_ext.ops.row_sparse import _note_merged, is_merged
from unicom_ext.optim import RowAdamW, RowSGD, clip_grad_norm_, rows, states
from unicom_ext.optim.in_backward import UpdateInBackward

pytestmark = pytest.mark.emulated

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TIGHT = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 2**-8, torch.float16: 2**-11}
VARIANTS = {
    "adamw": lambda p: RowAdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-row": lambda p: RowAdamW(p, lr=0.01, row_second_moment=True, maximize=True),
    "adamw-bf16": lambda p: RowAdamW(p, lr=0.01, moment_dtype=torch.bfloat16),
    "adamw-bf16-row": lambda p: RowAdamW(
        p, lr=0.01, moment_dtype=torch.bfloat16, row_second_moment=True
    ),
    "sgd": lambda p: RowSGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-exact": lambda p: RowSGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, exact=True),
    "sgd-plain": lambda p: RowSGD(p, lr=0.05, weight_decay=0.1, maximize=True),
}
variants = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


class Padded(torch.autograd.Function):
    """A loss whose gradient is made as CUDA's backward makes it: padded to a fixed size."""

    @staticmethod
    def forward(ctx, param, ids, values, size):
        ctx.made = ids, values, size, param.shape
        return param.sum()

    @staticmethod
    def backward(ctx, _):
        ids, values, size, shape = ctx.made
        count, last = len(ids), ids[-1:] if len(ids) else torch.zeros(1, dtype=torch.int64)
        padded = torch.cat([ids, last.expand(size - count)])
        filled = values.new_zeros(size, shape[1])
        filled[:count] = values
        _note_merged(padded, torch.tensor(count))
        return (
            torch.sparse_coo_tensor(
                padded.unsqueeze(0), filled, shape, is_coalesced=False, check_invariants=False
            ),
            *(None, None, None),
        )


def sampled(generator, num_rows=40, dim=17, share=0.3, dtype=torch.float32):
    ids = (torch.rand(num_rows, generator=generator) < share).nonzero()[:, 0]
    return ids, torch.randn(len(ids), dim, generator=generator).to(dtype)


def tensors(optimizer, param):
    state = optimizer.state[param]
    return {"": param.detach(), **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}


@variants
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_padded_gradients_on_cuda_are_those_of_the_cpu(make, dtype, monkeypatch):
    for dim in (1, 3, 17, 64, 129, 512):
        start = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
        results = []
        for backend in ("cpu", "emulated_cuda"):
            with monkeypatch.context() as patch:
                if backend != "cpu":
                    backends.use(patch, backend)
                generator = torch.Generator().manual_seed(dim)
                param = nn.Parameter(start.clone())
                optimizer = make([param])
                for step in range(6):
                    ids, values = sampled(generator, 40, dim, dtype=dtype)
                    optimizer.zero_grad()
                    Padded.apply(param, ids, values, 40 + step if step % 2 else len(ids)).backward()
                    optimizer.param_groups[0]["lr"] = 0.01 * (1 + step)
                    optimizer.step()
                results.append(tensors(optimizer, param))
        right, got = results
        assert not torch.equal(right[""], start)
        for name, value in right.items():
            assert got[name].dtype == value.dtype
            allowed = max(TIGHT.get(value.dtype, 0), TIGHT[torch.float32] if name else 0)
            torch.testing.assert_close(got[name], value, rtol=4 * allowed, atol=allowed, msg=name)


@variants
def test_rows_that_are_not_aligned(make, emulated):
    results = []
    for offset, stride in ((0, 64), (0, 65), (1, 64)):
        memory = torch.zeros(20 * 66 + offset)
        param = nn.Parameter(memory[offset:].as_strided((20, 64), (stride, 1), offset))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            param.copy_(torch.randn(20, 64, generator=generator))
        optimizer = make([param])
        ids, values = sampled(generator, 20, 64)
        Padded.apply(param, ids, values, 20).backward()
        optimizer.step()
        results.append(param.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@variants
def test_a_step_in_which_nothing_was_sampled(make, emulated):
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = make([param])
    for ids in ([0, 2], []):
        before = {k: v.clone() for k, v in tensors(optimizer, param).items()}
        optimizer.zero_grad()
        ids = torch.tensor(ids, dtype=torch.int64)
        Padded.apply(param, ids, torch.ones(len(ids), 3), 4).backward()
        optimizer.step()
    after = tensors(optimizer, param)
    for name, value in before.items():
        if name in ("", "row_step", "last_step", "momentum_buffer") or name.startswith("exp_avg"):
            assert torch.equal(after[name], value), name


def test_the_gradient_of_one_backward_is_not_merged(emulated, monkeypatch):
    def unexpected(*_):
        raise AssertionError("merged")

    param = nn.Parameter(torch.zeros(40, 17))
    optimizer = RowAdamW([param])
    ids, values = sampled(torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(rows, "merge_rows", unexpected)
        Padded.apply(param, ids, values, 45).backward()
        assert not param.grad.is_coalesced()
        optimizer.step()
        assert optimizer.state[param]["row_step"].sum() == len(ids)
        Padded.apply(param, ids, values, 45).backward()  # one more, on top
        with pytest.raises(AssertionError, match="merged"):
            optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["row_step"].sum() == 2 * len(ids)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_add_up(make, dtype, monkeypatch):
    results = []
    for backend in ("cpu", "emulated_cuda"):
        with monkeypatch.context() as patch:
            if backend != "cpu":
                backends.use(patch, backend)
            generator = torch.Generator().manual_seed(0)
            param = nn.Parameter(torch.randn(40, 17, generator=generator).to(dtype))
            optimizer = make([param])
            for _ in range(3):
                parts = []
                for _ in range(3):
                    param.grad = None
                    Padded.apply(param, *sampled(generator, dtype=dtype), 45).backward()
                    parts.append(param.grad)
                # As autograd adds on CUDA.
                param.grad = torch.sparse_coo_tensor(
                    torch.cat([part._indices() for part in parts], 1),
                    torch.cat([part._values() for part in parts]),
                    param.shape,
                    check_invariants=False,
                )
                assert not is_merged(param.grad)
                optimizer.step()
            results.append(tensors(optimizer, param))
    right, got = results
    for name, value in right.items():
        allowed = max(TIGHT.get(value.dtype, 0), TIGHT[torch.float32] if name else 0)
        torch.testing.assert_close(got[name], value, rtol=4 * allowed, atol=allowed, msg=name)


@settings(max_examples=60)
@given(st.data())
def test_merging(data):
    cuda = backends.BACKENDS["emulated_cuda"]()
    num_rows, dim = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 5, 33, 64]))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=30)), dtype=int)
    dtype = data.draw(st.sampled_from(FLOATING))
    values = torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    empty = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    values[torch.tensor(empty, dtype=torch.bool)] = 0.0
    before = ids.clone(), values.clone()
    merged_ids, merged_values = cuda.merge_rows(ids, values)
    assert torch.equal(ids, before[0])
    assert torch.equal(values, before[1])
    assert merged_ids.shape == ids.shape
    assert (merged_ids.diff() >= 0).all()
    first = torch.ones(len(ids), dtype=torch.bool)
    first[1:] = merged_ids.diff() > 0
    assert not merged_values[~first].any()
    right_ids, right_values = torch.ops.unicom_ext.merge_rows(ids, values)
    assert torch.equal(merged_ids[first], right_ids)
    assert torch.equal(merged_values[first], right_values)


def test_long_runs_of_padding_are_not_added_up_one_by_one(emulated):
    # What is empty goes behind everything else, to the last id.
    ids = torch.tensor([2, 7, 7, 7, 7, 0, 9, 5, 5])
    values = torch.ones(9, 4)
    values[[2, 3, 4, 8]] = 0
    values[8, 3] = float("nan")  # not nothing
    merged_ids, merged_values = rows.merge_rows(ids, values)
    assert merged_ids.tolist() == [0, 2, 5, 5, 7, 9, 9, 9, 9]
    assert merged_values[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert merged_values[:, 3].isnan().tolist() == [i == 2 for i in range(9)]


def test_clipping_keeps_what_is_merged(emulated):
    param = nn.Parameter(torch.zeros(40, 17))
    generator = torch.Generator().manual_seed(0)
    first, second = sampled(generator), sampled(generator)
    Padded.apply(param, *first, 45).backward()
    norm = clip_grad_norm_(param, 1.0)
    torch.testing.assert_close(norm, first[1].norm())
    assert is_merged(param.grad)
    torch.testing.assert_close(param.grad.to_dense().norm(), torch.tensor(1.0))
    param.grad = None
    Padded.apply(param, *first, 45).backward()
    Padded.apply(param, *second, 45).backward()
    right = param.grad.to_dense().norm()
    torch.testing.assert_close(clip_grad_norm_(param, 1.0), right)
    assert is_merged(param.grad)
    torch.testing.assert_close(param.grad.to_dense().norm(), torch.tensor(1.0))


def test_ids_that_are_no_rows_are_passed_over(emulated):
    param = nn.Parameter(torch.ones(4, 3))
    param.grad = torch.sparse_coo_tensor(
        torch.tensor([[-1, 1, 4, 2**40]]), torch.ones(4, 3), (4, 3), check_invariants=False
    )
    RowSGD([param], lr=1.0).step()
    assert param.detach()[:, 0].tolist() == [1, 0, 1, 1]


def test_bad_state_is_refused_before_anything_changes(emulated):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = RowAdamW([param])
    optimizer.init_row_state([param])
    state = optimizer.state[param]
    for name, bad, message in (
        ("exp_avg", torch.zeros(4, 2), r"exp_avg must be \[4, 3\]"),
        ("exp_avg", torch.zeros(4, 3, dtype=torch.float16), "exp_avg must be Float or"),
        ("exp_avg_sq", torch.zeros(3), r"exp_avg_sq must be Float of shape \[4\]"),
        ("row_step", torch.zeros(4), "row_step must be Int"),
    ):
        good, state[name] = state[name], bad
        param.grad = torch.sparse_coo_tensor(
            [[1]], torch.ones(1, 3), (4, 3), check_invariants=False
        )
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        state[name] = good
    assert torch.equal(param.detach(), torch.ones(4, 3))
    assert not state["row_step"].any()


def test_what_the_host_reads_stays_on_the_host():
    # `total_log_decay` and the number of the step; a matrix goes where the parameter is.
    param = nn.Parameter(torch.zeros(3, 2, device="meta"))
    for shape, device in (((7, 4), "meta"), ((3,), "meta"), ((), "cpu")):
        assert states.following(param, torch.zeros(shape), None).device.type == device


# --- inside backward


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"sample_rate": 1.0, "reduction": "sum"}),
        (torch.bfloat16, {"feature_rate": 1.0, "precision": "fp16"}),
    ],
    ids=["float32", "all-classes", "bfloat16"],
)
def test_an_update_in_backward_is_the_update_after_it(make, dtype, options, emulated):
    results = []
    for inside in (False, True):
        module = make_module(dtype, **options)
        optimizer = make([module.weight])
        if inside:
            optimizer.update_in_backward(module)
        gradients = []
        for step in range(3):
            size = 0 if step == 1 else 40
            x, labels = batch(step, size, torch.promote_types(dtype, torch.float32))
            labels[::7], labels[1::5] = labels[:1], -100
            module(x, labels).backward()
            assert (module.weight.grad is None) == inside
            optimizer.step()
            optimizer.zero_grad()
            gradients.append(x.grad)
        results.append((*gradients, module.weight.detach(), optimizer.state[module.weight]))
    (*stored, state), (*inside, state_inside) = results
    for a, b in zip(stored, inside, strict=True):
        assert torch.equal(a, b)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state_inside[name])


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], OPTIMIZERS["sgd-exact"]])
def test_a_scaled_loss_updates_nothing_and_says_so_with_nan(make, emulated, monkeypatch):
    # What the host sees on a CPU, it would have to wait for on CUDA.
    monkeypatch.setattr(UpdateInBackward, "_refuse_all_but_plain_steps", lambda *_: None)
    module = make_module()
    optimizer = make([module.weight])
    optimizer.update_in_backward(module)
    optimizer.init_row_state([module.weight])
    x, labels = batch(0)
    labels[3] = -100
    steps = optimizer.state[module.weight].get("row_step", torch.zeros(1)).clone()
    before = module.weight.detach().clone()
    (module(x, labels) * 4).backward()
    assert torch.equal(module.weight, before)
    assert torch.equal(steps, optimizer.state[module.weight].get("row_step", torch.zeros(1)))
    rows = x.grad[labels >= 0]
    assert rows.isnan().any(dim=1).all()
    assert not rows[:, module.last_selection.feature_index].isfinite().any()
    x, labels = batch(0)
    module(x, labels).backward()
    assert x.grad.isfinite().all()
    assert not torch.equal(module.weight, before)
