"""The several nearest clusters of each row: the search against float64, and the files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.clusters import ROWS, SIZES, all_labels, config, cosines, gaussian, make_dump, run
from torch.utils._python_dispatch import TorchDispatchMode

from unicom_ext.cluster import nearest, pictures, positives
from unicom_ext.cluster.positives import Several
from unicom_ext.cluster.results import summary
from unicom_ext.data.source import Source
from unicom_ext.utils.settings import ConfigError


def reference(rows, centroids, first, count):
    """By all cosines in double: `first`, then the others, the lower number of equals first."""
    # Not a matrix product, which adds up in another order at its edges.
    rows, centroids = (F.normalize(x.double(), eps=1e-300) for x in (rows, centroids))
    cosine = (rows[:, None] * centroids).sum(dim=2)
    cosine.scatter_(1, first[:, None], torch.inf)
    return cosine.sort(dim=1, descending=True, stable=True).indices[:, :count]


def check(rows, centroids, count):
    """Right but for the order of cosines that differ by the rounding of double."""
    first = nearest(rows, centroids)[0]
    found = Several(centroids, count).nearest(rows, first)
    assert found.shape == (len(rows), count)
    assert torch.equal(found[:, 0], first)
    assert all(len(set(row)) == count for row in found.tolist())
    cosine = cosines(rows, centroids)
    right = cosine.gather(1, reference(rows, centroids, first, count))
    torch.testing.assert_close(cosine.gather(1, found), right, rtol=0, atol=1e-14)
    return found


# ---- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "d", "count"),
    [(1, 1, 1, 1), (7, 3, 2, 3), (5, 16, 129, 2), (193, 64, 130, 10), (50, 300, 64, 299)],
)
def test_awkward_sizes(n, k, d, count):
    check(gaussian(n, d, 0), gaussian(k, d, 1), count)


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 20),
    st.sampled_from([0.0, 1e-8, 1e-6, 1e-4, 1.0]),
    st.integers(0, 2**20),
    st.data(),
)
def test_any_problem(n, k, d, spread, seed, data):
    """Of spread 1e-6 float32 can hardly tell one from another; of 0 all are equal."""
    centre = gaussian(1, d, seed)
    rows = centre + spread * gaussian(n, d, seed + 1)
    found = check(
        rows,
        centroids := centre + spread * gaussian(k, d, seed + 2),
        count := data.draw(st.integers(1, k)),
    )
    if spread == 0:
        assert torch.equal(found, reference(rows, centroids, found[:, 0], count))


def test_blocks_change_nothing(monkeypatch):
    """Nor what is in a block with a row, so that ranks with other shares find the same."""
    rows, centroids = gaussian(90, 12, 0), gaussian(200, 12, 1)
    centroids[150:] = centroids[50:100] * 4  # the very same directions
    first = nearest(rows, centroids)[0]
    whole = Several(centroids, 9).nearest(rows, first)
    assert torch.equal(whole, reference(rows, centroids, first, 9))
    monkeypatch.setattr(positives, "CENTROIDS", 7)
    monkeypatch.setattr(positives, "BLOCK_BYTES", 4000)
    assert torch.equal(Several(centroids, 9).nearest(rows, first), whole)
    assert torch.equal(Several(centroids, 9).nearest(rows[31:], first[31:]), whole[31:])


def test_more_equals_than_candidates():
    """Candidates are a choice among equals, which float32 cannot tell from what is nearer."""
    equal = gaussian(1, 16, 2)
    rows = equal + gaussian(20, 16, 0)
    centroids = torch.cat([equal.expand(70, 16), gaussian(30, 16, 1)])
    first = nearest(rows, centroids)[0]
    found = Several(centroids, 5).nearest(rows, first)
    assert torch.equal(found, reference(rows, centroids, first, 5))
    near = found == torch.arange(5)
    assert near.all(dim=1).any()  # the case occurs


def test_what_a_row_is_assigned_to_comes_first():
    """Also the farthest, as where two levels have missed the nearest."""
    rows, centroids = gaussian(30, 8, 0), gaussian(60, 8, 1)
    for rank in (1, 3, 4, 59):
        first = cosines(rows, centroids).argsort(dim=1, descending=True)[:, rank]
        found = Several(centroids, 4).nearest(rows, first)
        assert torch.equal(found, reference(rows, centroids, first, 4))


def test_norms_and_zero_centroids():
    rows, centroids = gaussian(40, 6, 0), gaussian(50, 6, 1)
    centroids[7] = 0  # at 90 degrees to everything
    found = check(rows, centroids, 50)
    scale = 10.0 ** torch.linspace(-30, 30, 50)[:, None]
    scaled = check(rows * 1e25, centroids.double().mul(scale).float(), 50)
    assert (scaled == found).float().mean() > 0.99  # scaling rounds
    empty = Several(centroids, 3).nearest(rows[:0], torch.empty(0, dtype=torch.int64))
    assert empty.shape == (0, 3)


@pytest.mark.parametrize("name", ["mkldnn", "cuda"])
def test_coarse_products_of_float32_are_not_used(name):
    backend = getattr(torch.backends, name).matmul
    rows = F.normalize(gaussian(1, 64, 0)) + 1e-3 * gaussian(64, 64, 1)
    centroids = F.normalize(gaussian(1, 64, 0)) + 1e-3 * gaussian(300, 64, 2)
    first = nearest(rows, centroids)[0]
    assert Several(centroids, 4)._units.dtype == torch.float32
    before = backend.fp32_precision
    try:
        backend.fp32_precision = {"mkldnn": "bf16", "cuda": "tf32"}[name]
        several = Several(centroids, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = several.nearest(rows, first)
    finally:
        backend.fp32_precision = before
    assert several._units.dtype == torch.float64
    assert torch.equal(found, reference(rows, centroids, first, 4))


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return result


def test_no_matrix_of_all_cosines(monkeypatch):
    monkeypatch.setattr(positives, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(positives, "CENTROIDS", 256)
    rows, centroids = gaussian(2000, 8, 0), gaussian(1000, 8, 1)
    centroids[500:] = centroids[0]  # equals are searched among all
    first = nearest(rows, centroids)[0]
    several = Several(centroids, 4)
    with Largest() as largest:
        several.nearest(rows, first)
    assert 256 < largest.numbers <= 1 << 14  # not 2,000,000


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def dump(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])
    make_dump(tmp_path / "dump")
    return tmp_path / "dump"


def all_positives(output):
    return np.concatenate([np.load(output / f"positives_{name}.npy") for name in SIZES])


def files(output):
    return {p.name: p.read_bytes() for p in output.glob("*.npy")}


def right_positives(path, output, count):
    """Of the centroids that were written, for the rows that have a label."""
    labels = torch.from_numpy(all_labels(output)).long()
    good = labels >= 0
    centroids = torch.from_numpy(np.load(output / "centroids.npy"))
    rows = Source(path).take(np.arange(ROWS))
    count_found = min(count, len(centroids))
    right = torch.full((ROWS, count), -1)
    right[good, :count_found] = reference(rows[good], centroids, labels[good], count_found)
    return right.numpy()


def test_what_is_written(tmp_path, dump):
    one = run(dump, tmp_path / "one")
    result = run(dump, tmp_path / "six", config(positives=6))
    found = all_positives(tmp_path / "six")
    assert (found.dtype, found.shape) == (np.int32, (ROWS, 6))
    assert np.array_equal(found, right_positives(dump, tmp_path / "six", 6))
    # Everything else is as without them.
    names = {f"positives_{name}.npy" for name in SIZES}
    others = {n: b for n, b in files(tmp_path / "six").items() if n not in names}
    assert others == files(tmp_path / "one")
    assert set(result["sha256"]) - set(one["sha256"]) == names
    for name in names:
        data = (tmp_path / "six" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == result["sha256"][name]
    assert result["positives_seconds"] > 0
    assert one["positives_seconds"] is None
    assert json.loads((tmp_path / "six" / "clusters.json").read_text()) == result
    assert "the 6 nearest clusters of each row: positives_*.npy" in summary(result)
    assert not any("positives" in line for line in summary(one))
    assert not (tmp_path / "six" / "state" / "positives").exists()


def test_a_finished_run_gets_and_loses_them(tmp_path, dump):
    output = tmp_path / "out"
    run(dump, output)
    before = files(output)
    run(dump, output, config(positives=3), resume=True)
    assert all_positives(output).shape == (ROWS, 3)
    run(dump, output, config(positives=20), resume=True)
    assert np.array_equal(np.sort(all_positives(output)), np.tile(np.arange(20), (ROWS, 1)))
    assert np.array_equal(all_positives(output), right_positives(dump, output, 20))
    run(dump, output, config(), resume=True)
    assert files(output) == before
    run(dump, output, config(positives=2), overwrite=True)
    run(dump, output, config(), overwrite=True)
    assert files(output) == before


def test_a_state_of_before_goes_on(tmp_path, dump):
    output = tmp_path / "out"
    run(dump, output, config(passes=2))
    state = torch.load(output / "state" / "state.pt", weights_only=True)
    del state["config"]["positives"]
    torch.save(state, output / "state" / "state.pt")
    run(dump, output, config(passes=4, positives=3), resume=True)
    run(dump, tmp_path / "new", config(passes=4, positives=3))
    assert files(output) == files(tmp_path / "new")


def test_results_stay_until_positives_are_there(tmp_path, dump, monkeypatch):
    output = tmp_path / "out"
    run(dump, output, config(passes=2, positives=3))
    before = files(output)
    search, calls = Several.nearest, []

    def fails(self, rows, first):
        calls.append(len(rows))
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return search(self, rows, first)

    with monkeypatch.context() as patch:
        patch.setattr(Several, "nearest", fails)
        with pytest.raises(OSError, match="Input/output error"):
            run(dump, output, config(passes=4, positives=5), resume=True)
    assert files(output) == before
    run(dump, output, config(passes=4, positives=5), resume=True)
    assert np.array_equal(all_positives(output), right_positives(dump, output, 5))


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_above": 0.8},
        {"min_size": 29},
        {"min_cosine": 0.93, "merge_above": 0.9},
        {"method": "two-level", "coarse": 4},
        {"method": "minibatch", "batch_rows": 100},
    ],
    ids=str,
)
def test_they_are_of_the_centroids_that_are_written(tmp_path, dump, settings):
    run(dump, tmp_path / "out", config(positives=5, **settings))
    found, labels = all_positives(tmp_path / "out"), all_labels(tmp_path / "out")
    assert np.array_equal(found, right_positives(dump, tmp_path / "out", 5))
    assert np.array_equal(found[:, 0], labels)
    assert len(np.load(tmp_path / "out" / "centroids.npy")) < 20 or "method" in settings
    assert (found[labels < 0] == -1).all()


def test_fewer_clusters_than_positives_are_left(tmp_path, dump):
    image = dump / "img_emb" / "img_emb_0001.npy"
    rows = np.load(image)
    rows[3], rows[5, 2] = 0, np.nan
    np.save(image, rows)
    result = run(dump, tmp_path / "out", config(positives=20, min_size=40))
    left = result["clusters"]
    assert 0 < left < 20
    found = all_positives(tmp_path / "out")
    assert np.array_equal(found, right_positives(dump, tmp_path / "out", 20))
    assert (found[:, left:] == -1).all()
    assert (found[[303, 305]] == -1).all()
    run(dump, tmp_path / "none", config(positives=2, min_size=ROWS + 1))
    assert (all_positives(tmp_path / "none") == -1).all()


def test_more_positives_than_clusters_are_refused(tmp_path, dump):
    with pytest.raises(ConfigError) as caught:
        run(dump, tmp_path / "out", config(positives=21))
    assert str(caught.value) == "positives: got 21, must be from 1 to clusters = 20"
    with pytest.raises(ConfigError, match="positives: got 0, must be a whole number >= 1"):
        config(positives=0)
    assert not (tmp_path / "out").exists()


def on_ranks(group, path, output):
    pictures.draw = lambda *arguments: []
    return run(path, output, config(positives=4, passes=2))["clusters"]


def test_ranks_write_what_one_process_does(ranks, tmp_path, dump):
    assert ranks.run(4, on_ranks, dump, tmp_path / "four") == [20] * 4
    on_ranks(None, dump, tmp_path / "one")
    assert np.array_equal(all_positives(tmp_path / "four"), all_positives(tmp_path / "one"))
