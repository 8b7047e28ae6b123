"""Features in files: the figures are those of rows in memory, bit for bit, and little is held."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from support.memory import LiveBytes

from unicom_ext.data.joint import join
from unicom_ext.data.source import Source
from unicom_ext.retrieval import evaluate, knn_accuracy, linear_probe
from unicom_ext.retrieval.files import ProbeResult, StoredRows, evaluate_files, probe_files
from unicom_ext.utils.arrays import SourceError


def write_dump(path, sizes, dtype, dim=8, seed=0):
    """Shards of both kinds of features, [n, dim] each; returns them joined by kind, fp32."""
    rng = np.random.default_rng(seed)
    rows = {}
    for kind in ("img_emb", "text_emb"):
        (path / kind).mkdir(parents=True)
        shards = [rng.normal(size=(n, dim)).astype(dtype) for n in sizes]
        for i, shard in enumerate(shards):
            np.save(path / kind / f"{kind}_{i}.npy", shard)
        rows[kind] = torch.from_numpy(np.concatenate(shards)).float()
    return rows["img_emb"], rows["text_emb"]


def write_integers(path, values):
    np.save(path, values)
    return torch.from_numpy(values)


@pytest.mark.parametrize("block_bytes", [20_000, 1 << 26])
@pytest.mark.parametrize("joint", ["image", "concat", "average"])
@pytest.mark.parametrize("dtype", [np.float16, ">f4"])
def test_figures_are_those_of_rows_in_memory(tmp_path, dtype, joint, block_bytes):
    image, text = write_dump(tmp_path / "q", [7, 0, 25, 1], dtype)
    x = image if joint == "image" else join(image, text, joint, 0.3)
    options = {"dims": [3, x.shape[1]], "ks": [1, 4], "block_bytes": block_bytes, "bootstrap": 100}
    joint_options = {"joint": joint, "image_weight": 0.3}
    labels = write_integers(tmp_path / "y.npy", np.arange(33) % 5 - 1)
    for codes in (None, "int8"):
        found = evaluate_files(
            tmp_path / "q", tmp_path / "y.npy", **joint_options, options=options | {"codes": codes}
        )
        assert found == evaluate(x, labels, **options, codes=codes)

    image, text = write_dump(tmp_path / "g", [40, 11], np.float32, seed=1)
    y = image if joint == "image" else join(image, text, joint, 0.3)
    among = write_integers(tmp_path / "gy.npy", np.arange(51) % 6 - 1)
    cameras = write_integers(tmp_path / "c.npy", np.arange(33) % 4)
    theirs = write_integers(tmp_path / "gc.npy", np.arange(51) % 3)
    found = evaluate_files(
        tmp_path / "q", tmp_path / "y.npy", tmp_path / "g", tmp_path / "gy.npy",
        groups=tmp_path / "c.npy", gallery_groups=tmp_path / "gc.npy", options=options,
        **joint_options,
    )  # fmt: skip
    groups = {"query_groups": cameras, "gallery_groups": theirs}
    assert found == evaluate(x, labels, y, among, **groups, **options)


@pytest.mark.parametrize("block_bytes", [20_000, 1 << 26])
def test_images_that_could_not_be_read_are_not_there(tmp_path, block_bytes):
    """Zero rows without a label; others without a label, or zero ones with one, stay."""
    rng = np.random.default_rng(0)
    options = {"dims": [3, 8], "ks": [1, 4], "block_bytes": block_bytes}
    parts = {}
    for name, count in (("q", 40), ("g", 60)):
        x = rng.normal(size=(count, 8)).astype(np.float32)
        labels, cameras = np.arange(count) % 5 - 1, np.arange(count) % 3
        unreadable = np.arange(count) % 10 == 5
        x[unreadable] = 0
        assert (labels[unreadable] == -1).all()
        x[7] = 0
        np.save(tmp_path / f"{name}.npy", x)
        values = (x, labels, cameras)
        for kind, of_rows in zip("yc", values[1:], strict=True):
            np.save(tmp_path / f"{name}{kind}.npy", of_rows)
        parts[name] = [torch.from_numpy(of_rows[~unreadable]) for of_rows in values]
    (x, labels, cameras), (y, among, theirs) = parts["q"], parts["g"]
    files = [tmp_path / f"{name}.npy" for name in ("q", "qy", "g", "gy")]
    assert evaluate_files(*files[:2], options=options) == evaluate(x, labels, **options)
    assert evaluate_files(
        *files, groups=tmp_path / "qc.npy", gallery_groups=tmp_path / "gc.npy", options=options
    ) == evaluate(
        x, labels, y, among, query_groups=cameras, gallery_groups=theirs, **options
    )  # fmt: skip


def test_rows_of_parquet_files(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    (tmp_path / "x").mkdir()
    for i, part in enumerate(x.split(20)):
        table = pa.table({"emb": pa.array(part.tolist(), pa.list_(pa.float32()))})
        parquet.write_table(table, tmp_path / "x" / f"{i}.parquet", row_group_size=7)
    labels = write_integers(tmp_path / "y.npy", np.arange(30) % 4)
    files = tmp_path / "x", tmp_path / "y.npy"
    found = evaluate_files(
        *files, image_column="emb", options={"dims": [2, 6], "block_bytes": 10_000}
    )
    assert found == evaluate(x, labels, dims=[2, 6], block_bytes=10_000)


def test_a_copy_of_a_query_in_the_gallery_is_noticed(tmp_path):
    write_dump(tmp_path, [9], np.float16)
    write_integers(tmp_path / "y.npy", np.arange(9) % 2)
    twice = (tmp_path, tmp_path / "y.npy") * 2
    with pytest.warns(UserWarning, match="9 of the 9 queries find a row in it that is their own"):
        evaluate_files(*twice)


def test_rows_are_read_as_a_tensor_is_indexed(tmp_path):
    image, _ = write_dump(tmp_path, [5, 0, 9], np.float16)
    rows = StoredRows(Source(tmp_path))
    ids = torch.tensor([13, 0, 6, 4, 5])
    for dim in (1, 3, 8):
        assert torch.equal(rows[ids, :dim], image[ids, :dim])
        assert torch.equal(rows[3:12, :dim], image[3:12, :dim])
        assert rows[ids[:0], :dim].shape == (0, dim)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [[256], [16]])
def test_memory_does_not_grow_with_the_rows(tmp_path, dims):
    block_bytes, n = 1 << 19, 5500
    rng = np.random.default_rng(0)
    np.save(tmp_path / "q.npy", rng.normal(size=(50, 256)).astype(np.float16))
    np.save(tmp_path / "x.npy", rng.normal(size=(n, 256)).astype(np.float16))
    np.save(tmp_path / "qy.npy", np.arange(50))
    np.save(tmp_path / "y.npy", np.arange(n) // 4)
    files = [tmp_path / f"{name}.npy" for name in ("q", "qy", "x", "y")]
    evaluate_files(*files, options={"dims": dims, "block_bytes": block_bytes})  # imports, once
    tracemalloc.start()
    with LiveBytes() as memory:
        evaluate_files(*files, options={"dims": dims, "block_bytes": block_bytes})
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n * 256 * 2 > 3.5 * block_bytes
    # Labels and what is made of them, and a read.
    assert memory.peak < block_bytes + 8 * 8 * n + (1 << 20)
    assert numpy_peak < block_bytes / 2 + 8 * 2 * n + (1 << 20)
    assert 8 * 10 * n + (2 << 20) < n * 256 * 2


def test_a_row_that_is_not_finite_is_named_in_any_block(tmp_path):
    image, _ = write_dump(tmp_path, [9, 30], np.float16)
    image[9 + 17, 7] = torch.inf
    np.save(tmp_path / "img_emb" / "img_emb_1.npy", image[9:].half().numpy())
    np.save(tmp_path / "y.npy", np.arange(39) % 3)
    for block_bytes in (2000, 5000, 1 << 26):
        with pytest.raises(SourceError) as caught:
            evaluate_files(
                tmp_path, tmp_path / "y.npy", options={"dims": [4], "block_bytes": block_bytes}
            )
        assert str(caught.value) == (
            f"features: {tmp_path}/img_emb/img_emb_1.npy must be finite, but row 17 is not"
        )


def test_probes_of_files_are_those_of_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for name, n in (("x", 60), ("t", 20)):
        y = rng.integers(-1, 4, n)
        x = (np.eye(5, 6)[y] + 0.5 * rng.normal(size=(n, 6))).astype(np.float16)
        np.save(tmp_path / f"{name}.npy", x)
        rows.append(torch.from_numpy(x).float())
        labels.append(write_integers(tmp_path / f"{name}y.npy", y))
    files = [tmp_path / f"{name}.npy" for name in ("x", "xy", "t", "ty")]
    found = probe_files(*files, dims=[3, 6], k=[1, 5], temperature=0.1, seed=2)
    for result, dim in zip(found, [3, 6], strict=True):
        parts = rows[0][:, :dim], labels[0], rows[1][:, :dim], labels[1]
        linear = linear_probe(*parts, seed=2)
        assert result == ProbeResult(
            dim, knn_accuracy(*parts, [1, 5], temperature=0.1), linear.accuracy, linear.l2,
            int((labels[0] >= 0).sum()), int((labels[1] >= 0).sum()),
        )  # fmt: skip
    assert 0.3 < found[1].linear < 1
