"""One training run of a method, and how well its embeddings retrieve pictures of other classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from methods import DIMS, FULL, SIZE, Heads, Method
from picture_sets import channels
from torch import Tensor

from unicom_ext import retrieval
from unicom_ext.data.baselines import principal_axes
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.images.augment import distort
from unicom_ext.encoders.small import Encoder
from unicom_ext.train.trainer import schedule

DRAWS = 3  # of random dimensions
ORDER, DISTORTION, DIMENSIONS = range(3)  # what a random number is for


@dataclass(frozen=True)
class Recipe:
    """What all methods share: the settings of the demo, but fewer passes over the pictures."""

    epochs: int
    batch_size: int = 128
    width: int = 16
    learning_rate: float = 8e-3
    prototype_learning_rate: float = 5e-2
    weight_decay: float = 0.05
    warmup: float = 0.05
    augment: float = 1.0


def run(
    recipe: Recipe, train: Glyphs, test: Glyphs, method: Method, settings: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Train on one set, test on the other: Recall@1 and mAP@R at each of DIMS.

    leading  the first dimensions
    random   dimensions drawn at random, below SIZE
    pca      of full margin softmax only: the first principal components of its unit embeddings of
             training images
    """
    encoder, loss = train_encoder(recipe, train, method, settings, seed)
    embeddings, labels = embed(encoder, test.images), torch.from_numpy(test.labels)
    results = {
        "leading": leading(embeddings, labels),
        "random": at_random(embeddings, labels, seed),
    }
    if method == FULL:
        known = F.normalize(embed(encoder, train.images))
        mean, axes = principal_axes(known, SIZE)
        results["pca"] = leading((F.normalize(embeddings) - mean) @ axes, labels)
    return {"loss": loss, "results": results}


def tune(
    recipe: Recipe, train: Glyphs, validation: Glyphs, method: Method, settings: dict[str, Any],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Half of a run, of which the leading dimensions are looked at alone."""
    half = replace(recipe, epochs=max(1, recipe.epochs // 2))
    encoder, loss = train_encoder(half, train, method, settings, seed)
    labels = torch.from_numpy(validation.labels)
    return {
        "loss": loss,
        "results": {"leading": leading(embed(encoder, validation.images), labels)},
    }


def train_encoder(
    recipe: Recipe, train: Glyphs, method: Method, settings: dict[str, Any], seed: int
) -> tuple[Encoder, float]:
    """The encoder after its last step, and the mean loss of the last epoch.

    The first weights, the batches and their distortions are those of the seed whatever the method.
    """
    torch.manual_seed(seed)
    encoder = Encoder(SIZE, recipe.width, channels(train))
    encoder.to(memory_format=torch.channels_last)
    heads = Heads(method, settings, train.num_classes, seed)
    groups = [
        {"params": list(encoder.parameters()), "weight_decay": recipe.weight_decay},
        {"params": list(heads.parameters()), "weight_decay": 0.0},
    ]
    highest = (recipe.learning_rate, recipe.prototype_learning_rate)
    optimizer = torch.optim.AdamW(groups, fused=True)
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    per_epoch = len(images) // recipe.batch_size  # the rest of an epoch is left out
    steps = recipe.epochs * per_epoch
    losses = []
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.from_numpy(_random(seed, ORDER, step).permutation(len(images)))
        at = step % per_epoch * recipe.batch_size
        rows = order[at : at + recipe.batch_size]
        batch = distort(_inputs(images[rows]), recipe.augment, _random(seed, DISTORTION, step))
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * schedule(step, steps, recipe.warmup)
        optimizer.zero_grad()
        loss = heads(encoder(batch.contiguous(memory_format=torch.channels_last)), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return encoder, float(np.mean(losses[-per_epoch:]))


@torch.no_grad()
def embed(encoder: Encoder, images: np.ndarray) -> Tensor:
    """uint8 [n, channels, 32, 32] -> fp32 [n, SIZE]."""
    encoder.eval()
    return torch.cat([encoder(_inputs(part)) for part in torch.from_numpy(images).split(512)])


Curve = dict[str, dict[str, float]]  # by measure, then by dimension


def leading(embeddings: Tensor, labels: Tensor) -> Curve:
    found = retrieval.evaluate(embeddings, labels, dims=DIMS, ks=[1])
    return {
        "recall": {str(result.dim): result.recall[1] for result in found},
        "map_at_r": {str(result.dim): result.map_at_r for result in found},
    }


def at_random(embeddings: Tensor, labels: Tensor, seed: int) -> Curve:
    """Mean of DRAWS, each of which is asked by its own third of the pictures: all are searched."""
    dims = [dim for dim in DIMS if dim < SIZE]
    everyone = torch.arange(len(labels))  # each its own group, so that no query finds itself
    curves, queries = [], []
    for draw in range(DRAWS):
        drawn = embeddings[:, _random(seed, DIMENSIONS, draw).permutation(SIZE)]
        own = everyone[draw::DRAWS]
        found = retrieval.evaluate(
            drawn[own], labels[own], drawn, labels,
            query_groups=own, gallery_groups=everyone, dims=dims, ks=[1],
        )  # fmt: skip
        curves.append([(result.recall[1], result.map_at_r) for result in found])
        queries.append(found[0].num_queries)
    mean = np.average(curves, axis=0, weights=queries)  # [dims, 2]
    return {
        name: {str(dim): float(value) for dim, value in zip(dims, mean[:, at], strict=True)}
        for at, name in enumerate(("recall", "map_at_r"))
    }


def _inputs(images: Tensor) -> Tensor:
    """uint8 [B, channels, 32, 32] -> float in [0, 1]."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def _random(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, number])
