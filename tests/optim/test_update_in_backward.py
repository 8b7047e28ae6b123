"""Updating the prototypes inside backward is the update after it, or is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.updates import OPTIMIZERS, batch, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from unicom_ext import gradients as gradients_of_ranks
from unicom_ext.ops.row_sparse import updater_of
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


def test_a_step_that_is_taken_back():
    """As after a loss that was NaN: the state of before is loaded, and training goes on."""
    module, optimizer = attached()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    module(*batch(0)).backward()
    module.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    module(*batch(0)).backward()
    optimizer.step()
    once, other = attached()
    once(*batch(0)).backward()
    other.step()
    assert torch.equal(module.weight, once.weight)


def test_losses_of_samples_are_refused():
    module, optimizer = attached()
    module.reduction = "none"
    loss = module(*batch(0))
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match='plain steps only: the loss has reduction="none"'):
        loss.backward(torch.ones_like(loss))
    assert torch.equal(module.weight, before)
    assert not optimizer.state


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


@each_optimizer
@pytest.mark.parametrize("apart", [False, True])
def test_a_second_term_on_the_weight_is_refused(optimizer, apart):
    """By the step, as what backward adds to weight.grad is seen only after it."""
    module, encoder = make(), nn.Linear(22, 22)
    # The prototypes come first: they would be updated before anything else fails.
    chosen = optimizer([{"params": [module.weight]}, {"params": encoder.parameters()}])
    chosen.update_in_backward(module)
    x, labels = batch(0)
    loss, start = module(encoder(x), labels), module.weight.detach().clone()
    term = 0.1 * module.weight.square().sum()
    if apart:
        loss.backward()
        module.weight.square().sum().backward()
    else:
        (loss + term).backward()
    before = copy.deepcopy([module.weight.detach(), *encoder.parameters()])
    assert not torch.equal(module.weight, start)
    assert module.weight.grad is not None
    state = copy.deepcopy(chosen.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            chosen.step()
        assert str(raised.value) == (
            "the prototypes have been updated in backward, by the loss, and weight has another "
            "gradient besides (of a second term on the weight, or of a loss in eval() mode), which "
            "would be a second update of this step. Nothing more has been updated. Make an "
            "optimizer without update_in_backward for this"
        )
        now = [module.weight, *encoder.parameters()]
        assert all(map(torch.equal, now, before))
        assert str(chosen.state_dict()) == str(state)
    chosen.zero_grad()
    chosen.step()  # which was of the loss alone
    module(encoder(x), labels).backward()
    chosen.step()


def test_a_second_term_that_was_made_before_is_refused_by_torch():
    module, optimizer = attached()
    term = module.weight.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (module(*batch(0)) + term).backward()
    alone, other = attached()
    alone(*batch(0)).backward()
    assert torch.equal(module.weight, alone.weight)  # the update of the loss alone
    for each in (optimizer, other):
        each.step()
    module(*batch(1)).backward()
    alone(*batch(1)).backward()
    assert torch.equal(module.weight, alone.weight)


def test_a_second_term_in_a_closure_is_refused():
    module, optimizer = attached()

    def closure():
        loss = module(*batch(0)) + module.weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="which would be a second update of this step"):
        optimizer.step(closure)


def test_a_term_on_the_weight_alone_is_a_step():
    weights = []
    for inside in (False, True):
        module = make()
        optimizer = RowAdamW([module.weight], lr=0.1)
        if inside:
            optimizer.update_in_backward(module)
        for step in range(2):
            module(*batch(step), step=step).backward()
            optimizer.step()
            optimizer.zero_grad()
            module.weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)


def test_several_calls_in_one_backward_are_refused():
    module, optimizer = attached()
    for losses in ([module(*batch(i)) for i in range(2)], [module(*batch(i)) for i in range(3)]):
        message = "plain steps only: this backward is of several calls of the loss"
        refused(module, optimizer, sum(losses), message)
        assert module.weight.grad is None
    module(*batch(3)).backward()  # and now it goes on


def test_losses_that_are_kept_are_no_second_call():
    weights = []
    for keeping in (False, True):
        module, optimizer = attached()
        kept = []
        for step in range(4):
            if keeping:
                kept.append(module(*batch(9), step=9))  # no backward follows
            kept.append(module(*batch(step), step=step))
            kept[-1].backward(retain_graph=keeping)
            optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)


def test_old_losses_die():
    module, optimizer = attached()
    updater = updater_of(module.weight)
    losses = [module(*batch(i)) for i in range(3)]
    assert len(updater.nodes) == 3
    with torch.no_grad():
        module(*batch(3))
    del losses
    assert not updater.nodes
    assert optimizer


def test_a_loss_in_eval_besides_is_refused():
    module, optimizer = attached()
    module(*batch(0)).backward()
    module.eval()(*batch(1)).backward()
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"or of a loss in eval\(\) mode"):
        optimizer.step()
    assert torch.equal(module.weight, before)


def test_in_eval_a_step_follows_as_ever():
    weights = []
    for inside in (False, True):
        module = make().eval()
        optimizer = RowAdamW([module.weight], lr=0.1)
        if inside:
            optimizer.update_in_backward(module)
        module(*batch(0)).backward()
        optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], make().weight)


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
    with pytest.raises(RuntimeError, match="cannot be clipped where prototypes are updated"):
        gradients_of_ranks.clip_grad_norm_(encoder.parameters(), module, 1e-3)
    assert torch.equal(encoder.weight.grad, before)
    optimizer.step()
    gradients_of_ranks.clip_grad_norm_(encoder.parameters(), module, 1e-3)


def test_hooks_are_refused():
    module, optimizer = attached()
    handle = module.weight.register_hook(lambda grad: grad * 2)
    refused(module, optimizer, module(*batch(0)), "gradient hooks")
    handle.remove()
    module.weight.register_post_accumulate_grad_hook(lambda p: None)
    refused(module, optimizer, module(*batch(0)), "gradient hooks")


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_is_refused():
    module, optimizer = attached()
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="create_graph=True asks for gradients that can be"):
        module(*batch(0)).backward(create_graph=True)
    assert torch.equal(module.weight, before)
    optimizer.step()
    assert torch.equal(module.weight, before)


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


# --- asking for gradients trains nothing


def embeddings_by_grad(loss, x, module):
    return torch.autograd.grad(loss, x)[0]


def embeddings_by_backward(loss, x, module):
    loss.backward(inputs=[x])
    return x.grad


def embeddings_and_prototypes(loss, x, module):
    to_x, to_weight = torch.autograd.grad(loss, [x, module.weight])
    assert to_weight.is_sparse
    assert torch.equal(to_weight.to_dense(), gradients(x.detach(), module.training)[1])
    return to_x


def jacobian(loss, x, module):
    labels = batch(0)[1]
    return torch.autograd.functional.jacobian(lambda x: module(x, labels, step=0), x.detach())


def through_a_kept_graph(loss, x, module):
    torch.autograd.grad(loss, x, retain_graph=True)
    return torch.autograd.grad(loss, x)[0]


QUERIES = [
    embeddings_by_grad,
    embeddings_by_backward,
    embeddings_and_prototypes,
    jacobian,
    through_a_kept_graph,
]


def gradients(x, training=True):
    """Of embeddings and prototypes, from a loss that no optimizer is attached to."""
    module = make().train(training)
    x = x.clone().requires_grad_()
    to_x, to_weight = torch.autograd.grad(module(x, batch(0)[1]), [x, module.weight])
    return to_x, to_weight.to_dense()


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_query_has_no_effect(query, training):
    module, optimizer = attached()
    module.train(training)
    weight, version = module.weight.detach().clone(), module.weight._version
    x, labels = batch(0)
    to_x = query(module(x, labels, step=0), x, module)
    assert torch.equal(to_x, gradients(batch(0)[0], training)[0])
    assert module.weight.grad is None
    optimizer.step()
    assert torch.equal(module.weight, weight)
    assert module.weight._version == version
    assert not optimizer.state


def test_queries_between_steps_change_no_step():
    weights = []
    for asking in (False, True):
        module, optimizer = attached()

        def ask(module=module, asking=asking):
            x, labels = batch(9)
            if asking:
                torch.autograd.grad(3 * module(x, labels, step=9), x)

        for step in range(3):
            ask()
            x, labels = batch(step)
            loss = module(x, labels, step=step)
            if asking:
                torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
            ask()  # the step has yet to come
            optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)


def test_in_eval_backward_stores_the_gradient():
    module, optimizer = attached()
    before = module.weight.detach().clone()
    x, labels = batch(0)
    loss = module.eval()(x, labels)
    module.train()  # what counts is how the loss was made
    loss.backward()
    assert torch.equal(module.weight, before)
    to_x, to_weight = gradients(batch(0)[0], training=False)
    assert torch.equal(x.grad, to_x)
    assert torch.equal(module.weight.grad.to_dense(), to_weight)
    refused(module, optimizer, module(*batch(1)), "weight.grad is there already")
    optimizer.zero_grad()
    module(*batch(1)).backward()
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("inputs", [["weight"], ["x", "weight"], ["x", "weight", "encoder"]])
def test_backward_for_the_weight_among_others_updates_it(inputs):
    weights = []
    for given in (None, inputs):
        module, optimizer = attached()
        encoder = nn.Linear(22, 22)
        nn.init.eye_(encoder.weight)
        nn.init.zeros_(encoder.bias)
        x, labels = batch(0)
        leaves = {"x": x, "weight": module.weight, "encoder": encoder.weight}
        chosen = None if given is None else [leaves[name] for name in given]
        module(encoder(x), labels).backward(inputs=chosen)
        assert module.weight.grad is None
        optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[1], make().weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant):
    weights = []
    for checkpointed in (False, True):
        module, optimizer = attached()
        x, labels = batch(0)

        def loss(x, module=module, labels=labels):
            return module(x, labels, step=0)

        if checkpointed:
            checkpoint(loss, x, use_reentrant=use_reentrant).backward()
        else:
            loss(x).backward()
        optimizer.step()
        weights.append(module.weight.detach())
        assert not torch.equal(weights[-1], make().weight)
    assert torch.equal(*weights)


# --- copies


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_a_file]


@pytest.mark.parametrize("copied", COPIES)
@each_optimizer
def test_copies_train_the_usual_way(copied, optimizer):
    module = make()
    chosen = optimizer([module.weight])
    chosen.update_in_backward(module)
    module(*batch(0)).backward()
    chosen.step()
    for order in (1, -1):
        module2, chosen2 = copied((module, chosen)[::order])[::order]
        assert chosen2.param_groups[0]["params"][0] is module2.weight
        module2(*batch(1)).backward()
        assert module2.weight.grad is not None
        chosen2.step()
        chosen2.zero_grad()
        chosen2.update_in_backward(module2)
        module2(*batch(2)).backward()
        assert module2.weight.grad is None
        chosen2.step()
    # What was copied goes on as before, and the copies did the same steps.
    for step in (1, 2):
        module(*batch(step)).backward()
        assert module.weight.grad is None
        chosen.step()
    assert torch.equal(module.weight, module2.weight)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_one_alone(copied):
    module, optimizer = attached()
    module(*batch(0)).backward()  # its step has yet to come
    copy_of_module, copy_of_optimizer = copied(module), copied(optimizer)
    copy_of_module(*batch(1)).backward()
    assert copy_of_module.weight.grad is not None
    copy_of_optimizer.step()
    refused(module, optimizer, module(*batch(1)), "a backward has passed since the last")
    optimizer.step()


def test_the_weight_saved_alone_holds_tensors_only():
    module, _optimizer = attached()
    file = io.BytesIO()
    torch.save(module.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), module.weight)


def test_the_update_goes_with_its_optimizer():
    module, optimizer = attached()
    del optimizer
    before = module.weight.detach().clone()
    module(*batch(0)).backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight, before)


def test_the_optimizer_that_came_last_updates():
    module, first = attached()
    second = RowAdamW([module.weight], lr=0.1)
    second.update_in_backward(module)
    second.update_in_backward(module)
    module(*batch(0)).backward()
    assert not first.state
    assert second.state[module.weight]
    second.step()
    module(*batch(1)).backward()


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
