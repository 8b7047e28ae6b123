"""The logits are never stored: memory does not grow with batch size times number of classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BATCHES, CLASSES = (512, 3072), (10_000, 20_000)

# Peak resident memory of one forward and backward pass above what was resident before it. Each in
# a child of a process in which a small pass has loaded everything, so that nothing else counts.
PROGRAM = """
import itertools, json, os, sys
import torch
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace

DTYPE, OPTIONS, DIM = getattr(torch, sys.argv[1]), json.loads(sys.argv[2]), 32

def step(batch, classes):
    x = torch.randn(batch, DIM, dtype=DTYPE, requires_grad=True)
    w = torch.randn(classes, DIM, dtype=DTYPE, requires_grad=True)
    y = torch.randint(classes, (batch,))
    before = start()
    loss = partial_margin_softmax(x, y, w, margin=ArcFace(0.3), scale=64.0, **OPTIONS)
    grads = torch.autograd.grad(loss, (x, w))
    return resident("VmHWM") - before

def start():
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again from here
    return resident("VmRSS")

def resident(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)  # no thread may have started before a fork
step(8, 128)
for batch, classes in itertools.product(*json.loads(sys.argv[3])):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        print(step(batch, classes), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)
@pytest.mark.parametrize(
    ("dtype", "precision", "workspace_bytes"),
    [("float32", "fp32", 0), ("float32", "fp32", 16 << 20), ("bfloat16", "bf16", 0)],
)
def test_peak_memory_does_not_grow_with_the_logits(dtype, precision, workspace_bytes):
    options = {"precision": precision, "workspace_bytes": workspace_bytes}
    arguments = [dtype, json.dumps(options), json.dumps([BATCHES, CLASSES])]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    few_few, few_many, many_few, many_many = map(int, run.stdout.split())
    # What grows with the batch alone or the classes alone cancels, and B x |S| is left.
    grown = many_many - many_few - few_many + few_few
    logits = (BATCHES[1] - BATCHES[0]) * (CLASSES[1] - CLASSES[0]) * 4  # bytes: 102 MB
    assert grown < 0.1 * logits, run.stdout
    assert many_many < workspace_bytes + BATCHES[1] * CLASSES[1] * 4 / 4, run.stdout
