"""Several ranks extract what one process does, and end together."""

from __future__ import annotations

import dataclasses
import errno
import io
import json

import pytest
import torch.distributed as dist
from rich.console import Console
from support.images import patterns

from unicom_ext.distributed.failures import RankFailed
from unicom_ext.encoders import extract
from unicom_ext.encoders.extract_config import ExtractConfig

CONFIG = ExtractConfig(encoder="pixels", dim=4)
COUNT = 33  # 7 shards of 5 images


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def extracted(output, config=CONFIG, group=None, fails_at=None):
    """What extract.json holds, and what was printed. fails_at: the shard that cannot be written."""
    text, write = io.StringIO(), extract.write_file

    def failing(path, fill):
        if fails_at is not None and path.name == extract.shard_name("img_emb", fails_at)[8:]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, fill)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "SHARD_ROWS", 5)
        patch.setattr(extract, "BATCH", 3)
        patch.setattr(extract, "write_file", failing)
        console = Console(file=text, force_terminal=True)
        found = extract.extract(config, patterns(COUNT), output, console=console, group=group)
    return found, text.getvalue()


def on_a_rank(group, output, *arguments):
    return extracted(output, CONFIG, group, *arguments)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    output = tmp_path_factory.mktemp("expected")
    extracted(output)
    return contents(output)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_files_are_those_of_one_process(ranks, tmp_path, expected, world_size):
    (facts, said), *others = ranks.run(world_size, on_a_rank, tmp_path)
    assert contents(tmp_path) == expected
    assert facts == json.loads((tmp_path / "extract.json").read_text())
    assert "100%" in said
    assert others == [(facts, "")] * (world_size - 1)
    again = [found for found, _ in ranks.run(world_size, on_a_rank, tmp_path)]
    assert again == [facts] * world_size


def test_one_that_fails_ends_all_and_others_go_on(ranks, tmp_path, expected):
    first, second, third = ranks.outcomes(3, on_a_rank, tmp_path, 4)
    assert isinstance(second, OSError)
    for other in (first, third):
        assert isinstance(other, RankFailed)
        assert str(other).startswith("process 1 of 3 failed: OSError: ")
    there = {p.name for p in (tmp_path / "extract.tmp" / "img_emb").iterdir()}
    assert there == {f"img_emb_000{n}.npy" for n in (0, 1, 2, 3, 5)}
    ranks.run(2, on_a_rank, tmp_path)
    assert contents(tmp_path) == expected


def of_other_settings(group, output):
    config = dataclasses.replace(CONFIG, dim=3) if dist.get_rank(group) == 1 else CONFIG
    with pytest.raises(ValueError, match="config must be the same on every rank"):
        extracted(output, config, group)


def without_a_gpu(group, output):
    config = dataclasses.replace(CONFIG, device="cuda") if dist.get_rank(group) == 1 else CONFIG
    with pytest.raises(ValueError if dist.get_rank(group) == 1 else RankFailed) as raised:
        extracted(output, config, group)
    return str(raised.value)


def test_nothing_is_changed_where_a_rank_cannot_begin(ranks, tmp_path):
    ranks.run(2, of_other_settings, tmp_path / "output")
    other, own = ranks.run(2, without_a_gpu, tmp_path / "output")
    assert own == "device: cuda cannot be used: torch finds no GPU"
    assert other == f"rank 1 of the process group raised ConfigError: {own}"
    assert not (tmp_path / "output").exists()
