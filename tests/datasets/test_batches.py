"""Batches are functions of their number: whoever makes them, and whatever cannot be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unicom_ext.data.images.augment import crop_and_light
from unicom_ext.data.images.batches import (
    ImageBatches,
    TrainingBatches,
    in_order,
    killed_workers_named,
    share,
)
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.pictures import ArrayPictures, PictureError
from unicom_ext.data.images.preprocessing import Preprocessing, as_tensor

RGB = Preprocessing(24, "RGB")
GREY = Preprocessing(32, "L", (0.0,), (1.0,))


class Spoilt(ArrayPictures):
    """Pictures of which those of some numbers cannot be read."""

    def __init__(self, images, spoilt):
        super().__init__(images)
        self.spoilt = spoilt

    def read(self, number):
        if number in self.spoilt:
            raise PictureError(f"picture {number}: is spoilt")
        return super().read(number)


def photographs(count=23, spoilt=()):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 40, 30, 3), dtype=np.uint8)
    return ImageSet(Spoilt(images, set(spoilt)), np.arange(count), np.arange(count) % 5, [*"abcde"])


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.indices, y.indices)
        assert torch.equal(x.positions, y.positions)
        assert x.unreadable == y.unreadable


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches_in_the_same_order(workers):
    def made(first, workers):
        batches = TrainingBatches(photographs(spoilt=[4]), RGB, 5, seed=3, augment=1.0)
        return [part for parts in in_order(batches, range(first, 9), workers) for part in parts]

    alone = made(0, 0)
    assert_same(made(0, workers), alone)
    assert_same(made(6, workers), alone[6:])  # in the middle of the second epoch


class Deadly(ArrayPictures):
    """Pictures that end the process that reads them, as the kernel does when memory runs out."""

    def read(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed():
    images = ImageSet(Deadly(np.zeros((4, 8, 8), np.uint8)), np.arange(4), np.zeros(4, int), ["a"])
    with pytest.raises(ChildProcessError) as raised, killed_workers_named():
        list(in_order(ImageBatches(images, GREY, 2), range(2), 1))
    before, _, after = str(raised.value).partition(" (DataLoader worker ")
    assert before == "workers: a process that reads images was killed"
    assert after.endswith("), perhaps because memory ran out; fewer of them need less")
    with pytest.raises(RuntimeError, match="anything else"), killed_workers_named():
        raise RuntimeError("anything else")


@pytest.mark.slow
def test_workers_heed_their_parent_alone():
    """They outlive the SIGTERM of anyone else, and not the end of a process that failed."""
    script = """
import os, signal, subprocess, numpy as np, torch.multiprocessing
from unicom_ext.data.images.batches import ImageBatches, in_order
from unicom_ext.data.images.imageset import ImageSet
from unicom_ext.data.images.preprocessing import Preprocessing
images = ImageSet.of_arrays(np.zeros((64, 8, 8), np.uint8), np.zeros(64, int), ["a"])
batches = in_order(ImageBatches(images, Preprocessing(32), 2), range(32), 1)
next(batches)
(worker,) = torch.multiprocessing.active_children()
subprocess.run(["kill", str(worker.pid)], check=True)
subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
print(1 + len(list(zip(range(20), batches))), flush=True)
raise KeyError("the exception holds on to", batches)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "21\n"
    assert done.stderr.splitlines()[-1].startswith("KeyError")


def test_an_epoch_is_in_another_order_with_other_distortions():
    batches = TrainingBatches(photographs(), RGB, 23, seed=3, augment=1.0)
    (first,), (second,) = batches[0], batches[1]
    assert sorted(first.indices.tolist()) == sorted(second.indices.tolist()) == list(range(23))
    assert first.indices.tolist() != second.indices.tolist()
    same = [first.images[first.indices == i] for i in range(23)]
    again = [second.images[second.indices == i] for i in range(23)]
    assert not any(map(torch.equal, same, again))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 5))
def test_parts_are_the_whole_batch(count, batch_size, of):
    """However it is cut, an image of a step is distorted as it would be in the whole."""
    images = photographs(count)
    whole = TrainingBatches(images, RGB, batch_size, seed=1, augment=1.0)
    cut = TrainingBatches(images, RGB, batch_size, seed=1, augment=1.0, parts=range(of), of=of)
    for step in range(whole.steps_per_epoch):
        (expected,) = whole[step]
        parts = cut[step]
        assert len(parts) == of
        assert all(len(part.images) >= 2 for part in parts)
        shown = [part.images[: len(part.indices)] for part in parts]
        assert torch.equal(torch.cat(shown), expected.images)
        assert torch.equal(torch.cat([part.indices for part in parts]), expected.indices)
        positions = [part.positions[: len(part.indices)] for part in parts]
        assert torch.cat(positions).tolist() == list(range(len(expected.indices)))


@pytest.mark.parametrize(("size", "of"), [(0, 3), (1, 2), (5, 2), (5, 3), (128, 7)])
def test_shares_have_two_images_or_none(size, of):
    parts = [range(size)[share(size, part, of)] for part in range(of)]
    assert [i for part in parts for i in part] == (list(range(size)) if size > 1 else [])
    assert all(len(part) != 1 for part in parts)


def test_what_cannot_be_read_is_left_out_and_named():
    (batch,) = TrainingBatches(photographs(6, spoilt=[1, 4]), GREY, 6, seed=0)[0]
    assert sorted(batch.indices.tolist()) == [0, 2, 3, 5]
    assert len(batch.images) == len(batch.positions) == 4
    found = [(1, "picture 1: is spoilt"), (4, "picture 4: is spoilt")]
    assert sorted(batch.unreadable) == found
    # Too few are made up to two, which stand for no image.
    (batch,) = TrainingBatches(photographs(3, spoilt=[0, 1]), GREY, 3, seed=0)[0]
    assert batch.indices.tolist() == [2]
    assert batch.images.shape == (2, 1, 32, 32)
    assert batch.images[1].max() == 0
    # Those to be embedded are not.
    images = photographs(5, spoilt=[0, 2, 3])
    batches = list(in_order(ImageBatches(images, GREY, 2), range(3), 0))
    assert [batch.indices.tolist() for batch in batches] == [[1], [], [4]]
    assert [len(batch.images) for batch in batches] == [1, 0, 1]
    assert batches[1].images.shape == (0, 1, 32, 32)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(8, 40), st.sampled_from([1.0, 0.875]))
def test_the_middle_is_that_of_resize_and_centre_crop(width, height, size, crop):
    """Against torchvision's rules, written down again."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    found = Preprocessing(size, crop=crop, interpolation="bilinear")(picture)
    short = int(size / crop)
    long = max(int(short * max(width, height) / min(width, height)), short)
    resized = picture.resize((short, long) if width <= height else (long, short), 2)
    left = round((resized.width - size) / 2.0)
    top = round((resized.height - size) / 2.0)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    assert np.array_equal(np.asarray(found), expected)


def test_values_are_standardised():
    picture = Image.new("RGB", (50, 40), (255, 0, 51))
    values = RGB.normalised(as_tensor(RGB(picture))[None])
    assert (values.dtype, values.shape) == (torch.float32, (1, 3, 24, 24))
    expected = [(v - m) / s for v, m, s in zip((1, 0, 0.2), RGB.mean, RGB.std, strict=True)]
    torch.testing.assert_close(values[0, :, 5, 7], torch.tensor(expected))
    grey = as_tensor(GREY(picture))
    assert grey.shape == (1, 32, 32)
    assert torch.equal(GREY.normalised(grey[None]), grey[None] / 255)


def test_crops_and_light():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    made = [crop_and_light(picture, 1.0, np.random.default_rng(i), RGB) for i in (1, 1, 2)]
    assert all(part.size == (24, 24) for part in made)
    assert made[0].tobytes() == made[1].tobytes() != made[2].tobytes()
    none = crop_and_light(picture, 0.0, np.random.default_rng(1), RGB)
    assert none.tobytes() == RGB(picture).tobytes()
    # A uniform picture shows the light alone, which stays within its limits.
    uniform = Image.new("L", (40, 40), 100)
    light = [crop_and_light(uniform, 1.0, np.random.default_rng(i), GREY) for i in range(50)]
    values = [part.getpixel((9, 9)) for part in light]
    assert 78 <= min(values) < 90 < 110 < max(values) <= 126
