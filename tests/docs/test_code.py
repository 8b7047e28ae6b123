"""The Python of the README and of docs/ runs as printed, but for its sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.pages import PAGES, python_blocks, run_python
from support.ranks import free_port

WITH_CODE = [page for page in PAGES if python_blocks(page)]
ON_RANKS = [page for page in WITH_CODE if "init_process_group" in PAGES[page]]


def test_there_is_code_to_run():
    assert {"README.md", "docs/loss.md", "docs/several-ranks.md"} <= set(WITH_CODE)
    assert ON_RANKS == ["docs/several-ranks.md"]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in ON_RANKS])
def test_in_one_process(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_python(page) > 0


@pytest.mark.parametrize("page", ON_RANKS)
def test_on_two_ranks(page, tmp_path):
    port = str(free_port())
    script = f"from support.pages import run_python; print('blocks run:', run_python({page!r}))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
        assert f"blocks run: {len(python_blocks(page))}" in output
    assert (tmp_path / "runs" / "a" / "step-1000" / ".metadata").exists()
