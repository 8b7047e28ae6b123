"""The logits are never stored: memory does not grow with batch size times number of classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CLASSES, DIM = 20_000, 32

# Peak resident memory of one forward and backward pass above what was resident before it, after a
# small one has loaded everything. In its own process, so that nothing else counts.
PROGRAM = """
import sys, threading, torch
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

batch, classes, dim, dtype = *map(int, sys.argv[1:4]), getattr(torch, sys.argv[4])
torch.set_num_threads(2)
w = torch.randn(classes, dim).to(dtype).requires_grad_()
x = torch.randn(batch, dim).to(dtype).requires_grad_()
y = torch.randint(classes, (batch,))
def step(x, y, w):
    loss = partial_margin_softmax(x, y, w, margin=ArcFace(0.3), scale=64.0, precision=sys.argv[5])
    return torch.autograd.grad(loss, (x, w))
step(x[:8], y[:8], w[:128])
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the high-water mark starts again from here
before = resident("VmRSS")
step(x, y, w)
print(resident("VmHWM") - before)
"""


def peak_bytes(batch: int, dtype: str, precision: str) -> int:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    arguments = [str(batch), str(CLASSES), str(DIM), dtype, precision]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "fp32"), ("float32", "bf16"), ("float64", "fp32")]
)
def test_peak_memory_does_not_grow_with_the_logits(dtype, precision):
    small, large = (peak_bytes(batch, dtype, precision) for batch in (512, 3072))
    logits = (3072 - 512) * CLASSES * 4  # bytes, 205 MB in float32
    assert large - small < 0.05 * logits, (small, large)
