"""The README's Python, as printed but for its sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.ranks import free_port

README = Path(__file__).resolve().parents[2] / "README.md"

# What the README takes for granted: an encoder and a batch.
SCRIPT = r"""
import re, sys
from pathlib import Path
import torch

torch.set_num_threads(1)
names = {
    "encoder": torch.nn.Linear(16, 512),
    "images": torch.randn(8, 16),
    "labels": torch.arange(8),
}
blocks = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.S)
for number, block in enumerate(blocks):
    block = re.sub(r"\b10?_000_000\b", "1_000", block)
    exec(compile(block, f"block {number}", "exec"), names)
    print("ran block", number)
"""


def test_the_blocks_run_in_their_order_on_two_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(README)],
            cwd=tmp_path,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for port in [str(free_port())]
        for rank in range(2)
    ]  # fmt: skip
    blocks = README.read_text().count("```python")
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
        assert re.findall(r"ran block (\d+)", output) == [str(i) for i in range(blocks)]
    assert (tmp_path / "runs" / "a" / "step-1000" / ".metadata").exists()
