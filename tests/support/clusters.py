"""Feature files with classes to find, and clusterings of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from unicom_ext.cluster import ClusterConfig, cluster

SIZES = {"0000": 300, "0001": 211, "0002": 89}
ROWS = sum(SIZES.values())
CLASSES, IMAGE_DIM, TEXT_DIM = 20, 12, 8
QUIET = Console(quiet=True)


def make_dump(path: Path, dim: int = TEXT_DIM, noise: float = 0.7) -> dict[str, np.ndarray]:
    """A dump of CLIP embeddings: fp16 images, fp32 texts, around one direction for each class."""
    rng = np.random.default_rng(0)
    true = rng.integers(CLASSES, size=ROWS)
    image = rng.standard_normal((CLASSES, IMAGE_DIM))[true]
    text = rng.standard_normal((CLASSES, dim))[true]
    image = (image + noise * rng.standard_normal(image.shape)).astype(np.float16)
    text = (text + noise * rng.standard_normal(text.shape)).astype(np.float32)
    (path / "img_emb").mkdir(parents=True)
    (path / "text_emb").mkdir()
    first = 0
    for name, count in SIZES.items():
        np.save(path / "img_emb" / f"img_emb_{name}.npy", image[first : first + count])
        np.save(path / "text_emb" / f"text_emb_{name}.npy", text[first : first + count])
        first += count
    np.save(path / "true.npy", true)
    return {"image": image, "text": text, "true": true}


def config(**settings) -> ClusterConfig:
    return ClusterConfig(**{"clusters": 20, "passes": 4, "tolerance": 0.0, **settings})


def run(path, output, settings=None, **options) -> dict:
    return cluster(settings or config(), path, output, console=QUIET, **options)


def all_labels(output: Path) -> np.ndarray:
    return np.concatenate([np.load(output / f"labels_{name}.npy") for name in SIZES])


def cosines(rows: Tensor, centroids: Tensor) -> Tensor:
    """[N, k] in float64; a zero vector has cosine 0."""
    return F.normalize(rows.double(), eps=1e-300) @ F.normalize(centroids.double(), eps=1e-300).T


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
