"""The state of a training, and one step of it.

Everything random in a step is a function of (seed, step), and the learning rate one of the step
alone. So a checkpoint is the step and the tensors that training changes, and a run that was
interrupted and resumed is bit for bit the run that was not.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unicom_ext import checkpoint
from unicom_ext.data.glyphs import NO_CLASS, Glyphs
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.loss.options import MultiLabel, Precision
from unicom_ext.loss.sampling import FeatureSelection
from unicom_ext.optim import RowAdamW
from unicom_ext.train.augment import distort
from unicom_ext.train.config import Config
from unicom_ext.train.model import Encoder
from unicom_ext.utils.settings import ConfigError

# What a random number is for; keeps the streams of one seed apart.
ORDER, DISTORTION, EXAMPLES = range(3)


class Trainer:
    """The state of a run and what moves it: `step_once`, `save`, `load`."""

    def __init__(
        self, config: Config, train_set: Glyphs, group: dist.ProcessGroup | None = None
    ) -> None:
        self.config = config
        self.group = group
        self.ranks = Ranks(group)
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.images = torch.from_numpy(train_set.images)
        self.labels = torch.from_numpy(train_set.labels)
        self.batch_size = min(config.batch_size, len(train_set))
        if self.batch_size < 2 * self.world_size:
            raise ConfigError(
                f"batch_size: got {self.batch_size}, must be at least 2 for each of the "
                f"{self.world_size} ranks"
            )
        # The last batch of an epoch is the rest. A single image, which batch normalisation cannot
        # do with, joins the batch before it.
        full, rest = divmod(len(train_set), self.batch_size)
        self.steps_per_epoch = full + (rest > 1)
        self.steps = config.epochs * self.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = Encoder(config.embedding_size, config.width)
            self.loss = PartialMarginSoftmax(
                config.embedding_size,
                train_set.num_classes,
                margin=CombinedMargin(config.m1, config.m2, config.m3),
                scale=config.scale,
                num_centers=config.num_centers,
                sample_rate=config.sample_rate,
                feature_rate=config.feature_rate,
                multi_label=cast(MultiLabel, config.multi_label),
                ignore_index=NO_CLASS,
                feature_selection=cast(FeatureSelection, config.feature_selection),
                precision=cast(Precision, config.precision),
                sparse_grad=config.prototype_update == "rows",
                seed=config.seed,
                process_group=group,
            )
        self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = self.encoder
        if group is not None:
            # Without a search for unused parameters DDP puts gradients into other buckets after
            # its first step: a resumed run would sum them in another order, and differ in bits.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.model = DistributedDataParallel(
                self.encoder, process_group=group, find_unused_parameters=True
            )
        optimizer = RowAdamW if self.loss.sparse_grad else torch.optim.AdamW
        self.optimizer = optimizer(
            [
                {"params": list(self.encoder.parameters()), "weight_decay": config.weight_decay},
                # Only the directions of prototypes count, so shrinking them would do nothing.
                {"params": list(self.loss.parameters()), "weight_decay": 0.0},
            ],
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def step_once(self) -> float:
        """One step of training; returns its loss."""
        images, labels = self._batch(self.step, self.rank, self.world_size)
        self._set_learning_rates(self.step)
        self.encoder.train()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(images)[: len(labels)], labels)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> Tensor:
        """uint8 [n, 32, 32] -> fp32 [n, embedding_size]; each rank embeds a part of them."""
        self.encoder.eval()
        self._share_buffers()
        part = -(-len(images) // self.world_size)
        own = torch.from_numpy(images[self.rank * part : (self.rank + 1) * part])
        blocks = [self.encoder(_as_input(block)) for block in own.split(512) if len(block)]
        embeddings = torch.zeros(part, self.config.embedding_size)
        if blocks:
            embeddings[: len(own)] = torch.cat(blocks)
        return self.ranks.gather(embeddings)[: len(images)]

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        self._share_buffers()
        checkpoint.save(
            path, **self._parts(), extra={**extra, "step": self.step, "losses": self.losses}
        )

    def load(self, path: Path) -> dict[str, Any]:
        """What `save` was given."""
        extra = checkpoint.load(path, **self._parts())
        self.step, self.losses = extra.pop("step"), extra.pop("losses")
        return extra

    def any_rank(self, condition: bool) -> bool:
        return bool(self.ranks.max(torch.tensor(int(condition))))

    def _parts(self) -> dict[str, Any]:
        return {
            "modules": {"encoder": self.encoder, "loss": self.loss},
            "optimizers": {"main": self.optimizer},
            "process_group": self.group,
        }

    def _share_buffers(self) -> None:
        """The running statistics of the first rank count: DDP hands them on before each step."""
        for buffer in self.encoder.buffers():
            self.ranks.broadcast(buffer)

    def _batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Images float [b, 1, 32, 32] and labels int64 [b] or [b, P]: a rank's part of the
        step's batch.

        A rank without a part has no labels, but two images all the same: its encoder must run for
        the gradients to be exchanged.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            shuffled = random_numbers(self.config.seed, ORDER, epoch).permutation(len(self.labels))
            self._order = (epoch, torch.from_numpy(shuffled))
        last = position == self.steps_per_epoch - 1
        stop = None if last else (position + 1) * self.batch_size
        rows = self._order[1][position * self.batch_size : stop]
        part = share(len(rows), rank, world_size)
        labels = self.labels[rows[part]]
        if len(labels) == 0:
            part = slice(0, 2)
        random = random_numbers(self.config.seed, DISTORTION, step)
        images = _as_input(self.images[rows[part]])
        images = distort(images, self.config.augment, random, part=part, of=len(rows))
        return images.contiguous(memory_format=torch.channels_last), labels

    def images_before(self, step: int) -> int:
        """How many images all ranks have trained on in the steps before this one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * len(self.labels) + position * self.batch_size

    def _set_learning_rates(self, step: int) -> None:
        factor = schedule(step, self.steps, self.config.warmup)
        encoder, prototypes = self.optimizer.param_groups
        encoder["lr"] = factor * self.config.learning_rate
        prototypes["lr"] = factor * self.config.prototype_learning_rate


def share(size: int, rank: int, world_size: int) -> slice:
    """A rank's part of a batch. Sizes differ by one where the batch does not divide by the ranks;
    where it is too small for two images each, which batch normalisation needs, the last ranks have
    none."""
    ranks = min(world_size, size // 2)
    if rank >= ranks:
        return slice(size, size)
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rates: a linear rise in warmup * steps steps, then half a cosine."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def random_numbers(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, number])


def _as_input(images: Tensor) -> Tensor:
    """uint8 [B, 32, 32] -> float [B, 1, 32, 32] in [0, 1]."""
    scaled = images[:, None].float() / 255
    return scaled.contiguous(memory_format=torch.channels_last)
