"""Batches of images, decoded off the main process.

A batch is a function of its number and of the seed, whichever process makes it. So their order is
the same with any number of workers, and a run that goes on in the middle of an epoch begins with
the number of its next step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unicom_ext.data.images.augment import crop_and_light
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.pictures import ArrayPictures, PictureError
from unicom_ext.data.images.preprocessing import Preprocessing, as_tensor

# What a random number is for; keeps the streams of one seed apart.
ORDER, DISTORTION = range(2)
MOST_WORKERS = 8  # where the settings leave it open
AT_LEAST = 2  # images of a part, which batch normalisation needs


class Batch(NamedTuple):
    """Images, or a part of a larger batch of them."""

    images: Tensor  # uint8 [b, C, size, size]
    indices: (
        Tensor  # int64 [n] of the first n images in their set; the others are black and no one's
    )
    positions: Tensor  # int64 [b], where the images stand in the larger batch
    unreadable: list[tuple[int, str]]  # index in the set, and why


class TrainingBatches(Dataset[list[Batch]]):
    """The batches of all steps: a list of parts each, of which only this rank's are read.

    Args:
        images: to train on, at least two.
        preprocessing: what the encoder takes.
        batch_size: images of a step; the last one of an epoch takes the rest. A single image,
            which batch normalisation cannot do with, joins the batch before it.
        seed: of the order, which is another one in each epoch, and of the distortions.
        augment: strength of `crop_and_light`; 0 for none.
        parts: numbers of the parts to read, out of `of` that a batch is cut into.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        *,
        augment: float = 0.0,
        parts: Sequence[int] = (0,),
        of: int = 1,
    ) -> None:
        self.images, self._preprocessing = images, preprocessing
        self._seed, self._augment = seed, augment
        self._parts, self._of = parts, of
        self.batch_size = min(batch_size, len(images))
        full, rest = divmod(len(images), self.batch_size)
        self.steps_per_epoch = full + (rest > 1)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Indices int64 of all images of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            shuffled = random_numbers(self._seed, ORDER, epoch).permutation(len(self.images))
            self._order = (epoch, shuffled)
        last = position == self.steps_per_epoch - 1
        stop = None if last else (position + 1) * self.batch_size
        return self._order[1][position * self.batch_size : stop]

    def __getitem__(self, step: int) -> list[Batch]:
        """The parts of a step's batch. One without an image has `AT_LEAST` black ones all the same:
        its encoder must run for gradients to be exchanged."""
        rows = self.rows(step)
        parts = [np.arange(len(rows))[share(len(rows), part, self._of)] for part in self._parts]
        return [self._part(step, rows, positions) for positions in parts]

    def images_before(self, step: int) -> int:
        """How many images all ranks have trained on in the steps before this one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * len(self.images) + position * self.batch_size

    def _part(self, step: int, rows: np.ndarray, positions: np.ndarray) -> Batch:
        def prepare(picture: Image.Image, at: int) -> Image.Image:
            if self._augment == 0:
                return self._preprocessing(picture)
            rng = np.random.default_rng([self._seed, DISTORTION, step, int(positions[at])])
            return crop_and_light(picture, self._augment, rng, self._preprocessing)

        return _read(self.images, rows[positions], positions, self._preprocessing, prepare)


class ImageBatches(Dataset[Batch]):
    """All images in their order, in batches."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing, batch_size: int) -> None:
        self.images, self._preprocessing = images, preprocessing
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        first = number * self._batch_size
        rows = np.arange(first, min(first + self._batch_size, len(self.images)))
        prepare = self._preprocessing
        return _read(self.images, rows, rows, prepare, lambda p, _: prepare(p), at_least=0)


Item = TypeVar("Item", covariant=True)


class Numbered(Protocol[Item]):
    images: ImageSet

    def __getitem__(self, number: int) -> Item: ...


def in_order(batches: Numbered[Item], numbers: range, workers: int) -> Iterator[Item]:
    """The batches of these numbers.

    workers: how many processes make them; 0: this one; -1: as many as cores, up to `MOST_WORKERS`,
    but none for images in memory. See `killed_workers_named`.
    """
    if workers < 0:
        in_memory = isinstance(batches.images.pictures, ArrayPictures)
        workers = 0 if in_memory else min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    loader: DataLoader[Item] = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        worker_init_fn=_heed_the_parent_alone,
        generator=torch.Generator(),  # not the global one, from which it would draw
    )
    return iter(loader)


@contextmanager
def killed_workers_named() -> Iterator[None]:
    """Raises ChildProcessError where a worker of `in_order` was killed in the block, or function.

    torch raises RuntimeError then: at any moment, when the signal that a child has ended comes.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ChildProcessError(
            f"workers: a process that reads images was killed ({str(error).strip()}), perhaps "
            "because memory ran out; fewer of them need less"
        ) from None


def _heed_the_parent_alone(worker: int) -> None:
    """The process that asked for the batches decides what Ctrl-C and SIGTERM mean, and needs these
    workers up to the end of its step, whoever else is sent a signal. It ends them by SIGTERM
    itself: without that it could not end where an exception holds on to them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def share(size: int, part: int, of: int) -> slice:
    """A part of a batch. Sizes differ by one where the batch does not divide by the parts; where it
    is too small for `AT_LEAST` images each, the last parts have none."""
    filled = min(of, size // AT_LEAST)
    if part >= filled:
        return slice(size, size)
    return slice(part * size // filled, (part + 1) * size // filled)


def random_numbers(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, number])


class _Prepare(Protocol):
    def __call__(self, picture: Image.Image, at: int) -> Image.Image: ...


def _read(
    images: ImageSet,
    indices: np.ndarray,
    positions: np.ndarray,
    preprocessing: Preprocessing,
    prepare: _Prepare,
    at_least: int = AT_LEAST,
) -> Batch:
    """The images that can be read, prepared, and why the others cannot."""
    pixels, kept, unreadable = [], [], []
    for at, index in enumerate(indices.tolist()):
        try:
            picture = images.read(index)
        except PictureError as error:
            unreadable.append((index, str(error)))
            continue
        pixels.append(as_tensor(prepare(picture, at)))
        kept.append(at)
    black = max(at_least - len(pixels), 0)
    size = preprocessing.size
    pixels += [torch.zeros(preprocessing.channels, size, size, dtype=torch.uint8)] * black
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, preprocessing.channels, size, size,
                                                              dtype=torch.uint8)  # fmt: skip
    return Batch(
        stacked,
        torch.from_numpy(indices[kept].astype(np.int64)),
        torch.from_numpy(np.append(positions[kept], np.zeros(black)).astype(np.int64)),
        unreadable,
    )
