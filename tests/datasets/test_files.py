"""Files from outside: their order, what they hold, and what is said of those that are spoilt."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from unicom_ext import PartialMarginSoftmax
from unicom_ext.cluster import quality
from unicom_ext.data.labels import read_labels
from unicom_ext.data.source import Source
from unicom_ext.utils.arrays import SourceError, open_array
from unicom_ext.utils.files import list_files


def features(path, names, rows=1):
    """A shard of each name, filled with its position."""
    path.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        with open(path / name, "wb") as file:
            np.save(file, np.full((rows, 2), i + 1, np.float32))


def first_values(source):
    return source.take(np.arange(source.rows))[:, 0].tolist()


@pytest.mark.parametrize(
    "names",
    [
        [f"img_emb_{i}.npy" for i in range(12)],
        ["part.0.npy", "part.2.npy", "part.10.NPY"],
        ["a_01.npy", "a_1.npy", "a_2.npy", "a_0010.npy"],
        ["a_1_2.npy", "a_1_10.npy", "a_2_1.npy"],
        ["Img_1.npy", "img_2.npy", "Img_10.npy"],
    ],
)
def test_numbered_files_are_in_natural_order(tmp_path, names):
    features(tmp_path, names)
    assert [path.name for path in list_files(tmp_path, ".npy")] == names
    assert first_values(Source(tmp_path)) == list(range(1, len(names) + 1))


def test_images_and_texts_pair_by_number(tmp_path):
    features(tmp_path / "img_emb", ["img_emb_2.npy", "img_emb_10.npy"])
    features(tmp_path / "text_emb", ["text_emb_0002.npy", "text_emb_0010.npy"])
    rows = Source(tmp_path, joint="concat").take(np.arange(2))
    assert torch.equal(rows[:, :2], rows[:, 2:])
    (tmp_path / "text_emb" / "text_emb_0010.npy").unlink()
    with pytest.raises(SourceError, match=r"there is no text_emb_10\.npy beside it"):
        Source(tmp_path, joint="concat")


def test_names_in_capitals_are_shards_too(tmp_path):
    features(tmp_path / "img_emb", ["img_emb_0.npy", "IMG_EMB_1.npy", "img_emb_2.NPY"])
    assert first_values(Source(tmp_path)) == [1, 2, 3]


def test_labels_are_those_of_the_shards(tmp_path):
    features(tmp_path / "f", ["x_7.npy", "x_10.npy"])
    shards = Source(tmp_path / "f").shards
    (tmp_path / "l").mkdir()
    np.save(tmp_path / "l" / "labels_10.npy", np.array([5], np.uint64))
    np.save(tmp_path / "l" / "labels_0007.npy", np.array([3], ">i2"))
    assert read_labels("labels", tmp_path / "l", 2, shards).tolist() == [3, 5]
    np.save(tmp_path / "l" / "labels_8.npy", np.array([1]))
    with pytest.raises(SourceError, match=r"labels_8\.npy: there is no shard of this name"):
        read_labels("labels", tmp_path / "l", 2, shards)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">u2", "<u4", ">i8", "<u8"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    np.save(tmp_path / "y.npy", np.array([1, 100, 0], dtype))
    assert read_labels("labels", tmp_path / "y.npy", 3).tolist() == [1, 100, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2**63], np.uint64), "row 1 has the label 9223372036854775808, must be below"),
        (np.array([1.0, 2.0]), "holds float64 [2], must be integers [2], one for each row"),
        (np.array([True, False]), "holds bool [2], must be integers [2]"),
        (np.array(["a", "b"]), "holds <U1 [2], must be integers [2]"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, message):
    np.save(tmp_path / "y.npy", labels)
    with pytest.raises(SourceError) as caught:
        read_labels("labels", tmp_path / "y.npy", 2)
    assert message in str(caught.value)


def test_classes_that_do_not_fit_are_no_quality():
    with pytest.raises(ValueError, match=r"class: row 1 has the label 4294967296, must be below 2"):
        quality([(np.array([0, 1]), np.array([0, 2**32]))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: {}: is empty, must be a .npy file"),
        (b"PK\3\4", "x: {}: is an archive such as .npz, must be one array"),
        (b"hello, world", "x: {}: is not a .npy file: "),
        (None, "x: {}: cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_array_is_named(tmp_path, content, message):
    path = tmp_path / "a.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_array(path, "x")
    assert str(caught.value).startswith(message.format(path))


def test_python_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(SourceError, match="holds Python objects, which are not loaded"):
        open_array(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4"])
@pytest.mark.parametrize("pad", [0, 1, 2, 5000])
def test_rows_that_are_read_are_those_of_the_file_and_of_the_caller(tmp_path, dtype, pad):
    array = np.random.default_rng(pad).standard_normal((700, 13)).astype(dtype)
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (700, 13), }}".encode()
    header += b" " * (110 + pad - len(header)) + b"\n"  # values begin anywhere
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + array.tobytes())
    before = path.read_bytes()
    source = Source(path)
    for start, stop in ((0, 700), (3, 4), (317, 318), (699, 700), (5, 5)):
        rows = source.read(source.shards[0], start, stop)
        assert torch.equal(rows, torch.from_numpy(array[start:stop].astype(np.float32)))
        rows.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", ">f8"])
def test_centroids_of_any_floating_type(tmp_path, dtype):
    array = np.asfortranarray(np.array([[3, 4], [0, 1], [1, 0]], dtype))[::-1]
    right = PartialMarginSoftmax.from_centroids(torch.tensor([[1.0, 0], [0, 1], [3, 4]])).weight
    np.save(tmp_path / "c.npy", array)
    for given in (array, tmp_path / "c.npy"):
        assert torch.equal(PartialMarginSoftmax.from_centroids(given).weight, right)


def test_parquet_with_empty_parts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for i, kind in enumerate((pa.list_(pa.float32(), 2), pa.large_list(pa.float16()))):
        schema = pa.schema({"image_embedding": kind})
        with parquet.ParquetWriter(tmp_path / f"part.{i}.parquet", schema) as writer:
            for rows in ([], [[1, 2], [3, 4]], [], [[5, 6]]):
                values = np.array(rows, np.float16).tolist()
                array = pa.array([np.array(v, np.float16) for v in values], kind)
                writer.write_table(pa.table([array], schema), row_group_size=8)
    parquet.write_table(schema.empty_table(), tmp_path / "part.2.parquet")
    assert first_values(Source(tmp_path)) == [1, 3, 5] * 2
    ragged = pa.table({"image_embedding": pa.array([[1.0, 2], [3, 4], [5]])})
    parquet.write_table(ragged, tmp_path / "part.3.parquet", row_group_size=2)
    with pytest.raises(SourceError, match=r"part\.3\.parquet: column .* has lists of 1 numbers in"):
        Source(tmp_path)


def parquet_file(path, *columns):
    """Row groups of two rows each, with columns "image_embedding" and "text_embedding"."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["image_embedding", "text_embedding"][: len(columns)]
    parquet.write_table(pa.table(dict(zip(names, columns, strict=True))), path, row_group_size=2)
    return path


def test_parquet_of_a_slice_and_of_views(tmp_path):
    """An Arrow array may begin inside its buffers."""
    pa = pytest.importorskip("pyarrow")
    rows = pa.array([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float64(), 2), pa.list_view(pa.float32())):
        try:
            path = parquet_file(tmp_path / "a.parquet", rows.cast(kind)[1:4])
        except pa.ArrowNotImplementedError:  # this pyarrow writes no views, so nobody has them
            continue
        source = Source(path)
        assert source.take(np.arange(3)).tolist() == [[1, 2], [3, 4], [5, 6]]
        assert source.take(np.array([2])).tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], None, [3.0, 4.0]], "a.parquet: column 'image_embedding' has nulls in row"),
        (
            [[1.0, 2.0], [3.0, 4.0], [None, 5.0]],
            "column 'image_embedding' has nulls in row group 1",
        ),
        (
            [[1, 2], [3, 4]],
            "must hold lists of floating point numbers, all of one length; got list",
        ),
        (
            [[1.0, 2.0], [3.0]],
            "all of one length; got list<element: double>, lengths [1, 2] in row",
        ),
        ([1.0, 2.0], "column 'image_embedding' holds double, not lists"),
        ([[], []], "all of one length; got list<element: null>, lengths [0] in row group 0"),
    ],
)
def test_parquet_that_holds_no_matrix(tmp_path, column, message):
    path = parquet_file(tmp_path / "a.parquet", column)
    with pytest.raises(SourceError) as caught:
        Source(path).take(np.arange(len(column)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_texts_of_parquet_parts_are_other_lists(tmp_path):
    parquet_file(tmp_path / "1.parquet", [[1.0, 2.0]] * 3, [[3.0]] * 3)
    parquet_file(tmp_path / "2.parquet", [[1.0, 2.0]], [[3.0, 4.0]])
    assert Source(tmp_path).rows == 4
    with pytest.raises(SourceError, match=r"2\.parquet: has 2 dimensions and .*1\.parquet 1"):
        Source(tmp_path, joint="concat")


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_files_without_rows(tmp_path, suffix):
    def write(name, rows):
        if suffix == "npy":
            np.save(tmp_path / f"{name}.npy", np.array(rows, np.float32).reshape(len(rows), -1))
        else:
            pa = pytest.importorskip("pyarrow")
            parquet_file(tmp_path / f"{name}.parquet", pa.array(rows, pa.list_(pa.float32())))

    if suffix == "npy":
        np.save(tmp_path / "0.npy", np.empty((0, 2), np.float32))
    else:
        write("0", [])
    with pytest.raises(SourceError, match="has no rows"):
        Source(tmp_path)
    write("1", [[1.0, 2.0], [3.0, 4.0]])
    source = Source(tmp_path)
    assert [shard.rows for shard in source.shards] == [0, 2]
    assert source.take(np.array([0, 1])).tolist() == [[1, 2], [3, 4]]
    assert [block.rows.tolist() for block in source.blocks()] == [[[1, 2], [3, 4]]]


def test_a_directory_has_files_of_one_format(tmp_path):
    features(tmp_path, ["b_1.npy"])
    parquet_file(tmp_path / "a.parquet", [[1.0, 2.0]])
    with pytest.raises(SourceError) as caught:
        Source(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds b_1.npy and a.parquet, must have feature files of one format: .npy or "
        ".parquet"
    )
