"""Updating the prototypes inside backward is the update after it, or is refused."""

from __future__ import annotations

import pytest
import torch
from support.updates import OPTIMIZERS, batch, make
from torch import nn

from unicom_ext.optim import RowAdamW, clip_grad_norm_

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.mark.pairs
@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"feature_rate": 1.0}, {"sample_rate": 1.0}, {"precision": "bf16", "reduction": "sum"}],
    ids=["both", "classes", "features", "bf16"],
)
def test_it_is_the_update_after_backward(optimizer, dtype, options, set_threads):
    set_threads(2)
    results = []
    for inside in (False, True):
        module = make(dtype, **options)
        chosen = optimizer([module.weight])
        if inside:
            chosen.update_in_backward(module)
        gradients = []
        for step in range(6):
            # Repeated and ignored labels, and a batch that is empty or has none but ignored ones.
            x, labels = batch(step, size=0 if step == 3 else 40, dtype=torch.promote_types(
                dtype, torch.float32))  # fmt: skip
            labels[::7] = labels[:1]
            labels[1::5] = -100
            if step == 4:
                labels[:] = -100
            module(x, labels).backward()
            assert (module.weight.grad is None) == inside
            chosen.step()
            chosen.zero_grad()
            gradients.append(x.grad)
        results.append((module.weight.detach(), gradients, chosen.state[module.weight]))
    (weight, gradients, state), (weight_inside, gradients_inside, state_inside) = results
    if dtype == torch.bfloat16:  # a gradient that is stored is rounded first
        assert torch.equal(gradients[0], gradients_inside[0])
        difference = torch.linalg.vector_norm((weight - weight_inside).float())
        assert difference < 0.05 * torch.linalg.vector_norm(weight.float())
        return
    for a, b in zip(gradients, gradients_inside, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(weight, weight_inside)
    assert state.keys() == state_inside.keys()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state_inside[name])


def attached(**options):
    module = make(**options)
    optimizer = RowAdamW([module.weight], lr=0.1)
    optimizer.update_in_backward(module)
    return module, optimizer


def refused(module, optimizer, loss, message):
    before = module.weight.detach().clone()
    steps = optimizer.state.get(module.weight, {}).get("row_step", torch.zeros(1)).clone()
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    assert torch.equal(module.weight, before)
    after = optimizer.state.get(module.weight, {}).get("row_step", torch.zeros(1))
    assert torch.equal(after, steps)


def test_accumulation_is_refused():
    module, optimizer = attached()
    module(*batch(0)).backward()
    refused(module, optimizer, module(*batch(1)), "a backward has passed since the last")
    optimizer.step()
    module(*batch(2)).backward()  # and now it goes on


def test_a_gradient_that_is_there_is_refused():
    module, optimizer = attached()
    module.weight.grad = torch.zeros_like(module.weight)
    refused(module, optimizer, module(*batch(0)), "weight.grad is there already")


def test_scaling_is_refused():
    module, optimizer = attached()
    refused(module, optimizer, module(*batch(0)) / 4, "multiplied by 0.25 before backward")
    scaler = torch.amp.GradScaler("cpu")
    refused(module, optimizer, scaler.scale(module(*batch(0))), "multiplied by 65536")


def test_clipping_is_refused():
    module, optimizer = attached()
    encoder = nn.Linear(22, 22)
    module(encoder(batch(0)[0]), batch(0)[1]).backward()
    before = encoder.weight.grad.clone()
    with pytest.raises(RuntimeError, match="cannot be clipped where prototypes are updated"):
        clip_grad_norm_([*encoder.parameters(), module.weight], 1e-3)
    assert torch.equal(encoder.weight.grad, before)
    optimizer.step()


def test_hooks_are_refused():
    module, optimizer = attached()
    handle = module.weight.register_hook(lambda grad: grad * 2)
    refused(module, optimizer, module(*batch(0)), "gradient hooks")
    handle.remove()
    module.weight.register_post_accumulate_grad_hook(lambda p: None)
    refused(module, optimizer, module(*batch(0)), "gradient hooks")


def test_a_second_backward_of_the_same_graph_is_refused():
    module, optimizer = attached()
    loss = module(*batch(0))
    loss.backward(retain_graph=True)
    optimizer.step()
    refused(module, optimizer, loss, "modified by an inplace operation")


def test_other_parameters_get_their_gradients_and_updates():
    module, _ = attached()
    encoder = nn.Linear(22, 22)
    optimizer = RowAdamW([{"params": encoder.parameters()}, {"params": module.weight, "lr": 0.1}])
    optimizer.update_in_backward(module)
    x, labels = batch(0)
    losses = []
    for _ in range(30):
        loss = module(encoder(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_options_that_were_loaded_count():
    """Loading makes other dicts of the groups."""
    module, optimizer = attached()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = module.weight.detach().clone()
    module(*batch(0)).backward()
    assert optimizer.state[module.weight]["row_step"].any()
    assert torch.equal(module.weight, before)


def test_a_frozen_weight_is_not_updated():
    module, _ = attached()
    module.weight.requires_grad_(False)
    before = module.weight.clone()
    x, labels = batch(0)
    module(x, labels).backward()
    assert torch.equal(module.weight, before)
    assert x.grad is not None


def test_what_cannot_be_updated_in_backward():
    module = make()
    with pytest.raises(ValueError, match="must be among the optimizer's parameters"):
        RowAdamW([nn.Parameter(torch.zeros(2, 2))]).update_in_backward(module)
    module.sparse_grad = False
    with pytest.raises(ValueError, match="sparse_grad=True"):
        RowAdamW([module.weight]).update_in_backward(module)
    module = make(reduction="none")
    with pytest.raises(ValueError, match='reduction "mean" or "sum"'):
        RowAdamW([module.weight]).update_in_backward(module)
