"""Row-sparse gradients of the prototypes behave as gradients do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.problems import random_problem, solve
from torch import nn

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.optim import RowAdamW, RowSGD, clip_grad_norm_


def make(sparse_grad=True, **options):
    torch.manual_seed(0)
    options = {"sample_rate": 0.2, "feature_rate": 0.5, "scale": 16.0, **options}
    return PartialMarginSoftmax(12, 100, margin=ArcFace(0.3), sparse_grad=sparse_grad, **options)


def batch(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 12, generator=generator)
    return x, torch.randint(100, (size,), generator=generator)


def dense_and_sparse(seeds=(0,)):
    """Both modules after the backward passes of some batches."""
    modules = make(False), make(True)
    for module in modules:
        for seed in seeds:
            module(*batch(seed)).backward()
    return modules


def test_one_backward_gives_whole_ascending_rows():
    _, module = dense_and_sparse()
    gradient = module.weight.grad
    assert gradient.is_sparse
    assert torch.equal(gradient._indices()[0], module.last_selection.class_index)
    assert gradient._values().shape == (len(module.last_selection.class_index), 12)


def test_micro_batches_with_different_selections_add_up():
    dense, sparse = dense_and_sparse(seeds=range(3))
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    RowSGD([sparse.weight], lr=0.1).step()
    torch.optim.SGD([dense.weight], lr=0.1).step()
    torch.testing.assert_close(sparse.weight, dense.weight)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    _, module = dense_and_sparse()
    optimizer = RowSGD([module.weight], lr=0.1)
    optimizer.zero_grad(set_to_none=to_none)
    assert module.weight.grad is None if to_none else module.weight.grad._nnz() == 0
    before = module.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.weight, before)
    module(*batch(5)).backward()
    fresh = make()
    fresh.step.fill_(1)
    fresh(*batch(5)).backward()
    assert torch.equal(module.weight.grad.to_dense(), fresh.weight.grad.to_dense())


def test_hooks_see_and_replace_the_gradient():
    module, seen = make(), []
    module.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    module(*batch(0)).backward()
    _, plain = dense_and_sparse()
    assert torch.equal(seen[0].to_dense(), plain.weight.grad.to_dense())
    assert torch.equal(seen[1].to_dense(), 2 * plain.weight.grad.to_dense())
    assert torch.equal(module.weight.grad.to_dense(), seen[1].to_dense())


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one", "accumulated"])
@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_clipping_is_torchs_on_the_dense_gradient(norm_type, seeds, max_norm):
    modules = dense_and_sparse(seeds)
    other = [nn.Parameter(torch.zeros(3)) for _ in modules]
    for p in other:
        p.grad = torch.arange(3.0)
    theirs = nn.utils.clip_grad_norm_([modules[0].weight, other[0]], max_norm, norm_type)
    ours = clip_grad_norm_([modules[1].weight, other[1]], max_norm, norm_type)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(modules[1].weight.grad.to_dense(), modules[0].weight.grad)
    torch.testing.assert_close(other[1].grad, other[0].grad)


def test_clipping_of_an_infinite_gradient():
    _, module = dense_and_sparse()
    module.weight.grad._values()[0, 0] = torch.inf
    before = module.weight.grad.to_dense()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(module.weight, 1.0, error_if_nonfinite=True)
    assert torch.equal(module.weight.grad.to_dense(), before)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one", "accumulated"])
def test_grad_scaler(seeds):
    plain, scaled = make(), make()
    optimizer = RowAdamW([plain.weight], lr=0.1)
    for seed in seeds:
        plain(*batch(seed)).backward()
    optimizer.step()

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = RowAdamW([scaled.weight], lr=0.1)
    for seed in seeds:
        scaler.scale(scaled(*batch(seed))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(scaled.weight, plain.weight)

    before = scaled.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(scaled(*batch(7)) * torch.inf).backward()
    scaler.step(optimizer)  # skipped
    scaler.update()
    assert torch.equal(scaled.weight, before)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_batch_of_gradients(training):
    """Of the embeddings, by a vmap over backward, in which there are no sparse tensors."""
    results = []
    for module in (make(False, reduction="none"), make(True, reduction="none")):
        x, y = batch(0)
        x.requires_grad_()
        losses = module.train(training)(x, y)
        (batched,) = torch.autograd.grad(losses, x, torch.eye(len(x)), is_grads_batched=True)
        results.append(batched)
    assert torch.equal(*results)
    (first,) = torch.autograd.grad(module(x, y, step=0)[0], x)
    torch.testing.assert_close(first, batched[0])


def test_rows_beyond_32_bits():
    """More values than 2**31 and more bytes than 2**32, of which only a few pages are touched."""
    num_classes, dim = 2**23 + 3, 257
    weight = torch.from_numpy(np.zeros((num_classes, dim), np.int16)).view(torch.bfloat16)
    rows = torch.tensor([0, 5, 2**22, 2**23 - 1, 2**23, num_classes - 1])
    problem = random_problem(40, 6, dim, dtype=torch.bfloat16, closeness=0.5)
    weight[rows] = problem.prototypes
    x = problem.embeddings.clone().requires_grad_()
    loss = partial_margin_softmax(
        x, rows[problem.labels], weight.requires_grad_(), class_index=rows, sparse_grad=True,
        **problem.options,
    )  # fmt: skip
    loss.backward()
    right = solve(partial_margin_softmax, problem)
    assert torch.equal(loss.detach(), right.loss)
    assert torch.equal(x.grad, right.grad_embeddings)
    assert torch.equal(weight.grad._indices()[0], rows)
    assert torch.equal(weight.grad._values(), right.grad_prototypes)
    RowSGD([weight], lr=0.5).step()
    assert torch.equal(weight[rows], problem.prototypes - 0.5 * right.grad_prototypes)


class OwnAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, OwnAdam])
def test_a_dense_optimizer_is_told_which_one_to_use(kind):
    module, other = make(), nn.Parameter(torch.ones(3))
    module(*batch(0)).backward()
    other.grad = torch.ones(3)
    optimizer, name = kind([{"params": other}, {"params": module.weight}]), kind.__name__
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"{name} takes no sparse gradients.*RowAdamW"):
        optimizer.step()
    assert torch.equal(other.detach(), torch.ones(3))
    assert torch.equal(module.weight, before)
    assert not optimizer.state


TAKERS = [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam, torch.optim.LBFGS]


@pytest.mark.parametrize("optimizer", TAKERS)
def test_torchs_sparse_optimizers_take_it(optimizer):
    module = make()
    loss = module(*batch(0))
    loss.backward()
    before = module.weight.detach().clone()
    optimizer([module.weight], lr=0.1).step(lambda: loss.detach())
    moved = (module.weight != before).any(dim=1)
    assert torch.equal(moved.nonzero()[:, 0], module.last_selection.class_index)


def test_one_optimizer_trains_encoder_and_prototypes():
    torch.manual_seed(0)
    encoder, module = nn.Linear(12, 12), make(feature_rate=1.0)
    optimizer = RowAdamW([{"params": encoder.parameters(), "lr": 1e-2}, {"params": module.weight}],
                         lr=0.1)  # fmt: skip
    x, labels = batch(0)
    losses = []
    for _ in range(40):
        loss = module(encoder(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [0.2, 1.0])
def test_a_compiled_step_gives_the_same_rows(sample_rate):
    torch.compiler.reset()
    modules = [make(sample_rate=sample_rate) for _ in range(2)]
    optimizers = [RowAdamW([module.weight], lr=0.1) for module in modules]
    calls = modules[0], torch.compile(modules[1], fullgraph=True, backend="aot_eager")
    for seed in range(3):
        for call, optimizer in zip(calls, optimizers, strict=True):
            x, labels = batch(seed)
            optimizer.zero_grad()
            call(x.requires_grad_(), labels).backward()
            optimizer.step()
        eager, compiled = (module.weight.grad for module in modules)
        assert compiled.is_sparse
        assert torch.equal(compiled.to_dense(), eager.to_dense())
        assert torch.equal(modules[1].weight, modules[0].weight)
    torch.compiler.reset()
