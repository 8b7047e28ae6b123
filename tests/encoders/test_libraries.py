"""Encoders of timm, open_clip and transformers.

In the place of these packages, which are large, stand modules with the functions that are used and
the arguments, results and errors of timm 1.0.31, open_clip 3.3.0 and transformers 5.24, with which
the same was tried: outputs and prepared images were bit for bit the library's own, but for images
of transformers, whose resizing rounds to another grey value here and there.
"""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unicom_ext.data.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from unicom_ext.encoders.encoder import WithHead
from unicom_ext.encoders.libraries import _of_image_processor
from unicom_ext.encoders.registry import create
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def made(embedding_size=0, **settings):
    torch.manual_seed(0)
    return create(EncoderSettings(**settings), embedding_size)


class Network(nn.Module):
    """Mean colours and a position for each of four columns of pixels."""

    def __init__(self, size, classes):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(3, 4)
        self.pos = nn.Parameter(torch.zeros(1, size // 4))
        self.head = nn.Linear(4, classes) if classes else nn.Identity()

    def forward(self, images):
        assert images.shape[-1] == self.size, f"Input height ({images.shape[-1]}) doesn't match"
        return self.head(self.proj(images.mean((2, 3))) + self.pos.mean())


# ---- timm ----


@pytest.fixture
def timm(monkeypatch):
    library, data, models = (types.ModuleType(n) for n in ("timm", "timm.data", "timm.models.net"))
    config = {"classifier": "head", "fixed_input_size": True}

    def create_model(name, pretrained, num_classes, img_size=16):
        assert (name, pretrained, num_classes) == ("net_tiny.in1k", False, 0)
        model = Network(img_size, num_classes)
        model.pretrained_cfg = config
        return model

    def checkpoint_filter_fn(state, model):
        return {**state, "pos": F.interpolate(state["pos"][None], model.pos.shape[1])[0]}

    library.is_model = lambda name: name.partition(".")[0] == "net_tiny"
    library.list_models = lambda: ["net_tiny", "resnet50"]
    library.get_pretrained_cfg = lambda name: types.SimpleNamespace(**config)
    library.create_model = create_model
    data.resolve_model_data_config = lambda model: {
        "input_size": (3, 16, 16), "interpolation": config.get("interpolation", "bicubic"),
        "mean": MEAN, "std": STD, "crop_pct": 0.875, "crop_mode": "center",
    }  # fmt: skip
    library.data = data
    models.checkpoint_filter_fn = checkpoint_filter_fn
    for module in (library, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Network, "__module__", models.__name__)
    return config


def test_timm(timm):
    encoder = made(encoder="timm:net_tiny.in1k")
    assert (encoder.name, encoder.dim) == ("timm:net_tiny.in1k", 4)
    assert encoder.preprocessing == Preprocessing(16, "RGB", MEAN, STD, 0.875, "bicubic")
    assert isinstance(made(7, encoder="timm:net_tiny.in1k").module, WithHead)


def test_timm_at_another_size(timm):
    encoder = made(encoder="timm:net_tiny.in1k", image_size=32)
    assert (encoder.preprocessing.size, encoder.module.size) == (32, 32)
    timm["fixed_input_size"] = False  # of a convolutional network, which takes no img_size
    message = (
        "encoder: timm:net_tiny.in1k does not take images [1, 3, 32, 32]: Input height (32) "
        "doesn't match"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        made(encoder="timm:net_tiny.in1k", image_size=32)


def test_weights_of_timm_lose_their_classifier_and_are_adapted(timm, tmp_path):
    state = Network(16, 1000).state_dict()
    state["pos"].copy_(torch.arange(4))
    torch.save(state, tmp_path / "w.pt")
    settings = {"encoder": "timm:net_tiny.in1k", "weights": str(tmp_path / "w.pt")}
    loaded = made(**settings, image_size=32).module.state_dict()
    assert torch.equal(loaded["proj.weight"], state["proj.weight"])
    assert loaded["pos"].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    # As trained here, with a head, and of the encoder alone.
    encoder = made(5, **settings)
    for module in (encoder.module, encoder.module.body):
        torch.save(module.state_dict(), tmp_path / "trained.pt")
        again = made(encoder="timm:net_tiny.in1k", weights=str(tmp_path / "trained.pt"))
        assert again.dim == (5 if module is encoder.module else 4)
        for name, tensor in module.state_dict().items():
            assert torch.equal(again.module.state_dict()[name], tensor)
    state["proj.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    message = (
        f"{tmp_path}/w.pt: does not fit timm:net_tiny.in1k: proj.bias is [3], must be [4]; 1 of 3 "
        "tensors differ"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        made(**settings)


def test_filters_that_are_not_there(timm):
    timm["interpolation"] = "lanczos"
    message = (
        "encoder: timm:net_tiny.in1k scales its images by 'lanczos', must be bilinear or bicubic"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        made(encoder="timm:net_tiny.in1k")


# ---- open_clip ----


class Clip(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.visual = Network(size, 0)
        self.visual.preprocess_cfg = {
            "size": (size, size), "mode": "RGB", "mean": CLIP_MEAN, "std": CLIP_STD,
            "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
        }  # fmt: skip
        self.text = nn.Linear(2, 2)


@pytest.fixture
def open_clip(monkeypatch):
    library = types.ModuleType("open_clip")
    configs = {"ViT-X": {"text_cfg": {}}, "roberta-X": {"text_cfg": {"hf_model_name": "roberta"}}}

    def get_model_config(name):
        if name.startswith("local-dir:"):
            with open(f"{name[10:]}/open_clip_config.json") as file:
                return json.load(file)["model_cfg"]
        return configs.get(name)

    def create_model(name, pretrained, force_image_size):
        model = Clip(force_image_size or 16)
        if pretrained is not None:
            model.load_state_dict(torch.load(pretrained, weights_only=True))
        return model

    library.get_model_config, library.create_model = get_model_config, create_model
    library.list_models = lambda: list(configs)
    monkeypatch.setitem(sys.modules, "open_clip", library)


def test_open_clip(open_clip, tmp_path):
    encoder = made(encoder="open_clip:ViT-X")
    assert (encoder.dim, encoder.preprocessing) == (4, Preprocessing(16))
    assert made(encoder="open_clip:ViT-X", image_size=32).preprocessing.size == 32
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {}}}')
    assert made(encoder=f"open_clip:local-dir:{tmp_path}").dim == 4


def test_weights_of_open_clip(open_clip, tmp_path):
    clip = Clip(16)
    torch.save(clip.state_dict(), tmp_path / "both.pt")
    torch.save(clip.visual.state_dict(), tmp_path / "visual.pt")
    for name in ("both.pt", "visual.pt"):
        encoder = made(encoder="open_clip:ViT-X", weights=str(tmp_path / name))
        for key, tensor in clip.visual.state_dict().items():
            assert torch.equal(encoder.module.state_dict()[key], tensor)
    torch.save({"visual.proj.bias": torch.zeros(4)}, tmp_path / "both.pt")
    message = f"{tmp_path}/both.pt: does not fit open_clip:ViT-X: Error(s) in loading state_dict"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}") as caught:
        made(encoder="open_clip:ViT-X", weights=str(tmp_path / "both.pt"))
    assert "\n" not in str(caught.value)


# ---- transformers ----

SAVED = {
    "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True, "do_normalize": True, "image_mean": list(MEAN),
    "image_std": list(STD), "resample": 3, "rescale_factor": 0.00392156862745098,
}  # fmt: skip


class Vision(nn.Module):
    """Gives what ViTModel and CLIPVisionModelWithProjection do."""

    def __init__(self, embeds):
        super().__init__()
        self.config = types.SimpleNamespace(image_size=16)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float16))
        self.embeds = embeds

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        assert interpolate_pos_encoding == (pixel_values.shape[-1] != 16)
        mean = pixel_values.mean((2, 3)) * self.scale
        output = types.SimpleNamespace(
            pooler_output=mean[:, :, None, None], last_hidden_state=torch.stack([mean + 1, mean], 1)
        )
        if self.embeds:
            output.image_embeds = F.pad(mean, (0, 2))
        return output


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    library = types.ModuleType("transformers")
    missing = []

    def tower(embeds):
        def from_pretrained(name, local_files_only, output_loading_info):
            assert (name, local_files_only, output_loading_info) == (str(tmp_path), True, True)
            if "nowhere" in missing:
                raise OSError("Error no file named model.safetensors")
            return Vision(embeds).eval(), {"missing_keys": set(missing), "unexpected_keys": set()}

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    library.AutoModel, library.CLIPVisionModelWithProjection = tower(False), tower(True)
    monkeypatch.setitem(sys.modules, "transformers", library)

    def write(model_type="vit", **about):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SAVED, **about}))
        return f"hf:{tmp_path}"

    return types.SimpleNamespace(write=write, missing=missing)


def test_transformers(transformers):
    images = torch.rand(2, 3, 16, 16)
    mean = images.mean((2, 3))
    encoder = made(encoder=transformers.write())
    assert (encoder.dim, encoder.module.model.scale.dtype) == (3, torch.float32)
    assert encoder.preprocessing == Preprocessing(16, "RGB", MEAN, STD, 0.8, "bicubic")
    assert torch.equal(encoder.module(images), mean)
    assert made(encoder=transformers.write("clip")).dim == 5
    assert made(encoder=transformers.write(), image_size=24).preprocessing.size == 24
    transformers.missing[:] = ["pooler.dense.bias", "pooler.dense.weight"]
    assert torch.equal(made(encoder=transformers.write()).module(images), mean + 1)


def test_folders_with_weights_of_something_else(transformers, tmp_path):
    transformers.missing[:] = ["pooler.dense.bias", "b.weight", "a.weight"]
    message = f"{tmp_path}: does not fit Vision: a.weight is missing, one of 3"
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        made(encoder=transformers.write())
    transformers.missing[:] = ["nowhere"]
    message = f"{tmp_path}: cannot be read by transformers: Error no file named model.safetensors"
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        made(encoder=transformers.write())


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"size": 20, "crop_size": 16}, Preprocessing(16, "RGB", MEAN, STD, 0.8)),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False},
         Preprocessing(16, "RGB", MEAN, STD)),
        ({"do_normalize": False, "resample": 2},
         Preprocessing(16, "RGB", (0.0,) * 3, (1.0,) * 3, 0.8, "bilinear")),
    ],
)  # fmt: skip
def test_what_folders_say_of_images(transformers, about, expected):
    assert made(encoder=transformers.write(**about)).preprocessing == expected


@pytest.mark.parametrize("size", [224, 336, 384, 448, 512])
def test_the_scaled_side_is_the_one_that_is_asked_for(size):
    """Which a quotient that is rounded up would miss."""
    for shorter in range(size, size + 300):
        found = _of_image_processor({**SAVED, "size": shorter, "crop_size": size}, "")
        assert int(found.size / found.crop) == shorter


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, f"scales values by {1 / 127.5}, must be by 1/255"),
        ({"resample": 1}, "scales its images by '1', must be bilinear or bicubic"),
    ],
)
def test_images_that_cannot_be_prepared(transformers, about, message):
    name = transformers.write(**about)
    with pytest.raises(ConfigError, match=f"^encoder: {re.escape(name)} {re.escape(message)}$"):
        made(encoder=name)


def test_folders_that_are_not_whole(transformers, tmp_path):
    name = transformers.write()
    (tmp_path / "preprocessor_config.json").write_text("{")
    message = f"encoder: {name}: {tmp_path}/preprocessor_config.json is not valid JSON: "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        made(encoder=name)
    (tmp_path / "config.json").unlink()
    message = f"encoder: {name}: {tmp_path}/config.json cannot be read: No such file or directory"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        made(encoder=name)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:net_tin", "encoder: got 'timm:net_tin', but timm has no model 'net_tin'; did you "
         "mean net_tiny?"),
        ("open_clip:ViT-Y", "encoder: got 'open_clip:ViT-Y', but open_clip has no model 'ViT-Y'; "
         "did you mean ViT-X?"),
        ("open_clip:roberta-X", "encoder: got 'open_clip:roberta-X', whose text tower open_clip "
         "reads over the network"),
        ("open_clip:local-dir:/no/way", "encoder: open_clip:local-dir:/no/way cannot be read: "
         "[Errno 2] No such file or directory: '/no/way/open_clip_config.json'"),
        ("timm:hf-hub:a/b", "encoder: got 'timm:hf-hub:a/b', which is read over the network; give "
         "the name of the network here and the name of a file as weights"),
        ("open_clip:hf-hub:a/b", "encoder: got 'open_clip:hf-hub:a/b', which is read over the "
         "network; give the name of the network here and the name of a file as weights"),
    ],
)  # fmt: skip
def test_names_that_the_library_has_not(timm, open_clip, name, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        made(encoder=name)


@pytest.mark.parametrize(
    ("name", "module", "distribution"),
    [
        ("timm:resnet50", "timm", "timm"),
        ("open_clip:ViT-B-32", "open_clip", "open_clip_torch"),
        ("hf:/no/way", "transformers", "transformers"),
    ],
)
def test_packages_that_are_not_installed(monkeypatch, name, module, distribution):
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        f"{name} needs the package {distribution}, which is not installed: pip install "
        f"{distribution}"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        made(encoder=name)


def test_what_a_package_needs_is_named(monkeypatch, tmp_path):
    """timm is there, torchvision is not."""
    (tmp_path / "timm.py").write_text("import torchvision_that_is_not_there.models")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    message = (
        "timm:resnet50 needs the package torchvision_that_is_not_there, which is not installed: "
        "pip install torchvision_that_is_not_there"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        made(encoder="timm:resnet50")
