"""Activation checkpointing around the loss, without `step=`: backward draws what forward drew."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unicom_ext import PartialMarginSoftmax
from unicom_ext.compat import PartialFC_V2

C, D, B = 300, 16, 8


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, D), nn.Tanh())
        rates = {"sample_rate": 0.1, "feature_rate": 0.5, **options}
        self.loss = PartialMarginSoftmax(D, C, **rates)

    def forward(self, images, labels):
        return self.loss(self.encoder(images), labels)


def batches(count, seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(B, 6, generator=generator),
            torch.randint(C, (B,), generator=generator) if labels is None else labels,
        )
        for _ in range(count)
    ]


def gradients(model):
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return grads


def non_reentrant(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


def the_loss_alone(model, images, labels):
    return non_reentrant(model.loss, model.encoder(images), labels)


def the_whole_model(model, images, labels):
    return non_reentrant(model, images, labels)


def nested(model, images, labels):
    return non_reentrant(
        lambda images, labels: non_reentrant(model.loss, model.encoder(images), labels) * 1.0,
        images,
        labels,
    )


def labels_made_inside(model, images, labels):
    return non_reentrant(
        lambda images, labels: model(images, labels.int().long() + 0), images, labels
    )


WAYS = pytest.mark.parametrize(
    "way", [the_loss_alone, the_whole_model, nested, labels_made_inside], ids=lambda f: f.__name__
)


@WAYS
@pytest.mark.parametrize("rates", [(0.1, 0.5), (0.1, 1.0), (1.0, 0.5), (1.0, 1.0)], ids=str)
def test_gradients_are_those_without(way, rates):
    options = {"sample_rate": rates[0], "feature_rate": rates[1]}
    plain, checkpointed = Model(**options), Model(**options)
    for images, labels in batches(3):
        plain(images, labels).backward()
        way(checkpointed, images, labels).backward()
        for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
            assert torch.equal(a, b)
    assert int(plain.loss.step) == int(checkpointed.loss.step) == 3


@WAYS
def test_several_calls_before_one_backward(way):
    plain, checkpointed = Model(), Model()
    sum(plain(*each) for each in batches(4)).backward()
    sum(way(checkpointed, *each) for each in batches(4)).backward()
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert int(checkpointed.loss.step) == 4


def test_views_of_the_same_images_whose_embeddings_are_from_outside():
    labels = batches(1)[0][1]
    plain, checkpointed = Model(), Model()
    views = batches(3, labels=labels)
    sum(plain(*view) for view in views).backward()
    sum(the_loss_alone(checkpointed, *view) for view in views).backward()
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_reentrant_call_beside_one_of_the_same_labels_is_refused():
    """Of which nothing was noted: it must not be taken for the other."""
    model = Model()
    (first, labels), (second, _) = batches(2)
    kept = non_reentrant(model, first, labels)
    embeddings = model.encoder(second)
    loss = checkpoint(model.loss, embeddings, labels, use_reentrant=True)
    with pytest.raises(RuntimeError, match="but none of the calls that may be repeated") as caught:
        loss.backward()
    assert "; or checkpoint with use_reentrant=False; or leave" in str(caught.value)
    kept.backward()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_loss_cannot_be_repeated(backend, use_reentrant):
    torch._dynamo.reset()
    model = Model()
    embeddings = model.encoder(batches(1)[0][0])
    labels = torch.arange(B)
    compiled = torch.compile(model.loss, backend=backend)
    loss = checkpoint(compiled, embeddings, labels, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value).startswith(
        "the loss is called in backward, as activation checkpointing does, and must draw what it "
        "drew at first, which a compiled loss cannot. Compile a function that calls checkpoint"
    )
    assert all(p.grad is None for p in model.parameters())
    torch._dynamo.reset()


def test_a_compiled_loss_that_is_told_its_step_can_be_repeated():
    torch._dynamo.reset()
    plain, checkpointed = Model(), Model()
    compiled = torch.compile(checkpointed.loss, backend="eager")
    for step, (images, labels) in enumerate(batches(2)):
        plain(images, labels).backward()
        own = torch.tensor(step)
        non_reentrant(compiled, checkpointed.encoder(images), labels, own).backward()
        for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_loss_that_draws_nothing_advances_once(backend, use_reentrant):
    """Which counts as soon as it draws: `sample_rate` may be set later."""
    torch._dynamo.reset()
    model = Model()
    model.loss.sample_rate = model.loss.feature_rate = 1.0
    compiled = torch.compile(model.loss, backend=backend)
    for images, labels in batches(3):
        embeddings = model.encoder(images)
        checkpoint(compiled, embeddings, labels, use_reentrant=use_reentrant).backward()
    assert model.loss.step == 3
    torch._dynamo.reset()


def test_hooks_of_others_for_what_is_saved():
    """Which may be callables of any kind."""
    model = Model()
    images, labels = batches(1)[0]
    right = Model()
    right(images, labels).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, torch.Tensor.contiguous):
        loss = model(images, labels)
    loss.backward()
    for a, b in zip(gradients(right), gradients(model), strict=True):
        assert torch.equal(a, b)


def test_calls_that_cannot_be_told_apart_are_refused():
    labels = batches(1)[0][1]
    model = Model()
    total = sum(the_whole_model(model, *view) for view in batches(2, labels=labels))
    with pytest.raises(RuntimeError) as caught:
        total.backward()
    assert str(caught.value) == (
        "the loss is called in backward, as activation checkpointing does, and must draw what it "
        "drew at first, but 2 of the calls that may be repeated had these labels. Give step= to "
        "the call that is checkpointed, another number each time; or leave the loss out, it keeps "
        "no logits"
    )
    assert int(model.loss.step) == 2


def test_the_same_batch_again_and_again():
    plain, checkpointed = Model(), Model()
    images, labels = batches(1)[0]
    kept = []
    for _ in range(4):
        plain(images, labels).backward()
        kept.append(the_whole_model(checkpointed, images, labels))
        kept[-1].backward()
        for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
            assert torch.equal(a, b)


def test_labels_in_a_buffer_that_is_filled_anew():
    plain, checkpointed = Model(), Model()
    buffer = torch.zeros(B, dtype=torch.int64)
    for images, labels in batches(3):
        plain(images, labels).backward()
        buffer.copy_(labels)
        the_whole_model(checkpointed, images, buffer).backward()
        for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
            assert torch.equal(a, b)


def test_backward_twice():
    plain, checkpointed = Model(), Model()
    images, labels = batches(1)[0]
    plain(images, labels).backward()
    right = gradients(plain)
    loss = the_whole_model(checkpointed, images, labels)
    for _ in range(2):
        loss.backward(retain_graph=True)
        checkpointed(images, labels)  # one that is not repeated, in between
        for a, b in zip(right, gradients(checkpointed), strict=True):
            assert torch.equal(a, b)


def test_reentrant_checkpointing_is_refused_where_something_is_drawn():
    model = Model()
    images, labels = batches(1)[0]
    loss = checkpoint(model.loss, model.encoder(images), labels, use_reentrant=True)
    with pytest.raises(RuntimeError, match="but none of the calls that may be repeated had these"):
        loss.backward()
    assert int(model.loss.step) == 1


def test_reentrant_checkpointing_where_nothing_is_drawn_or_the_step_is_given():
    options = {"sample_rate": 1.0, "feature_rate": 1.0}
    for given, made in (((), options), ((5,), {})):
        plain, checkpointed = Model(**made), Model(**made)
        images, labels = batches(1)[0]
        plain.loss(plain.encoder(images), labels, *given).backward()
        x = checkpointed.encoder(images)
        checkpoint(checkpointed.loss, x, labels, *given, use_reentrant=True).backward()
        for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
            assert torch.equal(a, b)
        assert int(checkpointed.loss.step) == int(plain.loss.step)


def test_int32_labels_of_the_compatible_head():
    heads = [PartialFC_V2(Model().loss.margin, D, C, sample_rate=0.1) for _ in range(2)]
    labels = batches(1)[0][1]
    x = torch.randn(B, D, requires_grad=True)
    right = torch.autograd.grad(heads[0](x, labels), x)[0]
    loss = checkpoint(heads[1], x, labels[:, None].int(), use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], right)


def test_nothing_is_kept_of_graphs_that_are_gone():
    from unicom_ext.loss.recomputation import _draws

    model = Model()
    for each in batches(5):
        the_whole_model(model, *each).backward()
        model(*each).backward()
    gc.collect()
    the_whole_model(model, *batches(1)[0])
    assert len(_draws[model.loss]) == 1
    pickle.dumps(model.loss)
