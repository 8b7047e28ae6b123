"""A training of the driver that is over in a second, and comparisons of what runs leave."""

from __future__ import annotations

import io

import numpy as np
import torch
from rich.console import Console

from unicom_ext import checkpoint
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.opening import Parts
from unicom_ext.train.config import Config
from unicom_ext.train.run import train

TINY = Config(
    embedding_size=8, width=2, epochs=3, batch_size=16, dims=(4, 8), baselines=(),
    evaluate_every=1, checkpoint_every=4, sample_rate=0.5, feature_rate=0.5, threads=1,
)  # fmt: skip


def synthetic(num_classes: int, seed: int, images_per_class: int = 6) -> ImageSet:
    """Classes that are blurred random patterns, with noise that differs from image to image."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((num_classes, 8, 8))
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    noise = rng.random((num_classes, images_per_class, 32, 32))
    images = (255 * (0.3 * patterns + 0.7 * noise)).astype(np.uint8)
    return ImageSet.of_arrays(
        images.reshape(-1, 32, 32),
        np.arange(num_classes).repeat(images_per_class),
        [f"PATTERN {c}" for c in range(num_classes)],
    )


DATA = (synthetic(20, seed=1), synthetic(12, seed=2))
PARTS = Parts(DATA[0], None, DATA[1], None)
FLAT = "support.encoder:flat"  # an encoder for TINY, without batch normalisation
STEPS = 3 * 8  # of a run with TINY: batches of 16, the last of each epoch of 8


def run(output, *, config=TINY, data=PARTS, text=None, **options):
    console = Console(file=text or io.StringIO(), width=120)
    return train(config, output, data=data, console=console, **options)


def saved(output):
    """All that a run left in its last checkpoint but its timing: tensors, and plain values."""
    path = checkpoint.latest(output / "checkpoints")
    checkpoint.merge(path, output / "merged.pt")
    tensors = torch.load(output / "merged.pt", weights_only=True)
    (output / "merged.pt").unlink()
    del tensors["about"]  # the plain values, as bytes
    about = checkpoint.read_about(path)
    del about["extra"]["metrics"]["seconds"]
    return {"tensors": tensors, "about": about}


def apart_from_timing(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def assert_same_bits(a, b, where="checkpoint"):
    """Trees of dicts, lists, tensors and values are equal, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where
