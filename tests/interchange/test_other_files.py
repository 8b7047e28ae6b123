"""Encoders' weights, prototypes of pytorch-metric-learning, and prototypes as one array."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import published_trainer as published
from torch import nn

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint, interchange
from unicom_ext.checkpoint import CheckpointError
from unicom_ext.cli.main import main
from unicom_ext.encoders import weights

C, D = 7, 4


class ArcFaceLoss(nn.Module):
    """As pytorch-metric-learning has it: prototypes are columns, the centers of a class neighbours.

    Its margin has a gradient, and beyond pi the logit goes on linearly.
    """

    def __init__(self, num_classes, embedding_size, margin, scale, sub_centers=1):
        super().__init__()
        self.margin, self.scale, self.sub_centers = margin, scale, sub_centers
        self.W = nn.Parameter(torch.randn(embedding_size, num_classes * sub_centers))

    def forward(self, embeddings, labels):
        cosines = nn.functional.normalize(embeddings) @ nn.functional.normalize(self.W, dim=0)
        cosines = cosines.view(len(labels), -1, self.sub_centers).amax(2)
        rows = torch.arange(len(labels))
        angle = cosines[rows, labels].acos()
        target = torch.where(
            angle <= torch.pi - self.margin,
            torch.cos(angle + self.margin),
            torch.cos(angle) - self.margin * np.sin(self.margin),
        )
        logits = cosines.index_put((rows, labels), target)
        return nn.functional.cross_entropy(self.scale * logits, labels)


@pytest.mark.parametrize("num_centers", [1, 3])
def test_prototypes_of_pytorch_metric_learning(tmp_path, num_centers, monkeypatch):
    monkeypatch.setattr("unicom_ext.checkpoint.pieces.PIECE_BYTES", 100)
    torch.manual_seed(0)
    theirs, trunk = ArcFaceLoss(C, D, 0.3, 16.0, num_centers), nn.Linear(3, D)
    torch.save(theirs.state_dict(), tmp_path / "loss.pth")
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    interchange.read(
        [tmp_path / "trunk.pth", tmp_path / "loss.pth"], num_classes=C, num_centers=num_centers
    ).write(tmp_path / "c")
    ours = PartialMarginSoftmax(
        D, C, margin=ArcFace(0.3), scale=16.0, num_centers=num_centers,
        margin_grad="exact", beyond_pi="linear",
    )  # fmt: skip
    encoder = nn.Linear(3, D)
    checkpoint.load(tmp_path / "c", modules={"encoder": encoder, "loss": ours})
    images, labels = torch.randn(20, 3), torch.randint(C, (20,))
    right, loss = theirs(trunk(images), labels), ours(encoder(images), labels)
    torch.testing.assert_close(loss, right)
    right.backward()
    loss.backward()
    torch.testing.assert_close(encoder.weight.grad, trunk.weight.grad)


def test_an_encoder_alone(tmp_path):
    """As UNICOM publishes them: a state dict, in halves."""
    before = published.backbone().half()
    torch.save(before.state_dict(), tmp_path / "FP16-ViT.pt")
    found = interchange.read([tmp_path / "FP16-ViT.pt"])
    assert found.description["format"] == "weights of an encoder"
    found.write(tmp_path / "c")
    after = published.backbone().half()
    for param in after.parameters():
        nn.init.zeros_(param)
    checkpoint.load(tmp_path / "c", modules={"encoder": after})
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)
    assert weights.read(str(tmp_path / "c")).tensors.keys() == before.state_dict().keys()


def saved(path, num_centers=1, dtype=None):
    loss = PartialMarginSoftmax(D, C, num_centers=num_centers, dtype=dtype)
    checkpoint.save(path, modules={"loss": loss})
    weight = loss.weight.detach()
    return weight if num_centers == 1 else weight.view(C, num_centers, D)


@pytest.mark.parametrize("num_centers", [1, 2])
def test_prototypes_as_an_array(tmp_path, num_centers):
    weight = saved(tmp_path / "c", num_centers)
    path = tmp_path / "prototypes.npy"
    result = CliRunner().invoke(main, ["checkpoint", "prototypes", str(tmp_path / "c"), str(path)])
    assert result.output == f"Written: {path}, float32 {list(weight.shape)}\n"
    assert np.array_equal(np.load(path, mmap_mode="r"), weight.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "prototypes.npy"]


def test_prototypes_as_safetensors_without_the_package(tmp_path, monkeypatch):
    weight = saved(tmp_path / "c", dtype=torch.bfloat16)
    path = tmp_path / "prototypes.safetensors"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "safetensors", None)
        interchange.save_prototypes(tmp_path / "c", path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]) == {
        "weight": {"dtype": "BF16", "shape": [C, D], "data_offsets": [0, C * D * 2]}
    }
    assert content[8 + length :] == weight.view(torch.int16).numpy().tobytes()
    library = pytest.importorskip("safetensors.torch")
    assert torch.equal(library.load_file(path)["weight"], weight)
    with pytest.raises(CheckpointError, match=r"NumPy has no bfloat16; a .safetensors has"):
        interchange.save_prototypes(tmp_path / "c", tmp_path / "a.npy")


def test_what_has_no_prototypes(tmp_path):
    checkpoint.save(tmp_path / "c", modules={"encoder": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="must have the prototypes of one loss, has no loss"):
        interchange.save_prototypes(tmp_path / "c", tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a.txt: its name must end in .npy or .safetensors"):
        interchange.save_prototypes(tmp_path / "c", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        ([], {}, "files must name one file or more, got none"),
        ([{"W": torch.ones(D, C)}] * 2, {}, "one file of a loss of .* is expected, but there are"),
        ([{"a": torch.ones(1)}] * 2, {}, "one encoder is expected, but there are several: .*0.pt"),
        ([{"W": torch.ones(D, C), "b": torch.ones(1)}], {}, "0.pt: b is not known; it holds W, b"),
        ([{"W": torch.ones(C)}], {}, r"0.pt: W must be a dense matrix of floats, got \S+ \[7\]"),
        ([{"W": torch.ones(D, C)}, {"weight": torch.ones(C, D)}], {}, "files of one kind are exp"),
        ([{"W": torch.ones(D, C)}], {"num_centers": 2}, "must divide the 7 columns of W in"),
        ([{"W": torch.ones(D, C)}], {"num_classes": 4}, "is 4, but the files are of 7: W is "),
        ([{"weight": torch.ones(C, D)}], {"num_centers": 2}, "num_centers must be 1 but for a"),
        ([{"a": torch.ones(1)}], {"num_classes": 2}, "is 2, but the files hold no prototypes"),
        ([torch.ones(C, D)], {}, r"0.pt: holds one tensor \[7, 4\], and nothing says what it is"),
        ([{"epoch": 3, "a": torch.ones(1)}], {}, "0.pt: holds a int under 'epoch', must hold tens"),
        ([{"W": torch.ones(D, 0)}], {}, r"the files hold no prototypes: they are \[0, 4\]"),
        ([{3: torch.ones(1)}], {}, "0.pt: holds no tensors by name"),
        ([[torch.ones(1)]], {}, "0.pt: holds no tensors by name"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, contents, options, message):
    paths = [tmp_path / f"{number}.pt" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        torch.save(content, path)
    with pytest.raises((CheckpointError, ValueError), match=message):
        interchange.read(paths, **options)


def test_one_path_is_no_list(tmp_path):
    for path in (tmp_path / "model.pt", str(tmp_path / "model.pt")):
        with pytest.raises(TypeError, match="files must be a list of paths, got"):
            interchange.read(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"a.pt: is not there"):
        interchange.read([tmp_path / "a.pt"])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        interchange.read([tmp_path])
