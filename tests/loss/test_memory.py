"""The logits are never stored: memory does not grow with batch size times number of classes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.processes import Process, fork, status

from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace

BATCHES, CLASSES, DIM = (512, 2560), (6_000, 14_000), 32


def step(batch, classes, dtype, options):
    """Peak resident memory of a forward and backward pass above what was resident before it."""
    x = torch.randn(batch, DIM, dtype=dtype, requires_grad=True)
    w = torch.randn(classes, DIM, dtype=dtype, requires_grad=True)
    y = torch.randint(classes, (batch,))
    before = start()
    loss = partial_margin_softmax(x, y, w, margin=ArcFace(0.3), scale=64.0, **options)
    torch.autograd.grad(loss, (x, w))
    return resident("VmHWM") - before


def start():
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again from here
    return resident("VmRSS")


def resident(field):
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def print_peak(*arguments):
    torch.set_num_threads(2)
    print(step(*arguments), flush=True)


def print_peaks(dtype, options):
    """Each in a child of a process in which a small pass has loaded everything, so that nothing
    else counts."""
    step(8, 128, dtype, options)
    for batch, classes in itertools.product(BATCHES, CLASSES):
        assert status(fork(print_peak, batch, classes, dtype, options)) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)
@pytest.mark.parametrize(
    ("dtype", "precision", "workspace_bytes"),
    [
        (torch.float32, "fp32", 0),
        (torch.float32, "fp32", 16 << 20),
        (torch.bfloat16, "bf16", 0),
    ],
)
def test_peak_memory_does_not_grow_with_the_logits(tmp_path, dtype, precision, workspace_bytes):
    options = {"precision": precision, "workspace_bytes": workspace_bytes}
    process = Process(tmp_path / "printed", print_peaks, dtype, options)
    assert process.end() == 0, process.text()
    few_few, few_many, many_few, many_many = map(int, process.text().split())
    # What grows with the batch alone or the classes alone cancels, and B x |S| is left.
    grown = many_many - many_few - few_many + few_few
    logits = (BATCHES[1] - BATCHES[0]) * (CLASSES[1] - CLASSES[0]) * 4  # bytes: 66 MB
    assert grown < 0.1 * logits, process.text()
    assert many_many < workspace_bytes + BATCHES[1] * CLASSES[1] * 4 / 4, process.text()
