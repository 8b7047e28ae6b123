"""Collections that a table names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.images import exactly, opened, pictures, pixels, refused, told, write

from unicom_ext.data.images.table import class_of
from unicom_ext.utils.arrays import SourceError

ROWS = [
    {"path": "in/1.jpg", "label": "b", "caption": "one, with a comma", "split": "train"},
    {"path": "2.png", "label": "a", "caption": 'a "two"', "split": "train"},
    {"path": "3.png", "label": "b", "caption": "", "split": "query"},
    {"path": "in/4.png", "label": None, "caption": "four\nlines", "split": "gallery"},
    {"path": "in/5.png", "label": "b", "caption": "", "split": "gallery"},
    {"path": "in/6.png", "label": "c", "caption": "", "split": "val"},
]


def table(path, rows):
    """Write rows in the format of the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        cells = [list(rows[0]), *([*row.values()] for row in rows)]
        quoted = [['"' + str(v).replace('"', '""') + '"' if v is not None else "" for v in row]
                  for row in cells]  # fmt: skip
        path.write_text("\ufeff" + "\n".join(map(",".join, quoted)) + "\n")
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_names_images(tmp_path, ending):
    pictures(tmp_path, [row["path"] for row in ROWS])
    whole = opened(table(tmp_path / f"t.{ending}", ROWS))
    assert told(whole.train) == [("in/1.jpg", "b", "one, with a comma"), ("2.png", "a", 'a "two"')]
    assert told(whole.query) == [("3.png", "b", "")]
    assert told(whole.gallery) == [("in/4.png", None, "four\nlines"), ("in/5.png", "b", "")]
    assert told(whole.validation) == [("in/6.png", "c", "")]
    assert whole.train.labels.tolist() == [1, 0]
    assert np.array_equal(whole.train.read(1), pixels(1))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_labels(tmp_path, ending):
    labels = [10, 9, -1, 10, 9, None]
    paths = [f"{i}.png" for i in range(6)]
    pictures(tmp_path, paths)
    rows = [{"path": p, "label": v} for p, v in zip(paths, labels, strict=True)]
    whole = opened(table(tmp_path / f"t.{ending}", rows))
    assert {*whole.train.class_names, *whole.query.class_names} == {"9", "10"}
    assert [name for name, of_class, _ in told(whole.train) if of_class is None] == [
        "2.png", "5.png",
    ]  # fmt: skip


def test_only_paths_are_needed(tmp_path):
    pictures(tmp_path, ["a/1.png", "2.png"])
    write(tmp_path / "t/t.csv", f",path,more\n0,../a/./1.png,x\n\n1,{tmp_path}/2.png,y\n")
    train = opened(tmp_path / "t/t.csv").train
    assert told(train) == [("../a/1.png", None, ""), (f"{tmp_path}/2.png", None, "")]
    assert np.array_equal(train.read(1), pixels(1))
    assert not train.pictures.has_captions


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (3, "3"), (3.0, "3"), (" a ", "a"), ("-x", "-x"), ("007", "007"), (-1, None), ("-2", None),
        ("-1.0", None), ("1.0", "1.0"),
        ("", None), (" ", None), (None, None), (float("nan"), None),
    ],
)  # fmt: skip
def test_labels(label, name):
    assert class_of("label", label) == name


@pytest.mark.parametrize("label", [True, 1.5, [1], {"a": 1}, float("inf")])
def test_what_is_no_label(label):
    with pytest.raises(
        SourceError, match=exactly(f"x is {label!r}, must be text or a whole number")
    ):
        class_of("x", label)


CASES = {
    "file,label\n1.png,a\n": ": has no column path, but file, label",
    "": ": has no column path, but none at all",
    "path,label,label\n1.png,a,a\n": ": has two columns label",
    "path,label\n": ": has no rows",
    "path,label\n1.png,a\n2.png,a,b\n": ": row 2: has 3 cells for 2 columns",
    "path,label\n1.png\n": ": row 1: has 1 cell for 2 columns",
    'path\n1.png\n"2.png"x\n': ": line 3: is not CSV: ',' expected after '\"'",
    "path\n1.png\n\n2.png\n./1.png\n": ": row 3: names 1.png, as row 1 does",
    "path,label\n1.png,a\n1.png,b\n": (
        ": row 2: names 1.png, as row 1 does, with the labels a and b"
    ),
    "path,label\n1.png,a\n,b\n": ": row 2: has no path",
    "path,split\n1.png,dev\n": (
        ": row 1: split is 'dev', must be val, train, validation, test, query, gallery"
    ),
    "path,split\n1.png,train\n2.png,\n": (
        ": row 2: split is '', must be val, train, validation, test, query, gallery"
    ),
    "path,split\n1.png,test\n2.png,query\n": (
        ": has test, query; must be test, whose images are searched among each other, or else "
        "query and gallery"
    ),
    "path,split\n1.png,val\n2.png,validation\n": (
        ": has two names of one part among val, validation"
    ),
    "path,split\n1.png,gallery\n": ": has gallery, but no query",
    "path\n1.png\n0.png\nd/3.png\n9.png\n8.png\n": (
        ": 4 of 5 images not found in {folder}: 0.png, 9.png, 8.png, ..."
    ),
    "path\n1.png/2.png\n": ": 1 of 1 images not found in {folder}: 1.png/2.png",
}


@pytest.mark.parametrize("text", CASES)
def test_tables_that_cannot_be_used(tmp_path, text):
    pictures(tmp_path, ["1.png", "2.png"])
    write(tmp_path / "t.csv", text)
    refused(tmp_path / "t.csv", f"{tmp_path}/t.csv" + CASES[text].format(folder=tmp_path))


JSON_CASES = {
    '{"path": "1.png"}\n\n{"path"': (
        "line 3: is not JSON: Expecting ':' delimiter: line 1 column 8 (char 7)"
    ),
    "[1]\n": "line 1: must be an object, {...}",
    '{"path": 3}\n': "row 1: path is 3, must be text",
    '{"path": "1.png", "label": true}\n': "row 1: label is True, must be text or a whole number",
    '{"path": "1.png", "caption": ["a"]}\n': "row 1: caption is ['a'], must be text",
    '{"path": "1.png"}\n{"file": "2.png"}\n': "has no column path, but file",
    '{"path": "1.png", "split": "train"}\n{"path": "2.png"}\n': "has a split for some rows only",
    '{"path": null}\n': "row 1: has no path",
}


@pytest.mark.parametrize("lines", JSON_CASES)
def test_json_lines_that_cannot_be_used(tmp_path, lines):
    pictures(tmp_path, ["1.png", "2.png"])
    write(tmp_path / "t.jsonl", lines)
    refused(tmp_path / "t.jsonl", f"{tmp_path}/t.jsonl: {JSON_CASES[lines]}")


def test_files_that_are_no_tables(tmp_path):
    kinds = "must be a table: a file that ends in .csv, .jsonl, .parquet"
    write(tmp_path / "t.txt", "path\n")
    refused(tmp_path / "t.txt", f"{tmp_path}/t.txt: {kinds}", layout="table")
    (tmp_path / "d.csv").mkdir()
    refused(tmp_path / "d.csv", f"{tmp_path}/d.csv: {kinds}", layout="table")
    for name in ("t.csv", "t.jsonl"):
        write(tmp_path / name, b'{"path": "\xff"}\n')
        refused(tmp_path / name, f"{tmp_path}/{name}: is not text in UTF-8")


def test_parquet_that_cannot_be_used(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = table(tmp_path / "t.parquet", [{"file": "1.png"}])
    refused(path, f"{path}: has no column path, but file")
    write(path, "PAR1 or so")
    with pytest.raises(SourceError, match=f"^{path}: cannot be read: "):
        opened(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(path, f"{path}: Parquet files need pyarrow: pip install 'unicom_ext[cluster]'")
