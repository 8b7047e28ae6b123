"""The nearest centroid on CUDA: its kernels over the emulation, and on a GPU where there is one.

The result is that of the CPU bit for bit, so that is what most tests ask for.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support import backends
from support.clusters import all_labels, config, cosines, gaussian, make_dump, run
from torch import Tensor

from unicom_ext.cli import main as cli
from unicom_ext.cluster import Centroids, UnitSums, engines, nearest, pictures, two_level
from unicom_ext.distributed import launch
from unicom_ext.ops import library
from unicom_ext.utils.settings import ConfigError

CANDIDATES = 64  # room for a row's, csrc/cuda/kernels/nearest.h
CHUNK_ROWS = 16384  # csrc/cuda/host/nearest.cpp


def both_kinds() -> list[AbstractContextManager[None]]:
    """The emulation of a GPU with tensor cores, and of a Hopper, whose kernels are others."""
    return [backends.emulating(compute_capability=capability) for capability in (8, 9)]


@pytest.fixture(params=backends.PARAMS)
def backend(request, monkeypatch):
    """Runs its argument on the CPU's own kernels and on the backend, where that is emulated as
    both kinds of GPUs; checks that all agree."""
    emulated = request.param == "emulated_cuda"

    def on_all(work):
        right = tuple(work())
        for kind in both_kinds() if emulated else [contextlib.nullcontext()]:
            with monkeypatch.context() as patch, kind:
                backends.use(patch, request.param)
                got = tuple(work())
            for a, b in zip(got, right, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        return got

    return on_all


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 1), (1, 2, 2), (7, 3, 2), (5, 16, 129), (129, 257, 7), (193, 64, 130), (130, 900, 64)],
)
def test_awkward_sizes(backend, n, k, d):
    index, score = backend(lambda: nearest(gaussian(n, d, 0), gaussian(k, d, 1)))
    right = cosines(gaussian(n, d, 0), gaussian(k, d, 1)).max(dim=1)
    assert torch.equal(index, right.indices)
    torch.testing.assert_close(score.double(), right.values, rtol=0, atol=1e-7)


def test_more_rows_than_a_chunk(backend):
    rows, centroids = gaussian(CHUNK_ROWS + 1, 2, 0), gaussian(5, 2, 1)
    guess = torch.randint(-1, 5, (len(rows),), generator=torch.Generator().manual_seed(2))
    index, _ = backend(lambda: Centroids(centroids).nearest(rows, guess))
    assert len(index.unique()) == 5


def test_cosines_closer_than_halves_can_tell_apart(backend):
    """All within 1e-3 of each other: rounded rows and centroids get most of them wrong."""
    d = 48
    rows = F.normalize(gaussian(1, d, 0) + 1e-3 * gaussian(200, d, 1))
    centroids = F.normalize(gaussian(1, d, 0) + 1e-3 * gaussian(300, d, 2))
    index, _ = backend(lambda: nearest(rows, centroids))
    right = cosines(rows, centroids).argmax(dim=1)
    assert torch.equal(index, right)
    rounded = (rows.half().double() @ centroids.half().double().T).argmax(dim=1)
    assert (rounded != right).float().mean() > 0.5


def with_norm_one(values: Tensor) -> Tensor:
    """Three more columns, which halves hold but for a part in 2^-20."""
    for _ in range(3):
        left = (1 - values.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
        # In units of what kernels multiply, rounded down.
        down = (left * 8192 * (1 - 2.0**-11)).half().double() / 8192
        values = torch.cat([values, down], dim=1)
    return values


@pytest.mark.parametrize("seed", range(4))
def test_rounding_at_its_worst(backend, seed):
    """One centroid loses .49 of a step in each of 16 values, the other one gains .45 of a step, all
    in the direction of the row: nearly as far off as two scores can be. The first one is nearer."""
    generator = torch.Generator().manual_seed(seed)
    sign = (torch.randint(0, 2, (16,), generator=generator) * 2 - 1).double()
    step = 2.0**-13  # of halves in [1/8, 1/4)
    whole = torch.randint(1100, 1900, (16,), generator=generator) * step
    more = (torch.arange(16) < 15) * step  # a step in 15 of 16 values
    pair = with_norm_one(torch.stack([whole + more - 0.45 * step, whole + 0.49 * step]))
    pair[:, :16] *= sign
    row = F.pad(sign / 4, (0, 3))[None]  # halves hold it
    lead = (pair @ row.T)[:, 0]
    rounded = (pair * 8192).half().double() / 8192 @ row[0]
    assert 0 < lead[1] - lead[0] < 0.02 * step
    assert rounded[0] - rounded[1] > 0.95 * 2 * (0.49 * step * 4)
    centroids = torch.cat([pair, -pair]).float()  # of mean 0
    index, _ = backend(lambda: nearest(row.float(), centroids))
    assert index.item() == 1


def test_sums_that_drop_what_is_small(backend):
    """1024 products below the last digit of the sum so far, which tensor cores may drop, as the
    emulation does; all of them together decide."""
    row = torch.cat([torch.full((3,), 0.5), torch.full((1024,), 2.0**-6)]).double()
    pair = torch.zeros(2, 1027, dtype=torch.float64)
    pair[:, :3] = 0.5
    pair[0, 3] = 2.0**-10
    pair[1, 3:] = 2.0**-19
    pair = with_norm_one(pair)
    row = F.pad(row, (0, 3))[None]
    lead = (pair @ row.T)[:, 0]
    assert lead[1] - lead[0] > 2.0**-17
    assert ((pair * 8192).half().double() / 8192 - pair).norm() < 2.0**-30
    centroids = torch.cat([pair, -pair]).float()  # of mean 0
    index, _ = backend(lambda: nearest(row.float(), centroids))
    assert index.item() == 1


def test_the_first_of_equal_centroids_wins(backend):
    centroids = gaussian(600, 20, 0)
    centroids[[70, 71, 300, 599]] = centroids[6].clone()
    centroids[400:420] = centroids[20:40] * 8  # the same directions
    index, _ = backend(lambda: nearest(gaussian(300, 20, 1), centroids))
    assert not set(index.tolist()) & {70, 71, 300, 599}
    assert backend(lambda: nearest(centroids, centroids))[0].tolist()[70] == 6


@pytest.mark.parametrize("k", [CANDIDATES + 1, 700])
def test_more_candidates_than_there_is_room_for(backend, k):
    """All centroids are the same but for two, which rounding cannot tell from the others."""
    centroids = gaussian(1, 16, 1).repeat(k, 1)
    centroids[k // 2] += 1e-7 * gaussian(1, 16, 2)[0]
    centroids[k - 1] -= 1e-7 * gaussian(1, 16, 2)[0]
    index, _ = backend(lambda: nearest(gaussian(9, 16, 3), centroids))
    assert len(index.unique()) > 1


def test_candidates_that_come_in_the_order_of_their_scores(backend):
    """Each tile has some better ones: lists fill up, and what is no longer near leaves them."""
    angle = torch.linspace(0, 1.5, 4000)
    centroids = torch.stack([angle.cos(), angle.sin()], dim=1)
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    index, _ = backend(lambda: nearest(rows, centroids))
    assert index.tolist()[:2] == [3999, 0]
    assert index[3] == 0


def test_all_cosines_negative(backend):
    """Padding of the last tile has product 0 and must not win."""
    index, score = backend(lambda: nearest(gaussian(40, 6, 1).abs(), -gaussian(17, 6, 0).abs()))
    assert index.max() < 17
    assert score.max() < 0


def test_rows_without_direction(backend):
    rows = gaussian(9, 5, 0)
    rows[2], rows[4, 1], rows[6, 0] = 0, math.nan, -math.inf
    index, score = backend(lambda: nearest(rows, gaussian(20, 5, 1)))
    assert index[[2, 4, 6]].tolist() == [-1, -1, -1]
    assert score[2] == 0
    assert score[[4, 6]].isnan().all()
    assert (index[[0, 1, 3, 5, 7, 8]] >= 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 3e37])
def test_norms_at_the_ends_of_fp32(backend, scale):
    rows, centroids = gaussian(50, 12, 0), gaussian(40, 12, 1)
    index, _ = backend(lambda: nearest(rows, centroids))
    assert torch.equal(backend(lambda: nearest(rows * scale, centroids))[0], index)
    assert torch.equal(backend(lambda: nearest(rows, centroids * scale))[0], index)


def test_a_zero_centroid_has_cosine_zero(backend):
    centroids = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    index, score = backend(lambda: nearest(torch.tensor([[1.0, 0.5], [-1.0, 3.0]]), centroids))
    assert index.tolist() == [1, 0]
    assert score[0] == 0


def test_what_is_left_of_the_mean_is_denormal(backend):
    centroids = torch.tensor([[1.0, 1e-40], [1.0, 1.2e-40], [1.0, 0.0]])
    rows = torch.tensor([[1.0, 1e-40], [1.0, -1e-40], [2.0, 0.0], [0.0, 1e-45]])
    for k in (1, 2, 3):
        index, _ = backend(lambda k=k: nearest(rows, centroids[:k]))
        assert index[:3].tolist() == [0, 0, 0]  # the same cosine, in double


def test_no_guess_changes_the_result(backend):
    rows, centroids = gaussian(150, 24, 0), gaussian(170, 24, 1)
    rows[5], rows[6, 3], rows[7] = 0, math.nan, rows[8]
    centroids[90:] = centroids[:80]  # the first of equals wins, even where another was guessed
    index, score = backend(lambda: nearest(rows, centroids))
    twin = torch.where((index >= 0) & (index < 80), index + 90, index)
    random = torch.randint(-1, 170, (150,), generator=torch.Generator().manual_seed(2))
    for guess in (index, twin, random, torch.zeros_like(index), torch.full_like(index, 169)):
        again = backend(lambda guess=guess: Centroids(centroids).nearest(rows, guess))
        assert torch.equal(again[0], index)
        assert torch.equal(again[1].nan_to_num(7), score.nan_to_num(7))


@pytest.mark.emulated
@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 70),
    st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_any_problem(n, k, d, spread, unevenly, seed):
    centre = gaussian(1, d, seed)
    if unevenly:  # most of a row is nothing beside its largest value, and yet decides
        power = torch.randint(-30, 2, (1, d), generator=torch.Generator().manual_seed(seed))
        centre *= 10.0**power
    rows = centre + spread * gaussian(n, d, seed + 1) * centre.abs()
    centroids = centre + spread * gaussian(k, d, seed + 2) * centre.abs()
    right = nearest(rows, centroids)
    for kind in both_kinds():
        with kind:
            index, score = on_emulation(rows, centroids)
        assert torch.equal(index, right[0])
        assert torch.equal(score.nan_to_num(7), right[1].nan_to_num(7))


def on_emulation(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        backends.use(patch, "emulated_cuda")
        return nearest(rows, centroids)


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (300, 13, 7), (77, 200, 300)])
def test_sums_of_unit_rows(backend, n, k, d):
    rows = gaussian(n, d, 0) * torch.logspace(-30, 30, n)[:, None]
    rows[n // 2] = 0
    rows[n // 3, 0] = math.nan
    generator = torch.Generator().manual_seed(1)
    before, index = torch.randint(-1, k, (2, n), generator=generator)

    def moved():
        sums = UnitSums(k, d, rows=n)
        sums.add(rows[:20], before[:20])
        sums.add(rows[20:], before[20:])
        sums.add(rows, index, before)
        return sums.values, sums.counts, sums.directions()

    backend(moved)


# ---- bad input -----------------------------------------------------------------------------------


def test_indices_out_of_range_are_passed_over(emulated):
    """The host does not wait to see them."""
    rows, centroids = gaussian(4, 3, 0), gaussian(5, 3, 1)
    index, _ = Centroids(centroids).nearest(rows, torch.tensor([5, -7, 2**40, 0]))
    assert torch.equal(index, nearest(rows, centroids)[0])
    sums = UnitSums(2, 3, rows=4)
    sums.add(rows, torch.tensor([2, -5, 1, 2**40]), torch.tensor([-(2**40), 3, 2, 2]))
    assert sums.counts.tolist() == [0, 1]
    torch.testing.assert_close(sums.directions()[1], F.normalize(rows[2], dim=0))
    assert not sums.values[0].any()


@pytest.mark.parametrize(
    ("rows", "centroids", "guess", "words"),
    [
        (torch.zeros(3, 4), torch.ones(2, 5), None, "centroids must be .k, 4. like the rows"),
        (torch.zeros(3, 4), torch.ones(0, 4), None, "centroids must have from 1 to"),
        (torch.zeros(3, 4), torch.ones(2, 4), torch.zeros(2).long(), "guess must be Long of shape"),
        (torch.zeros(3, 4), torch.ones(2, 4), torch.zeros(3), "guess must be Long of shape"),
    ],
)
def test_bad_input(emulated, rows, centroids, guess, words):
    with pytest.raises(ValueError, match=words):
        Centroids(centroids).nearest(rows, guess)


# ---- whole clusterings ---------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])
    make_dump(tmp_path / "dump")
    return tmp_path / "dump"


@pytest.mark.parametrize(
    "options",
    [
        {"early_passes": 1, "early_fraction": 0.5, "min_size": 20, "merge_above": 0.9},
        {"method": "minibatch", "batch_rows": 200},
        {"method": "two-level", "coarse": 3, "init": "random", "refine_passes": 1},
    ],
    ids=["lloyd", "minibatch", "two-level"],
)
def test_a_clustering_is_that_of_the_cpu(features, tmp_path, backend, options):
    made = []

    def cluster():
        output = tmp_path / f"run-{len(made)}"
        made.append(output)
        result = run(features, output, config(joint="concat", passes=3, **options))
        labels, centroids = all_labels(output), np.load(output / "centroids.npy")
        facts = (result["objective"], *(p["objective"] for p in result["passes"]))
        return map(torch.as_tensor, (labels, centroids, facts))

    backend(cluster)


@pytest.mark.emulated
def test_a_clustering_goes_on_on_another_device(features, tmp_path, monkeypatch):
    run(features, tmp_path / "whole", config(passes=4))
    run(features, tmp_path / "parts", config(passes=2))
    with monkeypatch.context() as patch:
        backends.use(patch, "emulated_cuda")
        run(features, tmp_path / "parts", config(passes=4, device="cpu"), resume=True)
    assert np.array_equal(all_labels(tmp_path / "whole"), all_labels(tmp_path / "parts"))


def test_two_level_search(backend):
    def search():
        found = two_level.TwoLevel(
            gaussian(2, 8, 1), gaussian(9, 8, 2), torch.tensor([0, 4, 9]), Centroids
        )
        rows = gaussian(50, 8, 0)
        index, score = found.nearest(rows)
        return index, score, *found.nearest(rows, index.where(index > 4, -1))

    backend(search)


# ---- where to work -------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as anybody asks."""
    monkeypatch.setattr(library, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_of_a_machine_has_its_gpu(gpus, monkeypatch, device):
    assert engines.device_of(config(device=device)) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert engines.device_of(config(device=device)) == torch.device("cuda", 1)
    assert engines.device_of(config(device="cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_the_command_joins_with_what_it_works_on(gpus, monkeypatch, features, tmp_path, device):
    joined = []

    class Joined(Exception):
        pass

    def join(device):
        joined.append(device)
        raise Joined

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(launch, "joined", join)
    command = ["cluster", features, "--output", tmp_path / "out", "--clusters=2"]
    call = CliRunner().invoke(cli.main, [*map(str, command), f"--device={device}"])
    assert isinstance(call.exception, Joined)
    assert joined == [torch.device("cpu") if device == "cpu" else torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("spoil", "settings", "words"),
    [
        (lambda patch: patch.setattr(library, "HAS_CUDA", False), {}, "built without CUDA"),
        (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), {}, "no GPU"),
        (
            lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5)),
            {},
            "7.5, needed is 8.0",
        ),
        (lambda patch: None, {"engine": "faiss"}, "engine faiss"),
    ],
)
def test_a_gpu_that_cannot_be_used(gpus, monkeypatch, tmp_path, features, spoil, settings, words):
    spoil(monkeypatch)
    assert engines.device_of(config(device="auto", **settings)) == torch.device("cpu")
    # Processes join all the same, and say together what is wrong.
    assert engines.usable_device(config(device="cuda", **settings)) == torch.device("cpu")
    with pytest.raises(ConfigError, match=f"device: cuda cannot be used: .*{words}"):
        run(features, tmp_path / "output", config(device="cuda", **settings))
    assert not (tmp_path / "output").exists()
