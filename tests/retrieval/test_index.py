"""Indexes of faiss: one that finds all gives the exact figures, others what they find."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from unicom_ext.retrieval import evaluate
from unicom_ext.retrieval.files import evaluate_files

faiss = pytest.importorskip("faiss")


def problem(n=200, m=500, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    return x, torch.arange(n) % 17 - 1, y, torch.arange(m) % 19 - 2


def index_of(name, rows):
    index = faiss.index_factory(rows.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    return index


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1).numpy()


@pytest.mark.parametrize("block_bytes", [1, 100_000, 1 << 26])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("among_the_others", [False, True])
def test_an_index_that_finds_all_gives_the_exact_figures(among_the_others, grouped, block_bytes):
    if block_bytes == 1:
        x, labels, y, among = problem(20, 14)
    else:
        x, labels, y, among = problem()
    rows = (x, labels) if among_the_others else (x, labels, y, among)
    groups = {}
    if grouped:
        groups["query_groups"] = torch.arange(len(x)) % 7 - 1
        if not among_the_others:
            groups["gallery_groups"] = torch.arange(len(y)) % 5 - 1
    how = {"dims": [5, 16], "ks": [1, 10], "block_bytes": block_bytes, **groups}
    found = evaluate(*rows, **how, index="faiss:Flat")
    for result, right in zip(found, evaluate(*rows, **how), strict=True):
        assert list(result.figures.values()) == pytest.approx(list(right.figures.values()))
        assert (result.search, result.index_recall) == ("faiss:Flat", 1.0)
        assert (right.search, right.index_recall) == ("exact", None)


@pytest.mark.parametrize("index", ["faiss:IVF16,Flat", "faiss:PQ4x4", "faiss:HNSW4"])
def test_the_recall_is_the_share_of_the_nearest_that_faiss_names(index):
    x, labels, y, among = problem(n=300, m=2000)
    (found,) = evaluate(x, labels, y, among, ks=[10], index=index)
    right = np.argsort(-unit(x) @ unit(y).T, axis=1)[:, :10]
    named = index_of(index.removeprefix("faiss:"), unit(y)).search(unit(x), 10)[1]
    counted = (labels >= 0).numpy()
    hits = [len(set(a) & set(b)) for a, b in zip(named[counted], right[counted], strict=True)]
    # Indexes are built by several threads, in an order of their own.
    assert found.index_recall == pytest.approx(np.sum(hits) / (10 * counted.sum()), abs=0.03)
    assert 0.05 < found.index_recall < 0.99
    (best,) = evaluate(x, labels, y, among, ks=[10])
    assert found.map_at_r != best.map_at_r


def test_what_an_index_does_not_find_is_not_there():
    """One list of eight is looked into, so that most of the gallery is not."""
    x, labels, y, among = problem()
    (found,) = evaluate(x, labels, y, among, ks=[500], index="faiss:IVF8,Flat")
    named = index_of("IVF8,Flat", unit(y)).search(unit(x), 500)[1]
    assert 0.7 < (named < 0).mean() < 0.95
    averages = []
    for of_query, label in zip(named, labels.tolist(), strict=True):
        if label >= 0:
            right = among.numpy()[of_query[of_query >= 0]] == label  # in their order, by cosines
            precision = np.cumsum(right) / np.arange(1, len(right) + 1)
            averages.append((precision * right).sum() / (among == label).sum().item())
    assert found.map_at_k[500] == pytest.approx(np.mean(averages), abs=1e-6)
    assert found.index_recall == pytest.approx((named[labels >= 0] >= 0).mean(), abs=1e-9)


def test_rows_in_files(tmp_path):
    x, labels, y, among = problem()
    for name, array in {"x": x, "l": labels, "y": y, "a": among}.items():
        np.save(tmp_path / f"{name}.npy", array.numpy())
    files = [tmp_path / f"{name}.npy" for name in "xlya"]
    found = evaluate_files(*files, options={"index": "faiss:Flat"})
    assert found == evaluate(x, labels, y, among, index="faiss:Flat")


def on_ranks(group, *arguments):
    return evaluate(*arguments, index="faiss:Flat", process_group=group)[0]


@pytest.mark.parametrize("queries", [1, 200])
def test_ranks_find_the_same(ranks, queries):
    """Also a rank that has no query."""
    x, labels, *rest = problem()
    arguments = x[-queries:], labels[-queries:], *rest
    right = on_ranks(None, *arguments)
    for found in ranks.run(2, on_ranks, *arguments):
        assert list(found.figures.values()) == pytest.approx(list(right.figures.values()))
        assert found.index_recall == 1.0


X, Y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("message", "keywords"),
    [
        ("index: got 'HNSW', must be 'exact', or 'faiss:' and what faiss.index_factory takes",
         {"index": "HNSW"}),
        ("index: got None, must be 'exact', or 'faiss:' and what faiss.index_factory takes",
         {"index": None}),
        ("index and codes: give one; an index of faiss has codes of its own",
         {"index": "faiss:Flat", "codes": "int8"}),
        ("index: got 'faiss:Nothing', which faiss refuses: ", {"index": "faiss:Nothing"}),
        ("index: got 'faiss:IVF100,Flat', which faiss refuses: ", {"index": "faiss:IVF100,Flat"}),
    ],
)  # fmt: skip
def test_errors(message, keywords):
    with pytest.raises(ValueError, match="index") as caught:
        evaluate(X, Y, **keywords)
    text = str(caught.value)
    assert text.startswith(message) if message.endswith(": ") else text == message


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="index") as caught:
        evaluate(X, Y, index="faiss:Flat")
    message = "index: got 'faiss:Flat', which needs faiss: pip install faiss-cpu"
    assert str(caught.value) == message
