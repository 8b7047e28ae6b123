"""Clustering: feature files, passes, and what they leave behind."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.clusters import (
    IMAGE_DIM,
    ROWS,
    SIZES,
    all_labels,
    config,
    make_dump,
    run,
)
from torch import Tensor

from unicom_ext.cluster import (
    Centroids,
    nearest,
    pictures,
    quality,
    refine,
    seeds,
    two_level,
)
from unicom_ext.cluster import labels as label_files
from unicom_ext.cluster.lloyd import assign, lloyd_pass, sampled
from unicom_ext.cluster.results import summary
from unicom_ext.data.formats import SourceError
from unicom_ext.data.source import Block, Source
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.utils.files import CheckpointError
from unicom_ext.utils.settings import ConfigError


@pytest.fixture
def dump(tmp_path):
    return tmp_path / "dump", make_dump(tmp_path / "dump")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than clustering here."""
    drawn = (
        "test_what_is_written",
        "test_a_picture_that_cannot_be_written_is_named",
        "test_when_every_cluster_is_dissolved",
    )
    if request.node.name not in drawn:
        monkeypatch.setattr(pictures, "draw", lambda *arguments: [])


# ---- feature files -------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("joint", ["image", "text", "average", "concat"])
def test_joint_features(tmp_path, joint):
    data = make_dump(tmp_path / "dump", dim=IMAGE_DIM)
    source = Source(tmp_path / "dump", joint=joint, image_weight=0.3)
    u, v = unit(data["image"]), unit(data["text"])
    right = {
        "image": u,
        "text": v,
        "average": unit(0.3 * u + 0.7 * v),
        "concat": np.concatenate([0.3**0.5 * u, 0.7**0.5 * v], axis=1),
    }[joint]
    blocks = list(source.blocks(size=100))
    assert [len(b.rows) for b in blocks] == [100, 100, 100, 100, 100, 11, 89]
    found = F.normalize(torch.cat([b.rows for b in blocks]))
    np.testing.assert_allclose(found.numpy(), right, atol=1e-6)
    assert (source.rows, source.dim) == right.shape
    rows = np.array([0, 5, 299, 300, 510, 511, 599])
    np.testing.assert_allclose(F.normalize(source.take(rows)).numpy(), right[rows], atol=1e-6)


def test_cosines_of_concatenated_features_are_weighted(tmp_path):
    data = make_dump(tmp_path / "dump")
    source = Source(tmp_path / "dump", joint="concat", image_weight=0.25)
    rows = source.take(np.arange(50))
    u, v = unit(data["image"][:50]), unit(data["text"][:50])
    np.testing.assert_allclose(rows @ rows.T, 0.25 * u @ u.T + 0.75 * v @ v.T, atol=1e-6)


def test_only_blocks_are_held_in_memory(tmp_path):
    shape = (2**17, 256)  # 64 MiB, which no page of is written
    np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float16, shape).flush()
    source = Source(tmp_path / "rows.npy")
    tracemalloc.start()
    try:
        rows = sum(len(block.rows) for block in source.blocks(size=1024))
        source.take(np.arange(0, 2**17, 1024))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 2**17
    assert peak < 8 << 20


@given(st.integers(0, ROWS), st.integers(0, ROWS), st.integers(1, 400), st.booleans())
def test_blocks_cover_each_row_once(tmp_path_factory, a, b, size, shuffled):
    path = tmp_path_factory.getbasetemp() / "covered"
    if not path.exists():
        make_dump(path)
    start, stop = sorted((a, b))
    source = Source(path)
    shuffle = np.random.default_rng(0) if shuffled else None
    seen = [
        np.arange(len(block.rows)) + block.shard.first + block.start
        for block in source.blocks(start, stop, size, shuffle)
    ]
    assert all(len(s) <= size for s in seen)
    assert sorted(np.concatenate([[], *seen]).tolist()) == list(range(start, stop))


def test_single_files_directories_and_parquet_are_the_same_rows(tmp_path, dump):
    path, data = dump
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    np.save(tmp_path / "all.npy", data["image"])
    fixed = pyarrow.FixedSizeListArray.from_arrays(data["image"].ravel(), IMAGE_DIM)
    free = pyarrow.array(data["text"].tolist(), pyarrow.list_(pyarrow.float64()))
    table = pyarrow.table({"image_embedding": fixed, "words": free, "other": [1] * ROWS})
    (tmp_path / "parquet").mkdir()
    parquet.write_table(table[:400], tmp_path / "parquet" / "part-7.parquet", row_group_size=64)
    parquet.write_table(table[400:], tmp_path / "parquet" / "part-8.parquet")
    right = torch.from_numpy(data["image"]).float()
    for name, shards in (
        ("all.npy", ["0000"]),
        ("dump/img_emb", list(SIZES)),
        ("parquet", ["7", "8"]),
    ):
        source = Source(tmp_path / name)
        assert [s.name for s in source.shards] == shards
        assert torch.equal(torch.cat([b.rows for b in source.blocks(size=77)]), right)
        rows = np.array([1, 63, 64, 399, 400, 599])
        assert torch.equal(source.take(rows), right[rows])
    source = Source(tmp_path / "parquet", joint="concat", text_column="words")
    other = Source(path, joint="concat")
    assert torch.equal(source.take(np.arange(ROWS)), other.take(np.arange(ROWS)))


@pytest.mark.parametrize(
    "how", [{"joint": "both"}, {"image_weight": 1.0}, {"image_weight": "much"}], ids=str
)
def test_a_source_refuses_what_the_settings_refuse(dump, how):
    with pytest.raises(ConfigError) as here:
        Source(dump[0], **how)
    with pytest.raises(ConfigError) as there:
        config(**how)
    assert str(here.value) == str(there.value)


def _truncate(path):
    file = path / "img_emb" / "img_emb_0001.npy"
    file.write_bytes(file.read_bytes()[:-10])
    return "img_emb_0001.npy", "truncated"


def _lose_rows(path):
    file = path / "text_emb" / "text_emb_0002.npy"
    np.save(file, np.load(file)[:-1])
    return "text_emb_0002.npy", "88 rows", "89"


def _lose_columns(path):
    file = path / "img_emb" / "img_emb_0002.npy"
    np.save(file, np.load(file)[:, :-1])
    return "img_emb_0002.npy", "11 dimensions", "12"


def _lose_shard(path):
    (path / "text_emb" / "text_emb_0001.npy").unlink()
    return "img_emb_0001.npy", "text_emb_0001.npy"


def _be_double(path):
    np.save(path / "img_emb" / "img_emb_0000.npy", np.zeros((300, IMAGE_DIM)))
    return "img_emb_0000.npy", "float64", "float16 or float32"


def _be_text(path):
    (path / "img_emb" / "img_emb_0000.npy").write_text("hello")
    return "img_emb_0000.npy", "not a .npy file"


def _be_fortran(path):
    x = np.load(path / "text_emb" / "text_emb_0001.npy")
    np.save(path / "text_emb" / "text_emb_0001.npy", np.asfortranarray(x))
    return "text_emb_0001.npy", "C order"


def _be_empty(path):
    for file in (path / "text_emb").iterdir():
        file.unlink()
    return "text_emb", "no text_emb_*.npy"


@pytest.mark.parametrize(
    "spoil",
    [
        _truncate,
        _lose_rows,
        _lose_columns,
        _lose_shard,
        _be_double,
        _be_text,
        _be_fortran,
        _be_empty,
    ],
)  # fmt: skip
def test_bad_files_are_named_before_anything_is_written(tmp_path, dump, spoil):
    words = spoil(dump[0])
    with pytest.raises(SourceError) as caught:
        run(dump[0], tmp_path / "out", config(joint="concat"))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "options", "error", "words"),
    [
        ({"clusters": ROWS + 1}, {}, ConfigError, ["clusters", "601", "600"]),
        ({"joint": "average"}, {}, SourceError, ["8 dimensions", "12", "concat"]),
        ({"init": "no.npy"}, {}, SourceError, ["no.npy"]),
        ({}, {"true_labels": "short.npy"}, SourceError, ["true_labels: short.npy", "[3]", "[600]"]),
        (
            {},
            {"true_labels": "none.npy"},
            SourceError,
            ["true_labels: none.npy", "negative labels"],
        ),
        ({}, {"images": "short.npy"}, SourceError, ["images: short.npy", "uint8 [600, h, w]"]),
        ({}, {"resume": True}, CheckpointError, ["state.pt", "nothing to resume"]),
    ],
)
def test_bad_arguments(tmp_path, dump, monkeypatch, settings, options, error, words):
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.zeros(3, np.int64))
    np.save("none.npy", np.full(ROWS, -1))
    with pytest.raises(error) as caught:
        run(dump[0], tmp_path / "out", config(**settings), **options)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clusters": 0}, ["clusters", "0"]),
        ({"joint": "both"}, ["joint", "both", "concat"]),
        ({"early_passes": 4}, ["early_passes", "4"]),
        ({"early_passes": 1, "method": "minibatch"}, ["early_passes", "lloyd"]),
        ({"method": "two-level", "coarse": 21}, ["coarse", "21", "20"]),
        ({"refine_passes": 1}, ["refine_passes", "two-level", "lloyd"]),
        ({"rows_per_cluster": 9, "method": "minibatch"}, ["rows_per_cluster", "minibatch"]),
        ({"rows_per_cluster": 9, "early_passes": 1}, ["rows_per_cluster", "early_passes"]),
        ({"init": "zeros"}, ["init", "zeros", "kmeans++"]),
        ({"threads": 10**11}, ["threads", "100000000000", "from 0 to 4096"]),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    for word in words:
        assert word in str(caught.value)


def test_more_clusters_than_good_rows(tmp_path):
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    rows[:20] = 0
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(SourceError, match="clusters: got 11, but only 10 rows"):
        run(tmp_path / "rows.npy", tmp_path / "out", config(clusters=11))


# ---- passes --------------------------------------------------------------------------------------


def reference_k_means(rows: Tensor, centroids: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means in float64 as it is written in the books."""
    x = F.normalize(rows.double())
    c = F.normalize(centroids.double())
    for _ in range(passes):
        label = (x @ c.T).argmax(dim=1)
        sums = torch.zeros_like(c).index_add_(0, label, x)
        c = F.normalize(sums)
    return c, (x @ c.T).argmax(dim=1)


@pytest.mark.parametrize("engine", ["unicom", "faiss"])
def test_lloyd_is_the_textbook_s(tmp_path, dump, engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    path, data = dump
    first = data["image"][::30].astype(np.float32)
    np.save(tmp_path / "first.npy", first)
    settings = config(init=str(tmp_path / "first.npy"), passes=5, engine=engine)
    result = run(path, tmp_path / "out", settings)
    rows = torch.from_numpy(data["image"]).float()
    right, labels = reference_k_means(rows, torch.from_numpy(first), 5)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "centroids.npy"), right, atol=1e-6)
    assert np.array_equal(all_labels(tmp_path / "out"), labels.numpy())
    objective = (F.normalize(rows.double()) * right[labels]).sum(dim=1).mean()
    assert result["objective"] == pytest.approx(float(objective), abs=1e-6)


def test_as_good_as_faiss_k_means(tmp_path, dump):
    faiss = pytest.importorskip("faiss")
    path, data = dump
    rows = F.normalize(torch.from_numpy(data["image"]).float()).numpy()
    np.save(tmp_path / "first.npy", rows[:20])
    result = run(path, tmp_path / "out", config(init=str(tmp_path / "first.npy"), passes=6))
    k_means = faiss.Kmeans(IMAGE_DIM, 20, niter=6, spherical=True, min_points_per_centroid=1)
    k_means.train(rows, init_centroids=rows[:20])
    theirs = nearest(torch.from_numpy(rows), torch.from_numpy(k_means.centroids))[1].mean()
    assert result["objective"] == pytest.approx(float(theirs), rel=1e-3)


def test_no_pass_lowers_the_objective(tmp_path, dump):
    result = run(dump[0], tmp_path / "out", config(init="random", passes=10))
    objectives = [p["objective"] for p in result["passes"]] + [result["objective"]]
    assert objectives == sorted(objectives)
    assert objectives[-1] > objectives[0] + 0.05
    changed = [p["changed"] for p in result["passes"]]
    assert changed[0] is None
    assert changed[1] > changed[-1]


def test_passes_end_when_the_objective_stands_still(tmp_path, dump):
    result = run(dump[0], tmp_path / "out", config(passes=100, tolerance=1e-3))
    objectives = [p["objective"] for p in result["passes"]]
    assert result["converged"]
    assert 2 <= len(objectives) < 100
    gains = [(b - a) / a for a, b in itertools.pairwise(objectives)]
    assert gains[-1] < 1e-3 <= min(gains[:-1], default=1)


class Memory(two_level.InMemory):
    pass


def one_pass(rows: Tensor, centroids: Tensor, seed: int = 0):
    return lloyd_pass(Memory(rows), centroids, Centroids, Ranks(None), lambda t: None, seed)[:3]


def test_empty_clusters_take_half_of_the_largest():
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    rows[:200, 0] += 20  # two thirds in one bundle
    centroids = F.normalize(torch.cat([rows[:1], rows[200:210], -rows[:1].expand(4, -1)]))
    moved, empty, _ = one_pass(rows, centroids)
    assert empty == 3  # the first of the four opposite ones has the rows on that side
    assert (nearest(rows[:200], moved)[0].bincount(minlength=15)[12:] > 0).sum() >= 2
    moved, empty, _ = one_pass(rows, moved)
    assert empty == 0
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(15))


def test_the_objective_does_not_depend_on_blocks():
    """Of cosines that double cannot sum exactly as they are."""
    order = torch.randperm(999, generator=torch.Generator().manual_seed(0))
    cosines = torch.logspace(-12, 0, 999)[order]

    class Blocks(Memory):
        def blocks(self, start, stop, size):
            for begin in range(start, stop, size):
                yield Block(self.shards[0], begin, self.take(np.arange(stop))[begin : begin + size])

    class Known:
        device = torch.device("cpu")

        def nearest(self, rows, guess=None):
            return torch.zeros(len(rows), dtype=torch.int64), rows[:, 0]

    found = set()
    for size in (1, 10, 37, 333, 999):
        source, alone = Blocks(cosines[:, None]), Ranks(None)
        how = {"block_rows": size, "visit": lambda *block: None}
        found.add(assign(source, Known(), alone, lambda totals: None, **how).score)
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(cosines.double().sum()), abs=999 * 2**-25)


def test_more_clusters_than_can_be_filled():
    """Only two different rows: two clusters, and the pass still ends."""
    rows = torch.eye(4)[:2].repeat(5, 1)
    moved, empty, totals = one_pass(rows, torch.eye(4))
    assert empty == 2
    assert totals.objective == 1
    assert moved.isfinite().all()


def test_rows_without_direction_are_counted_and_labelled(tmp_path, dump):
    path = dump[0]
    file = path / "img_emb" / "img_emb_0001.npy"
    rows = np.load(file)
    rows[[3, 7]], rows[100, 2], rows[110, 0] = 0, np.nan, np.inf
    np.save(file, rows)
    result = run(path, tmp_path / "out")
    assert result["rows"] == {"clustered": ROWS - 4, "zero": 2, "not_finite": 2, "dissolved": 0}
    labels = all_labels(tmp_path / "out")
    assert np.flatnonzero(labels < 0).tolist() == [303, 307, 400, 410]
    # They count for both parts of a joint feature.
    result = run(path, tmp_path / "joint", config(joint="concat"))
    assert (result["rows"]["zero"], result["rows"]["not_finite"]) == (2, 2)


def test_sampled_rows_do_not_depend_on_blocks(dump):
    source = Source(dump[0])
    part = sampled(0.3, seed=5)

    def rows(size, part=part):
        return torch.cat([part(block).rows for block in source.blocks(size=size)])

    assert torch.equal(rows(1000), rows(37))
    assert 0.2 * ROWS < len(rows(100)) < 0.4 * ROWS
    assert not torch.equal(rows(100), rows(100, sampled(0.3, seed=6)))
    everything = torch.cat([sampled(1.0, 0)(block).rows for block in source.blocks()])
    assert len(everything) == ROWS


def test_sampled_passes_are_reported(tmp_path, dump):
    result = run(dump[0], tmp_path / "out", config(early_passes=2, early_fraction=0.4))
    assert [p["kind"] for p in result["passes"]] == ["sampled", "sampled", "lloyd", "lloyd"]
    assert result["passes"][0]["rows"] < 0.6 * ROWS
    assert result["passes"][2]["rows"] == ROWS


def test_mini_batches_come_close_to_whole_passes(tmp_path, dump):
    whole = run(dump[0], tmp_path / "whole", config(passes=10))
    parts = run(dump[0], tmp_path / "parts", config(passes=10, method="minibatch", batch_rows=100))
    assert parts["objective"] > 0.97 * whole["objective"]


# ---- initial centroids ---------------------------------------------------------------------------


def test_kmeans_plus_plus_finds_every_bundle():
    generator = torch.Generator().manual_seed(0)
    k = 40
    bundles = F.normalize(torch.randn(k, 24, generator=generator))
    rows = bundles.repeat(30, 1) + 0.002 * torch.randn(30 * k, 24, generator=generator)
    rng = np.random.default_rng(0)
    plus = seeds.draw("kmeans++", Memory(rows), k, rng, Centroids)
    assert nearest(plus, bundles)[0].unique().numel() == k
    random = seeds.draw("random", Memory(rows), k, rng, Centroids)
    assert nearest(random, bundles)[0].unique().numel() < k
    torch.testing.assert_close(plus.norm(dim=1), torch.ones(k))


def test_kmeans_plus_plus_draws_as_if_one_by_one():
    """By the squared distances from all rows before, although many are drawn at a time."""
    angles = torch.tensor([0.0, 0.3, 1.0, 1.2, 2.5])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    distance = 1 - (rows.double() @ rows.double().T).numpy()
    n, trials = len(rows), 3000
    expected = np.zeros((n, n, n))
    for a, b, c in itertools.permutations(range(n), 3):
        both = np.minimum(distance[a], distance[b])
        expected[a, b, c] = distance[a, b] / distance[a].sum() * both[c] / both.sum() / n
    rng, found = np.random.default_rng(0), np.zeros_like(expected)
    for _ in range(trials):
        chosen = seeds.choose("kmeans++", rows, 3, rng, Centroids)
        found[tuple((chosen @ rows.T).argmax(1).tolist())] += 1
    assert np.abs(found / trials - expected).max() < 0.015
    assert abs(expected.sum() - 1) < 1e-6


def test_kmeans_plus_plus_with_too_few_different_rows():
    rows = torch.eye(6).repeat(4, 1)
    rng = np.random.default_rng(0)
    assert len(seeds.draw("kmeans++", Memory(rows), 6, rng, Centroids).unique(dim=0)) == 6
    with pytest.raises(SourceError, match="got 7, but there are only 6 different rows"):
        seeds.draw("kmeans++", Memory(rows), 7, rng, Centroids)


# ---- two levels ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.data())
def test_clusters_are_shared_out(sizes, data):
    sizes = np.array(sizes)
    if sizes.sum() == 0:
        return
    k = data.draw(st.integers(int((sizes > 0).sum()), int(sizes.sum())))
    counts = two_level.share_out(k, sizes)
    assert counts.sum() == k
    assert (counts <= sizes).all()
    assert (counts >= (sizes > 0)).all()
    fair = k * sizes / sizes.sum()
    if fair.min() >= 1:
        assert (np.abs(counts - fair) <= 1).all()


def test_two_levels(tmp_path, dump):
    path, data = dump
    settings = config(clusters=30, method="two-level", coarse=5, passes=6)
    result = run(path, tmp_path / "out", settings, true_labels=path / "true.npy")
    assert len(np.load(tmp_path / "out" / "centroids.npy")) == 30
    assert result["rows"]["clustered"] == ROWS
    facts = result["two_level"]
    assert facts["coarse"] == 5
    # The measured loss is that of these very labels: the sample is all rows here.
    rows = torch.from_numpy(data["image"]).float()
    centroids = torch.from_numpy(np.load(tmp_path / "out" / "centroids.npy"))
    flat = nearest(rows, centroids)[1].double().mean()
    assert facts["flat"] == pytest.approx(float(flat), abs=1e-6)
    assert facts["two_level"] == pytest.approx(result["objective"], abs=1e-6)
    assert 0 <= facts["loss"] < 0.1
    whole = run(path, tmp_path / "flat", config(clusters=30, passes=6))
    assert result["objective"] > 0.9 * whole["objective"]


def test_two_level_search_stays_in_the_cell():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=generator)
    rows[17], rows[30, 2] = 0, math.nan
    coarse = torch.randn(3, 6, generator=generator)
    fine = torch.randn(11, 6, generator=generator)
    search = two_level.TwoLevel(coarse, fine, torch.tensor([0, 3, 7, 11]), Centroids)
    index, score = search.nearest(rows)
    cell, _ = nearest(rows, coarse)
    for i in range(200):
        if i in (17, 30):
            assert index[i] == -1
            continue
        begin, end = [(0, 3), (3, 7), (7, 11)][cell[i]]
        place, best = nearest(rows[i : i + 1], fine[begin:end])
        assert index[i] == place + begin
        assert score[i] == best
    assert score[17] == 0
    assert score[30].isnan()
    # A guess says which cell it is, and need not be the nearest there; some have none.
    guess = torch.where(index >= 0, torch.tensor([0, 3, 7])[cell.clamp(min=0)], -1)
    guess[::3] = -1
    again, cosine = search.nearest(rows, guess)
    assert torch.equal(again, index)
    torch.testing.assert_close(cosine, score, rtol=0, atol=0, equal_nan=True)


def test_empty_clusters_are_replaced_in_their_cell():
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    rows[:250, 0] += 20  # the largest cluster, in the first cell
    rows[250:, 1] += 20
    axes = torch.eye(8)
    coarse, first = axes[:2], torch.tensor([0, 1, 4])
    fine = torch.cat([axes[:1], axes[1:2], -axes[1:2], -axes[1:2]])  # the last one gets none

    def engine(centroids: Tensor) -> two_level.TwoLevel:
        return two_level.TwoLevel(coarse, centroids, first, Centroids)

    moved, empty, _, _ = lloyd_pass(
        Memory(rows), fine, engine, Ranks(None), lambda t: None, 0, first=[0, 1]
    )
    assert empty == 2
    assert (moved[1:] @ axes[1] > 0.9).all()
    torch.testing.assert_close(moved[:1], F.normalize(F.normalize(rows[:250]).sum(0)[None]))


def test_refined_two_levels(tmp_path, dump):
    path, data = dump
    settings = {"clusters": 30, "method": "two-level", "coarse": 5, "passes": 2}
    within = run(path, tmp_path / "within", config(**settings))
    refined = run(path, tmp_path / "refined", config(**settings, refine_passes=2))
    assert [p["kind"] for p in refined["passes"]] == ["fine", "fine", "lloyd", "lloyd"]
    objectives = [[p["objective"] for p in r["passes"]] for r in (within, refined)]
    assert objectives[1][:2] == objectives[0]
    assert refined["objective"] > within["objective"]
    assert refined["two_level"] == {"coarse": 5}
    rows = torch.from_numpy(data["image"]).float()
    centroids = torch.from_numpy(np.load(tmp_path / "refined" / "centroids.npy"))
    assert np.array_equal(all_labels(tmp_path / "refined"), nearest(rows, centroids)[0])
    # A finished run can be refined, and has then no more fine passes.
    more = config(**{**settings, "passes": 5}, refine_passes=2)
    run(path, tmp_path / "within", config(**settings, refine_passes=1), resume=True)
    run(path, tmp_path / "within", more, resume=True)
    assert np.array_equal(all_labels(tmp_path / "within"), all_labels(tmp_path / "refined"))
    summary(refined)


def test_two_levels_where_a_coarse_centroid_gets_no_row(tmp_path, dump):
    rows = torch.from_numpy(dump[1]["image"]).float()
    coarse = torch.cat([rows[:2], rows[:1]])  # of equals the first gets the rows
    np.save(tmp_path / "init.npy", coarse.numpy())
    settings = config(
        clusters=30, method="two-level", coarse=3, passes=1, init=str(tmp_path / "init.npy")
    )
    result = run(dump[0], tmp_path / "out", settings)
    assert result["rows"]["clustered"] == ROWS
    assert (np.load(tmp_path / "out" / "centroids.npy") != 0).any(axis=1).all()


@pytest.mark.parametrize("method", ["lloyd", "two-level"])
def test_training_on_a_sample(tmp_path, dump, method):
    path, data = dump
    settings = config(method=method, rows_per_cluster=10, passes=50, tolerance=1e-3)
    result = run(path, tmp_path / "out", settings)
    seen = {p["rows"] for p in result["passes"]}  # the same rows in each pass
    assert len(seen) == 1
    assert 150 < seen.pop() < 250
    assert result["converged"]
    assert any("trained on a sample of" in line for line in summary(result))
    # Labels and objective are those of all rows.
    assert result["rows"]["clustered"] == ROWS
    rows = torch.from_numpy(data["image"]).float()
    centroids = F.normalize(torch.from_numpy(np.load(tmp_path / "out" / "centroids.npy")))
    own = (F.normalize(rows) * centroids[all_labels(tmp_path / "out")]).sum(1)
    assert result["objective"] == pytest.approx(float(own.mean()), abs=1e-6)
    everything = run(path, tmp_path / "all", config(method=method, rows_per_cluster=1000))
    assert {p["rows"] for p in everything["passes"]} == {ROWS}


# ---- afterwards ----------------------------------------------------------------------------------


def test_near_duplicates_are_merged_without_chains():
    angle = torch.tensor([0.0, 0.2, 0.4, 2.0])
    centroids = torch.stack([angle.cos(), angle.sin()], dim=1)
    sizes = torch.tensor([50.0, 10.0, 40.0, 5.0])
    merged = refine.merge(centroids, sizes, sizes, math.cos(0.3))
    # The largest takes the one next to it; the third is too far from the largest.
    found = torch.atan2(merged[:, 1], merged[:, 0])
    weighted = 50 * centroids[0] + 10 * centroids[1]
    expected = [float(torch.atan2(weighted[1], weighted[0])), 0.4, 2.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_dissolving():
    sizes, scores = torch.tensor([5.0, 1.0, 0.0, 9.0]), torch.tensor([4.5, 1.0, 0.0, 2.0])
    assert refine.dissolve(sizes, scores, 0, 0.0).tolist() == [0, 1, 2, 3]
    assert refine.dissolve(sizes, scores, 2, 0.0).tolist() == [0, -1, -1, 1]
    assert refine.dissolve(sizes, scores, 2, 0.5).tolist() == [0, -1, -1, -1]


def test_merged_and_dissolved_labels_fit_the_centroids(tmp_path, dump):
    path, data = dump
    settings = config(clusters=40, merge_above=0.8, min_size=12, min_cosine=0.75, passes=6)
    result = run(path, tmp_path / "out", settings)
    centroids = torch.from_numpy(np.load(tmp_path / "out" / "centroids.npy"))
    labels = all_labels(tmp_path / "out")
    assert result["merged"] > 0
    assert result["dissolved"] > 0
    assert 1 < len(centroids) == 40 - result["merged"] - result["dissolved"]
    kept = labels >= 0
    assert result["rows"]["dissolved"] == np.count_nonzero(~kept)
    sizes = np.bincount(labels[kept], minlength=len(centroids))
    assert sizes.tolist() == result["sizes"]
    assert sizes.min() >= 12
    index, score = nearest(torch.from_numpy(data["image"]).float(), centroids)
    assert np.array_equal(index.numpy()[kept], labels[kept])
    assert result["objective"] == pytest.approx(float(score[kept].double().mean()), abs=1e-6)


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 3)), min_size=1, max_size=40))
def test_quality_by_counting_pairs(rows):
    cluster_of, class_of = np.array(rows).T
    half = len(rows) // 2
    found = quality([(cluster_of[:half], class_of[:half]), (cluster_of[half:], class_of[half:])])
    known = [(a, b) for a, b in rows if a >= 0 and b >= 0]
    n = len(known)
    assert found.rows == n
    if n == 0:
        return

    def entropy(values):
        shares = np.array([values.count(v) for v in set(values)]) / n
        return -(shares * np.log(shares)).sum()

    a, b = ([pair[i] for pair in known] for i in (0, 1))
    total = entropy(a) + entropy(b)
    nmi = 2 * (total - entropy(known)) / total if total else 1
    assert found.nmi == pytest.approx(nmi, abs=1e-9)
    majority = sum(max(known.count((c, k)) for k in set(b)) for c in set(a))
    assert found.purity == pytest.approx(majority / n)
    same = [(i, j) for i in range(n) for j in range(i) if b[i] == b[j]]
    apart = sum(a[i] != a[j] for i, j in same)
    assert found.conflict == pytest.approx(apart / len(same) if same else 0)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_written(tmp_path, dump):
    path, data = dump
    rng = np.random.default_rng(0)
    np.save(path / "images.npy", rng.integers(255, size=(ROWS, 6, 6), dtype=np.uint8))
    output = tmp_path / "out"
    result = run(
        path,
        output,
        config(joint="concat"),
        true_labels=path / "true.npy",
        images=path / "images.npy",
    )
    assert json.loads((output / "clusters.json").read_text()) == result
    pictures = ["sizes.png", "objective.png", "members.png"]
    assert result["pictures"] == pictures
    for name in pictures:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    names = [f"labels_{name}.npy" for name in SIZES] + ["centroids.npy"]
    assert sorted(result["sha256"]) == sorted(names)
    for name, checksum in result["sha256"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == checksum
    labels, centroids = all_labels(output), np.load(output / "centroids.npy")
    assert (labels.dtype, centroids.dtype, centroids.shape) == (np.int32, np.float32, (20, 20))
    rows = Source(path, joint="concat").take(np.arange(ROWS))
    index, score = nearest(rows, torch.from_numpy(centroids))
    assert np.array_equal(labels, index.numpy())
    assert result["objective"] == pytest.approx(float(score.double().mean()), abs=1e-7)
    assert np.bincount(labels, minlength=20).tolist() == result["sizes"]
    right = quality([(labels, data["true"])])
    assert result["quality"] == pytest.approx(right._asdict())
    assert right.nmi > 0.5


def test_nothing_is_overwritten_unasked(tmp_path, dump):
    path, output = dump[0], tmp_path / "out"
    run(path, output)
    before = {p.name: p.read_bytes() for p in output.glob("*.npy")}
    with pytest.raises(CheckpointError, match="resume it, or overwrite it"):
        run(path, output, config(clusters=5))
    assert {p.name: p.read_bytes() for p in output.glob("*.npy")} == before
    with pytest.raises(CheckpointError, match="clusters: 5 here, 20 there"):
        run(path, output, config(clusters=5), resume=True)
    assert run(path, output, config(clusters=5), overwrite=True)["clusters"] == 5


def test_a_finished_run_can_go_on(tmp_path, dump):
    path = dump[0]
    long = run(path, tmp_path / "long", config(passes=7))
    run(path, tmp_path / "short", config(passes=3))
    more = run(path, tmp_path / "short", config(passes=7), resume=True)
    assert more["sha256"] == long["sha256"]
    steady = ("pass", "kind", "rows", "objective", "changed", "empty")
    for a, b in zip(more["passes"], long["passes"], strict=True):
        assert {name: a[name] for name in steady} == {name: b[name] for name in steady}


def test_feature_files_that_changed_are_not_resumed(tmp_path, dump):
    path = dump[0]
    run(path, tmp_path / "out")
    for kind in ("img_emb", "text_emb"):
        file = path / kind / f"{kind}_0000.npy"
        np.save(file, np.load(file)[:-1])
    with pytest.raises(CheckpointError, match="feature files"):
        run(path, tmp_path / "out", resume=True)


@pytest.mark.parametrize("method", ["lloyd", "two-level"])
@pytest.mark.parametrize("kind", ["img_emb", "text_emb"])
def test_other_features_of_the_same_shape_are_not_resumed(tmp_path, dump, kind, method):
    path, output = dump[0], tmp_path / "out"
    settings = config(method=method, joint="concat")
    run(path, output, settings)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    file = path / kind / f"{kind}_0001.npy"
    features = np.load(file)
    np.save(file, features[::-1])
    with pytest.raises(CheckpointError, match=rf"state\.pt: .* other features: {file} has changed"):
        run(path, output, settings, resume=True)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    np.save(file, features)  # written anew, but the same
    run(path, output, settings, resume=True)


@pytest.mark.filterwarnings("error")
def test_when_every_cluster_is_dissolved(tmp_path, dump):
    result = run(dump[0], tmp_path / "out", config(min_size=ROWS + 1))
    assert (result["clusters"], result["rows"]["clustered"]) == (0, 0)
    assert (tmp_path / "out/sizes.png").exists()


def test_no_row_with_both_a_cluster_and_a_class(tmp_path):
    """There is no quality then, and JSON has no NaN."""
    rows = np.zeros((20, 4), np.float32)
    rows[:10] = np.eye(4)[np.arange(10) % 4]
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "true.npy", np.where(rows.any(1), -1, 3))
    result = run(
        tmp_path / "rows.npy", tmp_path / "out", config(clusters=4, joint="image"),
        true_labels=tmp_path / "true.npy",
    )  # fmt: skip
    assert result["quality"] is None
    assert "NaN" not in (tmp_path / "out/clusters.json").read_text()
    summary(result)


def test_an_empty_state_is_not_resumed(tmp_path, dump):
    path, output = dump[0], tmp_path / "out"
    run(path, output)
    (output / "state/state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read: it is empty or cut off"):
        run(path, output, resume=True)


def test_a_full_disk(tmp_path, dump, monkeypatch):
    """The error names the file, and what there was is still whole."""
    path, output = dump[0], tmp_path / "out"
    run(path, output, config(passes=3))
    before = {p.name: p.read_bytes() for p in [*output.glob("*.npy"), *output.glob("state/*.pt")]}

    def full(array, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"state\.pt cannot be written: No space left") as caught:
            run(path, output, config(passes=5), resume=True)
        assert caught.value.errno == errno.ENOSPC
    after = {p.name: p.read_bytes() for p in [*output.glob("*.npy"), *output.glob("state/*.pt")]}
    assert after == before
    assert not list(output.rglob("*.tmp"))
    resumed = run(path, output, config(passes=5), resume=True)
    assert resumed["sha256"] == run(path, tmp_path / "other", config(passes=5))["sha256"]


def test_label_files(tmp_path, dump):
    source = Source(dump[0])
    files = label_files.LabelFiles(tmp_path / "labels")
    files.create(source.shards)
    shard = source.shards[1]
    files.write(shard, 10, np.arange(5))
    whole = np.load(files.path(shard))
    assert whole.dtype == np.int32
    assert whole.tolist() == [-1] * 10 + [0, 1, 2, 3, 4] + [-1] * (shard.rows - 15)
    assert files.read(shard, 9, 12).tolist() == [-1, 0, 1]
    assert files.exist(source.shards)
    files.path(source.shards[0]).unlink()
    assert not files.exist(source.shards)


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "objective.png").mkdir()
    with pytest.raises(OSError, match=r"objective\.png cannot be written: "):
        pictures.draw(tmp_path, np.array([3, 4]), [], None)


def test_overwriting_removes_what_was_written_and_nothing_else(tmp_path, dump):
    path, output = dump[0], tmp_path / "out"
    run(path, output)
    (output / "labels_mine.npy").write_text("mine")
    for kind in ("img_emb", "text_emb"):
        (path / kind / f"{kind}_0002.npy").unlink()
    before = {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}
    with pytest.raises(SourceError, match=r"init: .*no\.npy: cannot be read"):
        run(path, output, config(init=str(tmp_path / "no.npy")), overwrite=True)
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()} == before
    run(path, output, overwrite=True)
    names = {p.name for p in output.glob("labels_*")}
    assert names == {"labels_0000.npy", "labels_0001.npy", "labels_mine.npy"}


def test_a_file_of_an_earlier_run_that_is_read_is_not_removed(tmp_path, dump):
    path, output = dump[0], tmp_path / "out"
    run(path, output)
    for kind in ("img_emb", "text_emb"):
        (path / kind / f"{kind}_0002.npy").unlink()
    rows = Source(path).rows
    labels = output / "labels_0002.npy"  # which this run would not write
    np.save(labels, np.arange(rows) % 5)
    with pytest.raises(ConfigError, match=rf"output: {output} would have {labels} overwritten"):
        run(path, output, overwrite=True, true_labels=labels)
    assert np.load(labels).tolist() == (np.arange(rows) % 5).tolist()


def test_what_is_put_there_after_overwriting_stays(tmp_path, dump):
    path, output = dump[0], tmp_path / "out"
    run(path, output)
    for kind in ("img_emb", "text_emb"):
        (path / kind / f"{kind}_0002.npy").unlink()
    run(path, output, config(passes=2), overwrite=True)
    (output / "labels_0002.npy").write_text("mine")
    run(path, output, config(passes=3), resume=True)
    assert (output / "labels_0002.npy").read_text() == "mine"


def test_an_output_where_links_lead_is_refused(tmp_path, dump):
    (tmp_path / "files").mkdir()
    (tmp_path / "links").mkdir()
    np.save(tmp_path / "files/a.npy", dump[1]["image"])
    (tmp_path / "links/a.npy").symlink_to(tmp_path / "files/a.npy")
    with pytest.raises(ConfigError, match=r"labels would be taken for features, must be another"):
        run(tmp_path / "links", tmp_path / "files", config(joint="image"))
    assert [p.name for p in (tmp_path / "files").iterdir()] == ["a.npy"]


def test_features_that_were_moved_are_resumed(tmp_path, dump, monkeypatch):
    path, output = dump[0], tmp_path / "out"
    run(path, output, config(passes=2))
    path.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    resumed = run("elsewhere", output, config(passes=4), resume=True)
    assert resumed["sha256"] == run("elsewhere", tmp_path / "new", config(passes=4))["sha256"]


def clusters_of_ranks(group, path, output, second):
    settings = config(**second) if dist.get_rank() == 1 else config()
    with pytest.raises(ValueError, match="must be the same on every rank") as caught:
        run(path, output, settings)
    return str(caught.value)


def test_ranks_with_other_settings_all_raise(ranks, tmp_path, dump):
    raised = ranks.run(4, clusters_of_ranks, dump[0], tmp_path / "out", {"clusters": 7})
    message = "clusters must be the same on every rank, got 20 on ranks 0, 2, 3, 7 on rank 1"
    assert raised == [message] * 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["random", "centroids.npy"])
def test_results_stay_until_there_are_new_ones(tmp_path, dump, init):
    """Lists of unlike lengths, of which the header says nothing, are found in a pass only."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, output = dump[0], tmp_path / "out"
    run(path, output, config(clusters=5))
    before = {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}
    rows = [*dump[1]["image"].tolist(), [1.0] * (IMAGE_DIM - 1), [1.0] * (IMAGE_DIM + 1)]
    table = pyarrow.table({"image_embedding": rows})
    parquet.write_table(table, tmp_path / "ragged.parquet", row_group_size=301)
    np.save(tmp_path / "centroids.npy", dump[1]["image"][:5])
    init = str(tmp_path / init) if init.endswith(".npy") else init
    with pytest.raises(SourceError, match=r"ragged\.parquet: .*of one length"):
        run(tmp_path / "ragged.parquet", output, config(clusters=5, init=init), overwrite=True)
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()} == before
    for kind in ("img_emb", "text_emb"):
        (path / kind / f"{kind}_0002.npy").unlink()
    run(path, output, config(clusters=4), overwrite=True)
    assert {p.name for p in output.glob("labels_*")} == {"labels_0000.npy", "labels_0001.npy"}


def test_two_levels_overwrite_what_one_left(tmp_path, dump):
    """In either order: state, labels and centroids are those of a new directory."""
    two = config(clusters=30, method="two-level", coarse=5)
    for number, (first, then) in enumerate([(config(), two), (two, config()), (two, two)]):
        used, new = tmp_path / f"used{number}", tmp_path / f"new{number}"
        run(dump[0], used, first)
        assert (
            run(dump[0], used, then, overwrite=True)["sha256"] == run(dump[0], new, then)["sha256"]
        )
        names = [sorted(str(p.relative_to(path)) for p in path.rglob("*")) for path in (used, new)]
        assert names[0] == names[1]


def test_an_output_among_the_inputs_is_refused(tmp_path, dump):
    path = dump[0]
    (tmp_path / "link").symlink_to(path)
    for output in (
        path, path / "img_emb", path / "img_emb" / "run", tmp_path / "link",
        path / ".." / path.name,
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="must be another directory"):
            run(path, output)
    np.save(tmp_path / "centroids.npy", dump[1]["image"])
    with pytest.raises(ConfigError, match=r"would have .*centroids\.npy overwritten"):
        run(tmp_path / "centroids.npy", tmp_path, overwrite=True)
    np.save(tmp_path / "flat.npy", dump[1]["image"])
    with pytest.raises(ConfigError, match=r"labels would be taken for features, must be another"):
        run(tmp_path / "flat.npy", tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat.npy").rename(tmp_path / "flat" / "flat.npy")
    with pytest.raises(ConfigError, match="must be another directory"):
        run(tmp_path / "flat", tmp_path / "flat" / "img_emb" / "run")
    assert run(path, path / "clusters")["clusters"] == 20
