"""The state of a training, and one step of it.

Everything random in a step is a function of (seed, step), and the learning rate one of the step
alone. So a checkpoint is the step and the tensors that training changes, and a run that was
interrupted and resumed is bit for bit the run that was not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unicom_ext import checkpoint
from unicom_ext.data.images.augment import distort
from unicom_ext.data.images.batches import (
    AT_LEAST,
    DISTORTION,
    Batch,
    ImageBatches,
    TrainingBatches,
    in_order,
    random_numbers,
    share,
)
from unicom_ext.data.images.embedded import Embedded
from unicom_ext.data.images.imageset import NO_CLASS, ImageSet
from unicom_ext.distributed.failures import exchange
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.encoders import registry
from unicom_ext.encoders.encoder import WithHead
from unicom_ext.loss.margins import CombinedMargin
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.loss.options import MultiLabel, Precision
from unicom_ext.loss.sampling import FeatureSelection
from unicom_ext.optim import RowAdamW
from unicom_ext.train.config import Config
from unicom_ext.utils.devices import device_of
from unicom_ext.utils.settings import ConfigError

NOISE = 3  # the stream of random numbers of the encoder, beside those of batches and examples
EMBED_ROWS = 512  # images that are embedded together
AUTOCAST = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """The state of a run and what moves it: `step_once`, `save`, `load`."""

    def __init__(
        self, config: Config, train_set: ImageSet, group: dist.ProcessGroup | None = None
    ) -> None:
        self.config = config
        self.group = group
        self.ranks = Ranks(group)
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.device = device_of(config.device)
        self.train_set = train_set
        self.labels = torch.from_numpy(train_set.labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            made = registry.create(config, config.embedding_size)
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
            ).to(self.device)
        self.preprocessing = made.preprocessing
        self._distorts = config.distorts_characters
        self.encoder: nn.Module = made.module.to(  # type: ignore[call-overload]
            self.device, memory_format=torch.channels_last
        )
        if made.needs_fitting or not any(p.requires_grad for p in self.encoder.parameters()):
            raise ConfigError(f"encoder: got {config.encoder!r}, which has nothing to train")
        if made.dim != config.embedding_size:
            raise ConfigError(
                f"embedding_size: got {config.embedding_size}, must be {made.dim} with the weights "
                f"of {config.weights}"
            )
        self.batches = self._training_batches()
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.steps = config.epochs * self.steps_per_epoch
        self.model: nn.Module = self.encoder
        if config.compile:
            self.model = cast(nn.Module, torch.compile(self.model))
        if group is not None:
            # Without a search for unused parameters DDP puts gradients into other buckets after
            # its first step: a resumed run would sum them in another order, and differ in bits.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.model = DistributedDataParallel(
                self.model, process_group=group, find_unused_parameters=True
            )
        self.averaged = (
            AveragedModel(
                self.encoder, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
            )
            if config.ema
            else None
        )
        optimizer = RowAdamW if self.loss.sparse_grad else torch.optim.AdamW
        head = self.encoder.head if isinstance(self.encoder, WithHead) else None
        of_head = [] if head is None else list(head.parameters())
        body = [p for p in self.encoder.parameters() if not any(p is q for q in of_head)]
        decay = config.weight_decay
        # Only the directions of prototypes count, so shrinking them would do nothing.
        groups: list[tuple[float, float, list[nn.Parameter]]] = [
            (config.learning_rate, decay, body),
            (config.prototype_learning_rate, 0.0, list(self.loss.parameters())),
        ]
        if head is not None:
            groups.append((config.head_learning_rate or config.learning_rate, decay, of_head))
        self._rates = [rate for rate, *_ in groups]
        self.optimizer = optimizer(
            [{"params": params, "weight_decay": decay} for _, decay, params in groups], fused=True
        )
        self.scaler = self._gradient_scaler()
        self.step = 0
        self.losses: list[float] = []
        self.unreadable: dict[int, str] = {}  # of this rank: index in the training set, and why
        self.seconds_waited = 0.0
        self._coming: Iterator[list[Batch]] | None = None

    def step_once(self) -> float:
        """One step of training; returns its loss."""
        began = time.perf_counter()
        if self._coming is None:
            self._coming = in_order(
                self.batches,
                range(self.step, self.steps),
                self.config.workers,
            )
        parts = next(self._coming)
        self.seconds_waited += time.perf_counter() - began
        self._set_learning_rates(self.step)
        self.encoder.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            self.unreadable.update(part.unreadable)
            total += self._backward(part, number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.encoder)
        self.step += 1
        self.losses.append(total.item())
        return self.losses[-1]

    def _backward(self, part: Batch, number: int) -> Tensor:
        """This part's share of the step's loss, whose gradient is added to what is there."""
        last = number == self.config.accumulate - 1
        labels = self.labels[part.indices].to(self.device, non_blocking=True)
        ddp = self.model if isinstance(self.model, DistributedDataParallel) else None
        with nullcontext() if last or ddp is None else ddp.no_sync():
            with self._autocast(), self._noise(number):
                embeddings = self.model(self._input(part))
            # All parts of a step draw the same classes and dimensions: the last one alone counts.
            step = None if last else self.step
            loss = self.loss(embeddings[: len(labels)].float(), labels, step=step)
            loss = loss * self._weight(number)
            self.scaler.scale(loss).backward()
        return loss.detach()

    @contextmanager
    def _noise(self, number: int) -> Iterator[None]:
        """What the encoder draws, for dropout and its like, is a function of the step too."""
        devices = [] if self.device.type == "cpu" else [self.device]
        where = [self.config.seed, NOISE, self.step, self.rank, number]
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0]))
            yield

    def _weight(self, number: int) -> float:
        """Share of the step's images that are in the parts of this number, of all ranks."""
        if self.config.accumulate == 1:
            return 1.0
        size, parts = len(self.batches.rows(self.step)), self.config.accumulate
        slices = (
            share(size, rank * parts + number, self.world_size * parts)
            for rank in range(self.world_size)
        )
        return sum(s.stop - s.start for s in slices) / size

    def _input(self, part: Batch) -> Tensor:
        """What the encoder takes: fp32 [b, C, size, size], distorted."""
        images = part.images.to(self.device, non_blocking=True).float() / 255
        if self._distorts:
            random = random_numbers(self.config.seed, DISTORTION, self.step)
            size = len(self.batches.rows(self.step))
            images = distort(images, self.config.augment, random, part=part.positions, of=size)
        images = self.preprocessing.standardised(images)
        return images.contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.config.autocast]
        return torch.autocast(self.device.type, dtype, enabled=self.config.autocast != "off")

    @property
    def evaluated(self) -> nn.Module:
        """The encoder that counts: of averaged weights, where they are averaged."""
        return self.encoder if self.averaged is None else self.averaged.module

    @torch.no_grad()
    def embed(self, images: ImageSet) -> Embedded:
        """Embeddings of the images that can be read; each rank embeds a part of them."""
        encoder = self.evaluated
        encoder.eval()
        self._share_buffers()
        size = -(-len(images) // self.world_size)
        start = min(self.rank * size, len(images))
        own = images.take(np.arange(start, min(start + size, len(images))))
        embeddings = torch.zeros(size, self.config.embedding_size, device=self.device)
        readable = torch.zeros(size, dtype=torch.uint8, device=self.device)
        batches = ImageBatches(own, self.preprocessing, EMBED_ROWS)
        for batch in in_order(batches, range(len(batches)), self.config.workers):
            if len(batch.indices) == 0:
                continue
            pixels = self.preprocessing.normalised(batch.images.to(self.device))
            with self._autocast():
                found = encoder(pixels.contiguous(memory_format=torch.channels_last))
            indices = batch.indices.to(self.device)
            embeddings[indices], readable[indices] = found.float(), 1
        kept = self.ranks.gather(readable)[: len(images)].bool().cpu()
        embeddings = self.ranks.gather(embeddings)[: len(images)].cpu()
        if bool(kept.all()):
            return Embedded(embeddings, images)
        return Embedded(embeddings[kept], images.take(kept.numpy()))

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        self._share_buffers()
        checkpoint.save(
            path,
            **self._parts_of_checkpoint(),
            extra={
                **extra,
                "step": self.step,
                "losses": self.losses,
                "scaler": self.scaler.state_dict(),
            },
        )

    def load(self, path: Path) -> dict[str, Any]:
        """What `save` was given."""
        extra = checkpoint.load(path, **self._parts_of_checkpoint())
        self.step, self.losses = extra.pop("step"), extra.pop("losses")
        self.scaler.load_state_dict(extra.pop("scaler", {}))
        self._coming = None
        return extra

    def load_encoder(self, state: dict[str, Tensor]) -> None:
        """Take the weights that `evaluated` had at another step."""
        self.evaluated.load_state_dict(state)

    def all_unreadable(self) -> dict[str, str]:
        """The images that no rank could read so far: their names, and why."""
        found: dict[int, str] = {}
        for _, of_rank in exchange(list(self.unreadable.items()), None, self.group):
            found.update((index, why) for index, why in of_rank)
        return {self.train_set.name(index): why for index, why in found.items()}

    def any_rank(self, condition: bool) -> bool:
        return bool(self.ranks.max(torch.tensor(int(condition))))

    def _training_batches(self) -> TrainingBatches:
        """This rank's parts of all batches."""
        config, parts = self.config, self.world_size * self.config.accumulate
        batches = TrainingBatches(
            self.train_set,
            self.preprocessing,
            config.batch_size,
            config.seed,
            augment=0.0 if self._distorts else config.augment,
            parts=range(self.rank * config.accumulate, (self.rank + 1) * config.accumulate),
            of=parts,
        )
        if batches.batch_size < AT_LEAST * parts:
            among = f"the {self.world_size} ranks"
            if config.accumulate > 1:
                among = f"{config.accumulate} parts of " + among
            raise ConfigError(
                f"batch_size: got {batches.batch_size}, must be at least {AT_LEAST} for each of "
                + among
            )
        return batches

    def _gradient_scaler(self) -> torch.amp.GradScaler:
        enabled = self.config.autocast == "fp16"
        if self.group is None:
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        # What one rank finds counts for all.
        return ShardedGradScaler(self.device.type, enabled=enabled, process_group=self.group)

    def _parts_of_checkpoint(self) -> dict[str, Any]:
        modules = {"encoder": self.encoder, "loss": self.loss}
        if self.averaged is not None:
            modules["averaged"] = self.averaged
        return {
            "modules": modules,
            "optimizers": {"main": self.optimizer},
            "process_group": self.group,
        }

    def _share_buffers(self) -> None:
        """The running statistics of the first rank count: DDP hands them on before each step."""
        for module in (self.encoder, self.averaged):
            if module is not None:
                for buffer in module.buffers():
                    self.ranks.broadcast(buffer)

    def _set_learning_rates(self, step: int) -> None:
        factor = schedule(step, self.steps, self.config.warmup)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rates: a linear rise in warmup * steps steps, then half a cosine."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
