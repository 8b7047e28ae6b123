"""Two processes that write to one directory would spoil what both make: the second is refused."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
from support import pipelines, training
from support.clusters import QUIET, config, make_dump
from support.images import exactly

from unicom_ext.cluster import cluster
from unicom_ext.encoders.extract import extract
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.utils import files as files_room
from unicom_ext.utils.files import only_writer


def refusal(output):
    text = (
        f"{output}: another process is writing to it; wait for its end, or name another directory"
    )
    return pytest.raises(OSError, match=exactly(text))


def files(output):
    return sorted(str(path.relative_to(output)) for path in output.rglob("*"))


def train_there(tmp_path, output):
    training.run(output)


def extract_there(tmp_path, output):
    images = training.synthetic(3, seed=0)
    extract(ExtractConfig(encoder="pixels", dim=4), images, output, console=QUIET)


def cluster_there(tmp_path, output):
    if not (tmp_path / "dump").exists():
        make_dump(tmp_path / "dump")
    cluster(config(passes=1), tmp_path / "dump/img_emb", output, console=QUIET)


def run_a_pipeline_there(tmp_path, output):
    if not (tmp_path / "images").exists():
        pipelines.photographs(tmp_path / "images")
    pipelines.run_pipeline(output, pipelines.tables(tmp_path / "images"), until="extract")


@pytest.mark.parametrize("write", [train_there, extract_there, cluster_there, run_a_pipeline_there])
def test_the_second_writer_is_refused(write, tmp_path):
    output = tmp_path / "out"
    with only_writer(output):
        with refusal(output):
            write(tmp_path, output)
        assert files(output) == []
    write(tmp_path, output)
    assert files(output)
    with only_writer(output):  # nobody holds it any more
        pass


def test_the_lock_goes_before_a_fork_has_closed_its_handle(tmp_path):
    with only_writer(tmp_path):
        (handle,) = files_room._locks
        copy = os.dup(handle)  # as a child has it that has not begun to run
    with only_writer(tmp_path):
        os.close(copy)


def sleep_until_it_has_begun(begun):
    begun.set()
    time.sleep(60)


def test_processes_that_are_forked_hold_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    with only_writer(tmp_path):
        child = context.Process(target=sleep_until_it_has_begun, args=(begun,))
        child.start()
        assert begun.wait(60)
        with refusal(tmp_path), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()
