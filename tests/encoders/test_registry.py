"""Encoders by name: what is made, of which size, from which settings."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unicom_ext.data import baselines
from unicom_ext.data.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from unicom_ext.encoders.encoder import WithHead
from unicom_ext.encoders.registry import create
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.encoders.small import Encoder
from unicom_ext.utils.settings import ConfigError


def made(embedding_size=0, **settings):
    torch.manual_seed(0)
    return create(EncoderSettings(**settings), embedding_size)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of the user's, on the path."""
    (tmp_path / "my_encoders.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from unicom_ext.data.images.preprocessing import Preprocessing\n"
        "from unicom_ext.encoders.registry import ImageEncoder\n"
        "class Mean(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = nn.BatchNorm2d(3)\n"
        "    def forward(self, images):\n"
        "        return self.norm(images).mean(3).flatten(1)\n"
        "def plain(): return Mean()\n"
        "def whole(): return ImageEncoder('mine', Mean(), Preprocessing(8, crop=0.5), 24)\n"
        "def grey(): return ImageEncoder('g', nn.Flatten(), Preprocessing(4, 'L', (0,), (1,)), 0)\n"
        "def number(): return 3\n"
        "def maps(): return nn.Conv2d(3, 2, 1)\n"
        "def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))\n"
        "def broken(): raise RuntimeError('as the user says')\n"
    )
    (tmp_path / "imports_nothing.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)


# ---- the small network ----


def small_as_it_was(encoder):
    """With nn.Flatten() where the feature map is averaged now."""
    layers = list(encoder.layers)
    layers[14] = nn.Flatten()
    return nn.Sequential(*layers)


def test_small_on_32_pixels_is_bit_for_bit_what_it_was():
    encoder = made(32, encoder="small", width=4)
    assert (encoder.dim, encoder.preprocessing) == (32, Preprocessing(32, "L", (0.0,), (1.0,)))
    module = encoder.module.to(memory_format=torch.channels_last)
    images = torch.rand(8, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []
    for network in (module, small_as_it_was(module)):
        module.zero_grad()
        output = network(images)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_is_made_as_the_driver_made_it():
    torch.manual_seed(0)
    direct = Encoder(24, 3).state_dict()
    state = made(24, encoder="small", width=3).module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in direct.items())
    assert {"layers.0.weight", "layers.15.weight", "layers.16.running_mean"} < state.keys()


def prepared(encoder, pictures):
    """What the encoder takes of uint8 [n, h, w]."""
    return encoder.preprocessing.batch([Image.fromarray(picture) for picture in pictures])


def test_pictures_of_small_are_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    found = prepared(made(encoder="small"), pixels[None])[0]
    assert torch.equal(found, torch.from_numpy(pixels)[None].float() / 255)


@pytest.mark.parametrize("size", [32, 50, 64, 224])
def test_small_takes_larger_images(size):
    encoder = made(16, encoder="small-rgb", image_size=size, width=2)
    assert (encoder.preprocessing.size, encoder.preprocessing.mode) == (size, "RGB")
    images = torch.rand(2, 3, size, size)
    assert encoder.module(images).shape == (2, 16)
    features = encoder.module.layers[:14](images)
    if features.shape[-1] % 4 == 0:
        blocks = features.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)).flatten(1)
        torch.testing.assert_close(encoder.module.layers[14](features), blocks)


# ---- sizes of the output ----


def test_encoders_of_any_size_have_no_head():
    for name in ("small", "small-rgb", "pixels", "hog"):
        assert made(encoder=name).dim == 128
        encoder = made(5, encoder=name)
        assert encoder.dim == 5
        assert not isinstance(encoder.module, WithHead)


def test_a_head_follows_where_another_size_is_wanted(factories):
    own = made(encoder="my_encoders:whole")
    assert (own.name, own.dim) == ("my_encoders:whole", 24)
    assert made(24, encoder="my_encoders:whole").module.state_dict().keys() == (
        own.module.state_dict().keys()
    )
    encoder = made(5, encoder="my_encoders:whole")
    assert (encoder.dim, encoder.preprocessing) == (5, own.preprocessing)
    images = torch.rand(4, 3, 8, 8)
    weight = encoder.module.head[0].weight
    assert weight.shape == (5, 24)
    projected = encoder.module.body(images) @ weight.T
    expected = (projected - projected.mean(0)) / (projected.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(encoder.module(images), expected)
    assert encoder.module.head[0].bias is None


# ---- principal components ----


@pytest.mark.parametrize(("name", "baseline"), [("pixels", "raw pixels"), ("hog", "HOG")])
def test_components_are_those_of_the_baselines(name, baseline):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 16, 16), np.uint8) for n in (60, 9))
    encoder = made(7, encoder=name, image_size=16)
    assert encoder.needs_fitting
    with pytest.raises(RuntimeError, match=r": fit\(images\) comes first$"):
        encoder.module(torch.rand(1, 1, 16, 16))
    images = [prepared(encoder, part) for part in (train, test)]
    encoder.module.fit(images[0])
    assert not encoder.needs_fitting
    expected = baselines.BASELINES[baseline](train, np.zeros(60), test, 7)
    torch.testing.assert_close(encoder.module(images[1]), expected, rtol=1e-5, atol=1e-6)


def test_components_are_saved_with_what_they_have_learned(tmp_path):
    images = torch.rand(40, 1, 16, 16)
    encoder = made(6, encoder="hog", image_size=16)
    encoder.module.fit(images)
    assert encoder.module.state_dict().keys() == {"mean", "axes"}
    torch.save(encoder.module.state_dict(), tmp_path / "hog.pt")
    again = made(encoder="hog", image_size=16, weights=str(tmp_path / "hog.pt"))
    assert (again.dim, again.needs_fitting) == (6, False)
    assert torch.equal(again.module(images), encoder.module(images))


def test_too_few_images_to_fit_on():
    encoder = made(6, encoder="pixels", image_size=8)
    message = "dim: got 6, must be from 1 to 5 with 6 train images of 64 features"
    with pytest.raises(ValueError, match=message):
        encoder.module.fit(torch.rand(6, 1, 8, 8))
    assert encoder.needs_fitting


# ---- a factory of the user's ----


def test_a_factory_returns_a_module(factories):
    encoder = made(encoder="my_encoders:plain")
    assert (encoder.dim, encoder.preprocessing) == (3 * 224, Preprocessing(224))
    assert (encoder.preprocessing.mean, encoder.preprocessing.std) == (CLIP_MEAN, CLIP_STD)
    assert encoder.module.training
    assert encoder.module.norm.num_batches_tracked == 0  # nothing has been learned


def test_a_factory_returns_an_encoder(factories):
    encoder = made(encoder="my_encoders:whole", image_size=10)
    assert (encoder.dim, encoder.preprocessing) == (30, Preprocessing(10, crop=0.5))
    encoder = made(encoder="my_encoders:grey")
    assert (encoder.dim, encoder.preprocessing.channels) == (16, 1)  # what it says is not believed


def test_what_a_factory_raises_goes_through(factories):
    with pytest.raises(RuntimeError, match=r"^as the user says$"):
        made(encoder="my_encoders:broken")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        made(encoder="imports_nothing:make")


# ---- bad settings ----

NAMES = (
    "There are small, small-rgb, pixels, hog, vit-SIZE-PATCH with a size of ti, s, b, l and a "
    "patch from 4 to 32, timm:NAME, open_clip:NAME, hf:FOLDER and package.module:function"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": ""}, "encoder: got '', must be the name of an encoder"),
        ({"encoder": "smal"},
         f"encoder: got 'smal', but there is none of that name; did you mean small? {NAMES}"),
        ({"encoder": "vit-b-33"},
         f"encoder: got 'vit-b-33', but there is none of that name; did you mean vit-b-32? "
         f"{NAMES}"),
        ({"encoder": "vit-b-016"},
         f"encoder: got 'vit-b-016', but there is none of that name; did you mean vit-b-16? "
         f"{NAMES}"),
        ({"encoder": "?"}, f"encoder: got '?', but there is none of that name. {NAMES}"),
        ({"encoder": "timm:"}, f"encoder: got 'timm:', but there is none of that name. {NAMES}"),
        ({"image_size": 31}, "image_size: got 31, must be at least 32 for small"),
        ({"image_size": -1}, "image_size: got -1, must be a whole number >= 0"),
        ({"width": 0}, "width: got 0, must be a whole number >= 1"),
        ({"encoder": "vit-b-16", "image_size": 15},
         "image_size: got 15, must be at least 16 for vit-b-16"),
        ({"encoder": "hog", "image_size": 30},
         "image_size: got 30, must be at least 8 and a multiple of 4 for hog"),
        ({"encoder": "no_such_module:make"},
         "encoder: got 'no_such_module:make', but there is no module 'no_such_module'; it must be "
         "installed or in a folder of PYTHONPATH"),
        ({"encoder": ":make"}, "encoder: got ':make', must be like package.module:function"),
        ({"encoder": ".a:make"}, "encoder: got '.a:make', must be like package.module:function"),
        ({"encoder": "my_encoders.sub:make"},
         "encoder: got 'my_encoders.sub:make', but there is no module 'my_encoders.sub'; it must "
         "be installed or in a folder of PYTHONPATH"),
        ({"encoder": "my_encoders:plane"},
         "encoder: got 'my_encoders:plane', but my_encoders has no function 'plane'; did you mean "
         "plain?"),
        ({"encoder": "my_encoders:number"},
         "encoder: my_encoders:number returns a int, must return an nn.Module or an ImageEncoder"),
        ({"encoder": "my_encoders:maps"},
         "encoder: my_encoders:maps gives [1, 2, 224, 224] for images [1, 3, 224, 224], must give "
         "a tensor [1, dim]"),
        ({"encoder": "my_encoders:narrow"},
         "encoder: my_encoders:narrow does not take images [1, 3, 224, 224]: mat1 and mat2 shapes "
         "cannot be multiplied (1x150528 and 3x2)"),
    ],
)  # fmt: skip
def test_bad_settings(factories, settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        made(**settings)


def test_settings_are_read_without_torch(in_a_new_process):
    in_a_new_process(
        "import sys, unicom_ext.encoders.settings\nassert not {'torch', 'numpy'} & set(sys.modules)"
    )


@pytest.fixture
def in_a_new_process():
    import subprocess
    import sys

    def run(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


def test_an_encoder_is_not_changed_by_what_is_made_of_it():
    encoder = made(encoder="small")
    assert replace(encoder, name="other").module is encoder.module
