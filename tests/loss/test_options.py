"""The options of the loss: one declaration, good once made, and attributes of the module."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, fields
from typing import get_type_hints

import pytest
import torch
from support.problems import random_problem

from unicom_ext import ArcFace, CombinedMargin, CosFace, PartialMarginSoftmax, reference
from unicom_ext.compat import PartialFC_V2
from unicom_ext.functional import LossKwargs, LossOptions, partial_margin_softmax
from unicom_ext.loss.options import OptionAttributes

C, D = 50, 6
NAMES = [field.name for field in fields(LossOptions)]

# One value that is not the default, and one that is refused, of each option that has any. (With
# label smoothing some of these others are refused; it has tests of its own.)
OTHER = {
    "margin": CosFace(0.2),
    "scale": 32.0,
    "interclass_filter": 0.1,
    "label_smoothing": 0.0,
    "margin_grad": "exact",
    "beyond_pi": "linear",
    "multi_label": "separate",
    "precision": "bf16",
    "reduction": "sum",
    "ignore_index": 3,
    "grad_average": False,
    "uneven_batches": False,
    "sparse_grad": True,
    "check_inputs": True,
    "workspace_bytes": 0,
    "num_centers": 3,
}
BAD = {
    "margin": 0.3,
    "scale": -1.0,
    "interclass_filter": 2.0,
    "label_smoothing": 1.0,
    "margin_grad": "none",
    "beyond_pi": True,
    "multi_label": "mean",
    "precision": "tf32",
    "reduction": "avg",
    "ignore_index": None,
    "grad_average": "no",
    "uneven_batches": 2,
    "sparse_grad": float("nan"),
    "check_inputs": None,
    "workspace_bytes": -1,
    "num_centers": 0,
}


def test_keywords_are_the_options_that_have_defaults():
    keywords, options = get_type_hints(LossKwargs), get_type_hints(LossOptions)
    assert list(options) == NAMES == ["margin", "scale", *keywords]
    assert {name: options[name] for name in keywords} == keywords
    attributes = {name: value for name, value in vars(OptionAttributes).items() if name in NAMES}
    assert {name: value.__orig_class__.__args__ for name, value in attributes.items()} == {
        name: (option,) for name, option in {**options, "scale": float}.items()
    }
    assert list(OTHER) == NAMES


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: partial_margin_softmax(
            torch.ones(1, D), torch.zeros(1).long(), torch.ones(C, D),
            margin=ArcFace(0.3), scale=64.0, **options,
        ),
        lambda **options: reference.partial_margin_softmax(
            torch.ones(1, D), torch.zeros(1).long(), torch.ones(C, D),
            margin=ArcFace(0.3), scale=64.0, **options,
        ),
        lambda **options: PartialMarginSoftmax(D, C, **options),
        lambda **options: PartialFC_V2(ArcFace(0.3), D, C, **options),
    ],
    ids=["function", "reference", "module", "compat"],
)  # fmt: skip
def test_an_unknown_keyword_is_named_with_those_that_there_are(call):
    with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'beyond_tau'; "):
        call(beyond_tau="keep")
    with pytest.raises(TypeError) as caught:
        call(beyond_tau="keep")
    assert str(caught.value).endswith("options of the loss are " + ", ".join(NAMES))


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        LossOptions(ArcFace(0.3), 64.0).scale = 32.0


def test_what_ranks_agree_on_is_told_in_this_order():
    options = LossOptions(ArcFace(0.3), 64.0)
    assert list(options.same_on_every_rank()) == [
        "margin", "scale", "interclass_filter", "label_smoothing", "margin_grad", "beyond_pi",
        "multi_label", "precision", "reduction", "ignore_index", "grad_average", "uneven_batches",
        "num_centers",
    ]  # fmt: skip
    assert options.same_on_every_rank()["margin"] == "ArcFace(0.3)"


@pytest.mark.parametrize("name", BAD)
def test_a_rank_with_a_bad_option_keeps_the_good_ones(name):
    given = {**OTHER, name: BAD[name]}
    options, failure = LossOptions.for_ranks(given)
    assert isinstance(failure, (TypeError, ValueError))
    assert name in str(failure)
    for other in NAMES:
        if other != name:
            assert getattr(options, other) == OTHER[other]
    assert LossOptions.for_ranks(OTHER) == (LossOptions(**OTHER), None)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "num_centers"])
def test_an_attribute_of_the_module_is_its_option(name):
    module, made = PartialMarginSoftmax(D, C), PartialMarginSoftmax(D, C, **{name: OTHER[name]})
    setattr(module, name, OTHER[name])
    assert getattr(module, name) == getattr(made, name) == OTHER[name]
    assert module.options == made.options
    labels = torch.arange(8)
    for reduction in ("mean", "none") if name not in ("reduction", "uneven_batches") else (None,):
        if reduction is not None:
            module.reduction = made.reduction = reduction
        results = []
        for one in (module, made):
            x = random_problem(8, C, D).embeddings.requires_grad_()
            loss = one(x, labels)
            grads = torch.autograd.grad(loss.sum(), (x, one.weight))
            assert grads[1].is_sparse == one.sparse_grad
            results.append((loss, grads[0], grads[1].to_dense()))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in BAD if name != "num_centers"])
def test_a_bad_value_is_refused_when_it_is_set(name):
    module = PartialMarginSoftmax(D, C)
    before = module.options
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        setattr(module, name, BAD[name])
    assert module.options == before


def test_a_copy_has_options_of_its_own():
    module = PartialMarginSoftmax(D, C)
    other = copy.deepcopy(module)
    other.scale = 32.0
    assert (module.scale, other.scale) == (64.0, 32.0)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_module_takes_new_options(fresh_compiler):
    module = PartialMarginSoftmax(D, C)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    problem = random_problem(8, C, D)
    for scale, margin in ((64.0, ArcFace(0.3)), (32.0, CombinedMargin(1.0, 0.2, 0.1))):
        module.scale, module.margin = scale, margin
        loss = compiled(problem.embeddings, problem.labels)
        assert torch.equal(loss, module(problem.embeddings, problem.labels, step=0))
        again = compiled(problem.embeddings, problem.labels, margin=CosFace(0.1))
        assert not torch.equal(loss, again)


def test_a_module_pickled_when_options_were_attributes():
    module = PartialMarginSoftmax(D, C, **OTHER)
    state = dict(module.__dict__)
    del state["options"]
    for name in ("sample_rate", "feature_rate"):
        state[name] = state.pop(f"_{name}")
    old = PartialMarginSoftmax.__new__(PartialMarginSoftmax)
    old.__setstate__({**state, **OTHER})
    assert old.options == module.options
    assert old.scale == 32.0
    assert (old.sample_rate, old.feature_rate) == (1.0, 1.0)
    assert not {*NAMES, "sample_rate", "feature_rate"} & set(old.__dict__)
