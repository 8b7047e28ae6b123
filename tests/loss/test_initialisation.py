"""Losses made without memory, and back to the start: weight and step are never what memory held."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from unicom_ext import PartialMarginSoftmax

C, D, B = 400, 16, 8
NO_VALUES = (
    "the prototypes (weight) of the loss have been on the meta device or in "
    "to_empty() and have no values: call "
    "reset_parameters() of the loss (in the models of Hugging Face from _init_weights), load a "
    "state dict, or fill them"
)


def make(**options) -> PartialMarginSoftmax:
    return PartialMarginSoftmax(D, C, sample_rate=0.2, feature_rate=0.5, seed=3, **options)


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=generator)
    return x, torch.randint(C, (B,), generator=generator)


def filled_with_junk(module: nn.Module) -> nn.Module:
    """As `to_empty` may leave it; it gives zeros mostly, where memory is new."""
    for tensor in (*module.parameters(), *module.buffers()):
        junk = torch.full_like(tensor, 139643112143664)
        tensor.data = junk  # without a count of changes
    return module


def assert_new(module: PartialMarginSoftmax) -> None:
    new = make(dtype=module.weight.dtype)
    assert int(module.step) == 0
    assert torch.equal(module.weight, new.weight)
    assert module.last_selection is None
    assert torch.equal(module(*batch()), new(*batch()))
    assert int(module.step) == 1


def test_from_meta_to_the_start():
    module = make(device="meta")
    module.to_empty(device="cpu")
    filled_with_junk(module).reset_parameters()
    assert_new(module)


def test_from_meta_by_context_inside_a_model():
    with torch.device("meta"):
        model = nn.ModuleDict({"encoder": nn.Linear(4, D), "loss": make()})
    filled_with_junk(model.to_empty(device="cpu"))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_new(model["loss"])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_to_empty_of_a_loss_that_was_trained(inside, normed):
    module = make()
    module(*batch())
    if normed:
        nn.utils.parametrizations.weight_norm(module)
    (nn.Sequential(module) if inside else module).to_empty(device="cpu")
    assert int(module.step) == 0
    with pytest.raises(RuntimeError) as caught:
        module(*batch())
    assert str(caught.value) == NO_VALUES
    if normed:
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    module.reset_parameters()
    assert_new(module)


def test_what_keeps_values_keeps_them():
    module = make()
    module(*batch())
    weight = module.weight.detach().clone()
    for change in (lambda m: m.double().float(), lambda m: m.to("cpu"), lambda m: m.share_memory()):
        assert torch.equal(change(module).weight, weight)
        assert int(module.step) == 1
    module(*batch())


def test_a_first_prototype_of_zeros_is_written():
    """As fresh memory has them: a class without a centroid."""
    module = make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        module.weight.copy_(make().weight)
        module.weight[0] = 0
    assert module(*batch()).isfinite()
    nn.init.zeros_(module.to_empty(device="cpu").weight)
    module(*batch())


@pytest.mark.parametrize(
    "put",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.3),
    ],
    ids=["weight_norm", "parametrizations", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_a_function_of_others_is_not_reset(put):
    module = make()
    module(*batch())
    put(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"reset_parameters\(\) cannot reset a weight that"):
        module.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_step_of_a_loss_that_comes_from_meta_is_0():
    for module in (
        make(device="meta").to_empty(device="cpu"),
        nn.utils.skip_init(PartialMarginSoftmax, D, C),
        nn.Sequential(make().to("meta")).to_empty(device="cpu")[0],
    ):
        assert int(module.step) == 0


def test_after_steps_back_to_the_start():
    module = make()
    for _ in range(3):
        module(*batch())
    assert int(module.step) == 3
    module.reset_parameters()
    assert module.last_metrics is None
    assert_new(module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        lambda: make(device="meta").to_empty(device="cpu"),
        lambda: nn.utils.skip_init(PartialMarginSoftmax, D, C),
        lambda: make().to("meta").to_empty(device="cpu"),
        lambda: copy.deepcopy(make(device="meta")).to_empty(device="cpu"),
    ],
    ids=["to_empty", "skip_init", "there and back", "copied"],
)
def test_prototypes_that_were_never_written_are_refused(made, training):
    module = made().train(training)
    with pytest.raises(RuntimeError) as caught:
        module(*batch())
    assert str(caught.value) == NO_VALUES
    assert int(module.step) == 0
    module.reset_parameters()
    module(*batch())


def test_what_writes_prototypes_is_accepted():
    values = make().weight.detach() + 1
    state = {**make().state_dict(), "weight": values, "step": torch.tensor(7)}

    def loaded(module, **options):
        module.load_state_dict({k: v.clone() for k, v in state.items()}, **options)
        return module

    def by_hand(module):
        with torch.no_grad():
            module.weight.copy_(values)
        return module

    def as_hugging_face_does(module):
        for name, value in (
            ("weight", nn.Parameter(values.clone())),
            ("step", state["step"].clone()),
        ):
            value._is_hf_initialized = True
            setattr(module, name, value)
        return module

    for module, step in (
        (loaded(make(device="meta").to_empty(device="cpu")), 7),
        (loaded(make(device="meta"), assign=True), 7),
        (loaded(nn.Sequential(make(device="meta").to_empty(device="cpu"))[0]), 7),
        (by_hand(make(device="meta").to_empty(device="cpu")), 0),
        (as_hugging_face_does(make(device="meta")), 7),
    ):
        x, y = batch()
        expected = make()
        by_hand(expected).step.fill_(step)
        assert torch.equal(module(x, y), expected(x, y))
        assert int(module.step) == step + 1


def test_prototypes_from_a_file_with_a_step_that_is_in_none():
    # Hugging Face fills what a file lacks with memory as it is.
    module = make(device="meta")
    weight = nn.Parameter(make().weight.detach().clone())
    weight._is_hf_initialized = True
    module.weight, module.step = weight, torch.empty((), dtype=torch.int64)
    module.step.data = torch.tensor(139643112143664)
    module._is_hf_initialized = True  # which it sets at the end
    assert int(module.step) == 0
    module(*batch())
    assert int(module.step) == 1


def test_prototypes_that_hugging_face_has_left_as_memory_is():
    """It puts memory in the place of what a file lacks, and trusts `_init_weights`."""
    module = make(device="meta")
    module.weight = nn.Parameter(torch.empty(C, D))
    module.step = torch.empty((), dtype=torch.int64)
    module._is_hf_initialized = True
    with pytest.raises(RuntimeError, match="have no values"):
        module(*batch())
    module.weight.data.normal_(0, 0.01)  # as most of its models do
    module(*batch())
    assert int(module.step) == 1


WRITTEN = {
    "data.normal_": lambda m: m.weight.data.normal_(0, 0.01),
    "data.copy_": lambda m: m.weight.data.copy_(torch.ones(C, D)),
    "data": lambda m: setattr(m.weight, "data", torch.randn(C, D)),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(C, D))),
    "_parameters": lambda m: m._parameters.update(weight=nn.Parameter(torch.randn(C, D))),
    "NumPy": lambda m: np.copyto(m.weight.detach().numpy(), np.ones((C, D), np.float32)),
    "init": lambda m: nn.init.normal_(m.weight),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(
    "then",
    [
        lambda module: module,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: module.double().float(),
    ],
    ids=["", "copied", "pickled", "cast"],
)
def test_whatever_writes_prototypes_is_accepted(write, then):
    module = make(device="meta").to_empty(device="cpu")
    unwritten = then(copy.deepcopy(module))
    with pytest.raises(RuntimeError, match="have no values"):
        unwritten(*batch())
    write(module)
    module = then(module)
    x, y = batch()
    expected = make()
    expected.load_state_dict({**expected.state_dict(), "weight": module.weight.detach()})
    assert torch.equal(module(x, y), expected(x, y))
    assert int(module.step) == 1


@pytest.mark.parametrize("rates", [(1, 1), (0.3, 1), (1, 0.5), (0.3, 0.5)])
def test_a_state_dict_without_a_step_on_meta(rates):
    """Of published weights, with `assign`: the step would stay where there is no memory."""
    options = {"sample_rate": rates[0], "feature_rate": rates[1], "seed": 5}
    module = PartialMarginSoftmax(D, C, device="meta", **options)
    weight = make().weight.detach()
    missing = module.load_state_dict({"weight": weight}, strict=False, assign=True).missing_keys
    assert missing == ["step", "_extra_state"]
    expected = PartialMarginSoftmax(D, C, **options)
    expected.load_state_dict({**expected.state_dict(), "weight": weight})
    for _ in range(2):
        assert torch.equal(module(*batch()), expected(*batch()))
    assert module.state_dict()["step"].item() == 2
    module.reset_parameters()
    assert int(module.step) == 0


def test_a_skeleton_on_meta_is_called_with_the_parameters_of_many():
    modules = [PartialMarginSoftmax(D, C, seed=seed) for seed in (1, 2)]
    skeleton = copy.deepcopy(modules[0]).to("meta")
    params, buffers = torch.func.stack_module_state(modules)
    x, y = batch()
    losses = torch.func.vmap(
        lambda p, b: torch.func.functional_call(skeleton, (p, b), (x, y)), randomness="same"
    )(params, buffers)
    assert torch.allclose(losses, torch.stack([module(x, y) for module in modules]))


def test_a_loss_that_was_never_on_meta_may_hold_anything():
    module = make()
    module.weight = nn.Parameter(torch.ones(C, D))
    module(*batch())


def test_centroids_have_no_place_on_meta():
    with pytest.raises(
        ValueError, match=r"^from_centroids has no memory to fill on the meta device"
    ):
        PartialMarginSoftmax.from_centroids(torch.randn(C, D), device="meta")


def test_a_state_dict_of_an_encoder_alone_leaves_the_loss_at_its_start():
    model = nn.ModuleDict({"encoder": nn.Linear(4, D), "loss": make()})
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"encoder": nn.Linear(4, D)}).state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file), strict=False)
    assert_new(model["loss"])
