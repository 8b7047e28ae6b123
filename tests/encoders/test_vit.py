"""UNICOM's vision transformer: formula, names and shapes, what training does to it."""

from __future__ import annotations

import math

import pytest
import torch

from unicom_ext.encoders import vit
from unicom_ext.encoders.registry import create
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.vit import Block, VisionTransformer

TINY = {"image_size": 12, "patch": 4, "width": 12, "depth": 3, "heads": 3, "embedding_size": 5}


@pytest.fixture
def tiny():
    """In double precision, with statistics and weights that are not those of the beginning."""
    torch.manual_seed(0)
    module = VisionTransformer(**TINY).double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2) if "var" in name else tensor.normal_()
    return module


# ---- the formula, written anew with products of matrices ----


def normalised(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def block(x, state, heads):
    """One sample, tokens [n, width]."""
    width = x.shape[1]
    each = width // heads
    q, k, v = (normalised(x, state, "norm1") @ state["attn.qkv.weight"].T).split(width, 1)
    mixed = []
    for head in range(heads):
        part = slice(head * each, (head + 1) * each)
        scores = (q[:, part] @ k[:, part].T / math.sqrt(each)).exp()
        mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    x = x + torch.cat(mixed, 1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    hidden = normalised(x, state, "norm2") @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
    return x + hidden.clamp(0, 6) @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]


def batch_normalised(x, state, name):
    x = (x - state[f"{name}.running_mean"]) / (state[f"{name}.running_var"] + 2e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def network(image, state, patch, heads):
    """One image [3, s, s]."""
    weight = state["patch_embed.proj.weight"].flatten(1)
    tokens = []
    for top in range(0, image.shape[1] - patch + 1, patch):
        for left in range(0, image.shape[2] - patch + 1, patch):
            values = image[:, top : top + patch, left : left + patch].flatten()
            tokens.append(weight @ values + state["patch_embed.proj.bias"])
    x = torch.stack(tokens) + state["pos_embed"][0]
    for i in range(TINY["depth"]):
        prefix = f"blocks.{i}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        x = block(x, own, heads)
    x = state["feature.0.weight"] @ normalised(x, state, "norm").flatten()
    x = state["feature.2.weight"] @ batch_normalised(x, state, "feature.1")
    return batch_normalised(x, state, "feature.3")


def test_a_block_equals_its_formula(tiny):
    x = torch.randn(4, 9, 12, dtype=torch.float64)
    state = tiny.blocks[1].state_dict()
    expected = torch.stack([block(sample, state, TINY["heads"]) for sample in x])
    torch.testing.assert_close(tiny.blocks[1](x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rest", [0, 3])
def test_the_network_equals_its_formula(tiny, rest):
    """What is left over by the patches is not seen."""
    images = torch.randn(4, 3, 12 + rest, 12 + rest, dtype=torch.float64)
    expected = torch.stack([network(i, tiny.state_dict(), 4, TINY["heads"]) for i in images])
    torch.testing.assert_close(tiny(images), expected, rtol=1e-9, atol=1e-9)


def test_gradients(tiny):
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiny.blocks[0], x)


# ---- names and shapes ----


@pytest.mark.parametrize(
    ("name", "image_size", "tensors", "millions", "shapes"),
    [
        ("vit-b-32", 0, 149, 116.7, ([1, 49, 768], [768, 37632], [512, 768])),
        ("vit-b-16", 0, 149, 202.0, ([1, 196, 768], [768, 150528], [768, 768])),
        ("vit-l-14", 0, 281, 572.3, ([1, 256, 1024], [1024, 262144], [768, 1024])),
        ("vit-l-14", 336, 281, 908.2, ([1, 576, 1024], [1024, 589824], [768, 1024])),
    ],
)
def test_released_networks_have_their_published_shapes(name, image_size, tensors, millions, shapes):
    with torch.device("meta"):
        encoder = create(EncoderSettings(encoder=name, image_size=image_size))
    state = encoder.module.state_dict()
    assert len(state) == tensors
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == millions
    names = ("pos_embed", "feature.0.weight", "feature.2.weight")
    assert tuple(list(state[key].shape) for key in names) == shapes
    assert encoder.dim == shapes[2][0]
    size = image_size or 224
    assert encoder.preprocessing.size == size
    assert vit.released_as(state) == f"{name} at {size} px"


def test_names_of_the_tensors():
    with torch.device("meta"):
        state = VisionTransformer(**{**TINY, "depth": 1}).state_dict()
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert sorted(state) == sorted(
        [
            "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
            "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.norm2.weight",
            "blocks.0.norm2.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
            "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias",
            "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias", "norm.weight", "norm.bias",
            "feature.0.weight", "feature.2.weight",
            *(f"feature.{i}.{name}" for i in (1, 3) for name in batch_norm),
        ]
    )  # fmt: skip


def test_images_are_prepared_as_published():
    with torch.device("meta"):
        found = create(EncoderSettings(encoder="vit-ti-32")).preprocessing
    assert (found.size, found.mode, found.crop, found.interpolation) == (224, "RGB", 1, "bicubic")
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)
    assert found.std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(("name", "own"), [("vit-ti-32", 192), ("vit-s-32", 384)])
def test_sizes_that_were_never_released(name, own):
    with torch.device("meta"):
        assert create(EncoderSettings(encoder=name)).dim == own
        other = create(EncoderSettings(encoder=name, image_size=64), 7)
    assert (other.dim, list(other.module.pos_embed.shape)) == (7, [1, 4, own])
    assert isinstance(other.module, VisionTransformer)


# ---- training ----


def test_blocks_are_skipped_more_the_later_they_are():
    rates = [part.drop_path for part in VisionTransformer(**TINY).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])
    assert VisionTransformer(**{**TINY, "depth": 1}).blocks[0].drop_path == 0


def test_a_sample_skips_each_half_or_has_it_scaled():
    torch.manual_seed(0)
    part = Block(8, 2, drop_path=0.25).double()
    x = torch.randn(400, 3, 8, dtype=torch.float64)
    found = part(x)
    half = part.attn(part.norm1(x)) / 0.75
    second = [part.mlp(part.norm2(y)) / 0.75 for y in (x, x + half)]
    cases = torch.stack([x, x + second[0], x + half, x + half + second[1]])
    same = (found - cases).abs().amax((2, 3)) < 1e-12
    assert same.sum(0).eq(1).all()
    share = same.double().mean(1)
    expected = torch.tensor([0.0625, 0.1875, 0.1875, 0.5625], dtype=torch.float64)
    assert (share - expected).abs().max() < 0.06
    part.eval()
    assert torch.equal(part(x), part(x))
    torch.manual_seed(1)
    first = part.train()(x)
    torch.manual_seed(1)
    assert torch.equal(first, part(x))


def test_the_end_is_in_full_precision_under_autocast():
    module = VisionTransformer(**TINY)
    seen = {}
    for name in ("norm", "feature.0", "feature.3", "blocks.0.mlp.fc1"):
        module.get_submodule(name).register_forward_hook(
            lambda m, i, output, name=name: seen.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        output = module(torch.randn(2, 3, 12, 12))
    assert seen.pop("blocks.0.mlp.fc1") == torch.bfloat16
    assert {*seen.values(), output.dtype} == {torch.float32}
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
