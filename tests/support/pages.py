"""The pages of documentation, what is in them, and how their Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "benchmarks/README.md",
        ROOT / "examples/README.md",
    ]
}


def python_blocks(page: str) -> list[str]:
    """The Python of a page as printed, but with so few classes that it is quick."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.S | re.M)
    return [re.sub(r"\b10?_000_000\b", "1_000", block) for block in blocks]


def run_python(page: str) -> int:
    """Run the blocks of a page in their order; how many there were.

    What they take for granted is an encoder and a batch.
    """
    names = {
        "torch": torch,
        "encoder": torch.nn.Linear(16, 512),
        "images": torch.randn(8, 16),
        "labels": torch.arange(8),
    }
    blocks = python_blocks(page)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return len(blocks)


def prose(page: str) -> str:
    """A page without its Python."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)


def commands(page: str) -> list[str]:
    """What is meant for a shell: indented lines, and spans of code in a sentence."""
    text = prose(page)
    indented = re.findall(r"^ {4,}(\S.*)$", text, re.M)
    spans = re.findall(r"`([^`]+)`", text.replace("\n", " "))
    lines = [re.sub(r"\s+#.*$", "", line) for line in [*indented, *spans]]
    return [line for line in lines if re.match(r"(unicom-ext|python3?|torchrun|make) ", line)]
