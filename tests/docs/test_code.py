"""The Python of the README and of docs/ runs as printed, but for its sizes."""

from __future__ import annotations

import os
import traceback

import pytest
from support.pages import PAGES, python_blocks, run_python
from support.processes import CONTEXT, begin
from support.ranks import free_port

WITH_CODE = [page for page in PAGES if python_blocks(page)]
OPTIONAL = {"docs/pytorch-metric-learning.md": "pytorch_metric_learning"}  # what a page needs
ON_RANKS = [page for page in WITH_CODE if "init_process_group" in PAGES[page]]
TRAINS = {"docs/start.md"}  # until there is something to see


def test_there_is_code_to_run():
    assert {"README.md", "docs/loss.md", "docs/several-ranks.md"} <= set(WITH_CODE)
    assert ON_RANKS == ["docs/several-ranks.md"]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in TRAINS else ())
        for page in WITH_CODE
        if page not in ON_RANKS
    ],
)
def test_in_one_process(page, tmp_path, monkeypatch):
    pytest.importorskip(OPTIONAL.get(page, "torch"))
    monkeypatch.chdir(tmp_path)
    assert run_python(page) > 0


@pytest.mark.slow
@pytest.mark.parametrize("page", ON_RANKS)
def test_on_two_ranks(page, tmp_path):
    port, ranks = str(free_port()), []
    for rank in range(2):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=run_as_rank, args=(page, rank, port, tmp_path, theirs))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    for process, pipe in ranks:
        assert pipe.poll(300), f"{page} hangs"
        assert pipe.recv() == len(python_blocks(page))
        process.join()
    assert (tmp_path / "runs" / "a" / "step-1000" / ".metadata").exists()


def run_as_rank(page, rank, port, folder, pipe):
    """As under torchrun, in a process of its own."""
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    begin()
    try:
        pipe.send(run_python(page))
    except Exception:
        pipe.send(traceback.format_exc())
