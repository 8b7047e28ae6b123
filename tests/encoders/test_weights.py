"""Weights from files: what is read, and what is said of those that do not fit."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from unicom_ext import PartialMarginSoftmax, checkpoint
from unicom_ext.encoders import weights
from unicom_ext.encoders.encoder import WithHead
from unicom_ext.encoders.registry import create
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.vit import SIZES, VisionTransformer
from unicom_ext.encoders.weights import Saved
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError


@pytest.fixture(autouse=True)
def small_transformers(monkeypatch):
    """vit-ti-* of one block, to be quick."""
    monkeypatch.setitem(SIZES, "ti", (8, 1, 2))


def made(path="", embedding_size=0, encoder="vit-ti-16", **settings):
    settings = EncoderSettings(encoder=encoder, weights=str(path), image_size=32, **settings)
    return create(settings, embedding_size)


def state_of(module):
    """All of it at random, so that nothing is equal by being initial."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
        else:
            tensor.fill_(len(name))
    return module.state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


# ---- what is read ----


@pytest.mark.parametrize(
    "around",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.model.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(tmp_path, around, zipped):
    state = state_of(made().module)
    path = tmp_path / "weights.pth"
    torch.save(around(state), path, _use_new_zipfile_serialization=zipped)
    assert same(made(path).module.state_dict(), state)


def test_half_precision_becomes_single(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v
             for k, v in state_of(made().module).items()}  # fmt: skip
    torch.save(state, tmp_path / "FP16.pt")
    loaded = made(tmp_path / "FP16.pt").module.state_dict()
    assert loaded["pos_embed"].dtype == torch.float32
    assert same(loaded, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def test_a_wrapper_of_the_encoders_own_is_no_wrapper(tmp_path):
    """Its names all begin with model., and so do those in the file, or not."""
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 3)})
    state = state_of(module)
    for prefix in ("", "module."):
        torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "w.pt")
        target = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 3)})
        weights.load(target, weights.read(str(tmp_path / "w.pt")), "mine")
        assert same(target.state_dict(), state)


def test_safetensors(tmp_path, monkeypatch):
    """With the library's function in its place, which is not among what the tests need."""
    state, path = state_of(made().module), tmp_path / "w.safetensors"
    path.write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = (
        "w.safetensors needs the package safetensors, which is not installed: pip install "
        "safetensors"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        made(path)
    library = types.ModuleType("safetensors.torch")
    library.load_file = lambda name: {path: state}[name]
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)
    assert same(made(path).module.state_dict(), state)
    library.load_file = lambda name: torch.zeros(2).view(3)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: cannot be read: shape "):
        made(path)


def test_checkpoints_of_a_run(tmp_path):
    encoder = made(embedding_size=6, encoder="small", width=2).module
    state = state_of(encoder)
    modules = {"encoder": torch.nn.DataParallel(encoder), "loss": PartialMarginSoftmax(6, 4)}
    step = tmp_path / "checkpoints" / "step-10"
    checkpoint.save(step, modules=modules)
    checkpoint.merge(step, tmp_path / "merged.pt")
    for path in (step, step.parent, tmp_path / "merged.pt"):
        loaded = made(path, encoder="small", width=2)
        assert loaded.dim == 6
        assert same(loaded.module.state_dict(), state)
    other = tmp_path / "other"
    checkpoint.save(other, modules={"loss": modules["loss"]})
    checkpoint.merge(other, tmp_path / "other.pt")
    for path in (other, tmp_path / "other.pt"):
        message = f"{path}: there is no module 'encoder' in it"
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            made(path, encoder="small", width=2)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: there is no check"):
        made(tmp_path)


# ---- sizes ----


def test_the_size_is_that_of_the_weights(tmp_path):
    torch.save(made(embedding_size=5).module.state_dict(), tmp_path / "w.pt")
    loaded = made(tmp_path / "w.pt")
    assert (loaded.dim, type(loaded.module)) == (5, VisionTransformer)


def test_a_head_follows_weights_of_another_size(tmp_path):
    state = state_of(made().module)
    torch.save(state, tmp_path / "w.pt")
    loaded = made(tmp_path / "w.pt", 5)
    assert (loaded.dim, type(loaded.module)) == (5, WithHead)
    assert same(loaded.module.body.state_dict(), state)
    # Trained and saved with its head, it comes back whole.
    trained = state_of(loaded.module)
    torch.save(trained, tmp_path / "trained.pt")
    for embedding_size in (0, 5):
        again = made(tmp_path / "trained.pt", embedding_size)
        assert again.dim == 5
        assert same(again.module.state_dict(), trained)
    message = (
        f"{tmp_path}/trained.pt: does not fit vit-ti-16: head.0.weight is [5, 8], must be [4, 8]; "
        "5 of 34 tensors differ"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        made(tmp_path / "trained.pt", 4)


# ---- what does not fit ----


def refusal(module, tensors):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        weights.load(module, Saved("w.pt", tensors), "vit-ti-16")
    assert same(module.state_dict(), before)
    return str(caught.value)


def test_the_first_difference_is_named():
    module = made().module
    good = state_of(made().module)
    total = len(good)
    prefix = "w.pt: does not fit vit-ti-16: "
    wrong = {**good, "norm.bias": torch.zeros(9)}
    assert refusal(module, wrong) == (
        f"{prefix}norm.bias is [9], must be [8]; 1 of {total} tensors differ"
    )
    del wrong["blocks.0.attn.proj.weight"]
    assert refusal(module, wrong) == (
        f"{prefix}blocks.0.attn.proj.weight is missing; 2 of {total} tensors differ"
    )
    wrong["head.weight"] = torch.zeros(1)
    assert refusal(module, wrong) == (
        f"{prefix}blocks.0.attn.proj.weight is missing; 3 of {total + 1} tensors differ"
    )
    assert refusal(module, {**good, "head.weight": torch.zeros(1)}) == (
        f"{prefix}head.weight is not part of it; 1 of {total + 1} tensors differ"
    )


def test_an_output_of_no_size(tmp_path):
    torch.save({"feature.2.weight": torch.tensor(3.0)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"pos_embed is missing; 28 of 28 tensors differ$"):
        made(tmp_path / "w.pt")


def test_weights_of_another_image_size():
    tensors = create(EncoderSettings(encoder="vit-ti-16", image_size=48)).module.state_dict()
    assert refusal(made().module, tensors) == (
        "w.pt: does not fit vit-ti-16: pos_embed is [1, 9, 8], must be [1, 4, 8]; 2 of 28 tensors "
        "differ. Its tokens are flattened, so that weights serve one image_size alone"
    )


@pytest.mark.parametrize(
    ("name", "image_size", "released"),
    [
        ("vit-b-32", 224, "vit-b-32 at 224 px"),
        ("vit-b-16", 224, "vit-b-16 at 224 px"),
        ("vit-l-14", 224, "vit-l-14 at 224 px"),
        ("vit-l-14", 336, "vit-l-14 at 336 px"),
    ],
)
def test_released_weights_are_recognised(name, image_size, released):
    with torch.device("meta"):
        tensors = create(EncoderSettings(encoder=name, image_size=image_size)).module.state_dict()
    message = refusal(made().module, tensors)
    assert message.startswith("w.pt: does not fit vit-ti-16: pos_embed is [1, ")
    assert message.endswith(f" tensors differ. The shapes are those of {released}")


def test_released_weights_of_another_image_size(monkeypatch):
    with torch.device("meta"):
        large = create(EncoderSettings(encoder="vit-l-14", image_size=336)).module.state_dict()
        monkeypatch.setattr(weights, "read", lambda path: Saved(path, large))
        settings = EncoderSettings(encoder="vit-l-14", weights="FP16-ViT-L-14-336px.pt")
        with pytest.raises(CheckpointError) as caught:
            create(settings)
    assert str(caught.value) == (
        "FP16-ViT-L-14-336px.pt: does not fit vit-l-14: pos_embed is [1, 576, 1024], must be "
        "[1, 256, 1024]; 2 of 281 tensors differ. The shapes are those of vit-l-14 at 336 px"
    )


# ---- files that are something else ----


class Anything:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b"text", "is no file that torch.save has written"),
        (b"", "is no file that torch.save has written"),
        ({}, "holds no tensors by name"),
        ([torch.zeros(1)], "holds no tensors by name"),
        ({"epoch": 3, "net": torch.zeros(1)},
         "holds a int under 'epoch', must hold tensors by name"),
        ({0: torch.zeros(1)}, "holds a Tensor under 0, must hold tensors by name"),
        ({"a": Anything()},
         f"holds {__name__}.Anything, and reading that could run code; must hold tensors alone, as "
         "torch.save(encoder.state_dict(), ...) writes them"),
    ],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: {message}')}$"):
        made(path)


def test_files_that_are_cut_off(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(made().module.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: "):
        made(path)
