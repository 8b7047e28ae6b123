"""The peers of the benchmarks compute the same loss; a benchmark writes its figures."""

from __future__ import annotations

import io
import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace

import cluster_stream
import clustering
import clustering_peers
import head_step
import measure
import noisy_labels
import numpy as np
import parts
import pytest
import scaling_model
import sweep
import tables
import torch
import torch.nn.functional as F
from candidates import CANDIDATES, Problem, Shape, Unavailable
from click.testing import CliRunner
from partial_fc import CompiledPartialFC, PartialFC
from rich.console import Console
from support.problems import random_problem, relative_error, truth
from support.processes import CONTEXT
from support.training import DATA, TINY

from unicom_ext import PartialMarginSoftmax
from unicom_ext.margins import ArcFace
from unicom_ext.optim import RowAdamW


@pytest.fixture
def uncompiled(monkeypatch):
    """`CompiledPartialFC` with its arithmetic run eagerly: what it computes, without waiting."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


PEER_MODULES = pytest.mark.parametrize(
    ("kind", "options"),
    [(PartialFC, {}), (PartialFC, {"whole_matrix": True}), (CompiledPartialFC, {})],
    ids=["eager", "whole-matrix", "compiled"],
)


def check_against_reference(kind, options, *, dtype, closeness, bound):
    for sampled, features, margin in [(40, 12, 0.3), (None, None, 0.5), (40, None, 0.0)]:
        problem = random_problem(
            24, 90, 17, seed=3, sampled=sampled, features=features, closeness=closeness,
            dtype=dtype, margin=ArcFace(margin), scale=20.0,
        )  # fmt: skip
        right = truth(problem)  # straight-through, as the peer
        module = kind(17, 90, margin=margin, scale=20.0, **options)
        module.weight = torch.nn.Parameter(problem.prototypes.clone())
        x, labels = problem.embeddings.clone().requires_grad_(), problem.labels.clone()
        given = [problem.options.get(key) for key in ("class_index", "feature_index")]
        loss = module(x, labels, *given)
        loss.backward()
        assert torch.equal(labels, problem.labels)
        for theirs, truly in zip((loss, x.grad, module.weight.grad), right, strict=True):
            assert theirs.shape == truly.shape
            assert relative_error(theirs.detach(), truly) < bound


@PEER_MODULES
@pytest.mark.parametrize("closeness", [0.0, 1.0, 3.0])
def test_partial_fc_is_the_reference(kind, options, closeness, uncompiled):
    check_against_reference(kind, options, dtype=torch.float64, closeness=closeness, bound=1e-12)


@PEER_MODULES
def test_partial_fc_in_float32(kind, options, uncompiled):
    # Not close to convergence: there the logarithm of a probability near 1 loses digits.
    check_against_reference(kind, options, dtype=torch.float32, closeness=0.0, bound=1e-5)


def test_partial_fc_samples_what_it_says():
    torch.manual_seed(0)
    module = PartialFC(20, 300, sample_rate=0.1, feature_rate=0.5)
    labels = torch.tensor([7, 299, 7, 0, 150])
    drawn = [module.sample_classes(labels.view(-1, 1)) for _ in range(20)]
    for index in drawn:
        assert len(index) == 30
        assert torch.equal(index, index.unique())
        assert torch.isin(labels, index).all()
    assert len(torch.cat(drawn).unique()) > 150  # random, and from the whole range
    features = module.sample_features()
    assert len(features) == 10
    assert torch.equal(features, features.unique())

    many = torch.arange(0, 300, 5)  # more positives than places
    assert torch.equal(module.sample_classes(many.view(-1, 1)), many)

    x = torch.randn(5, 20, requires_grad=True)
    module(x, labels).backward()
    assert ((x.grad != 0).sum(dim=1) == 10).all()
    assert (module.weight.grad != 0).any(dim=1).sum() == 30
    assert ((module.weight.grad != 0).any(dim=0)).sum() == 10


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_candidates_do_the_work_that_is_timed(candidate, uncompiled):
    shape = Shape(500, 16, 24, sample_rate=0.2, feature_rate=0.5)
    problem = Problem(shape)
    head = candidate.build(problem)
    before = None if candidate.name == "gemm" else head.module.weight.detach().clone()
    head.forward()
    head.backward()
    if candidate.name == "gemm":
        torch.testing.assert_close(head.x, F.normalize(problem.embeddings[:, :12]).detach())
        assert head.w.shape == (100, 12)
        torch.testing.assert_close(head.logits, head.x @ head.w.T)
        torch.testing.assert_close(head.grad_x, head.logits @ head.w)
        torch.testing.assert_close(head.grad_w, head.logits.T @ head.x)
        return
    # What the head moves: sampled rows in the sampled dimensions, and moments and decay elsewhere.
    assert problem.embeddings.grad.abs().sum() > 0
    gradient = head.module.weight.grad
    if candidate.name in ("ours-fp32", "ours-bf16"):
        assert gradient is None  # the update has happened already
    else:
        gradient = gradient.to_dense()
        rows = gradient.abs().sum(dim=1) != 0
        assert 100 <= rows.sum() <= 116
        assert rows[problem.labels].all()
        assert (gradient.abs().sum(dim=0) != 0).sum() == 12
    head.update()
    # So small a learning rate does not show in every row, but no row moves that was not sampled.
    moved = (head.module.weight.detach() != before).any(dim=1)
    assert moved[problem.labels].any()
    assert moved.sum() <= 116
    assert head.module.weight.grad is None
    assert problem.embeddings.grad is None


def test_ratios_are_formed_within_a_round():
    ours = {"forward": [1.0, 10.0], "backward": [1.0, 10.0], "optimizer": [2.0, 20.0]}
    peer = {"forward": [2.0, 20.0], "backward": [4.0, 40.0], "optimizer": [2.0, 20.0]}
    result = measure.ratios(ours, peer)
    assert {span: r["pairs"] for span, r in result.items()} == {
        "forward": [2.0, 2.0],
        "backward": [4.0, 4.0],
        "forward+backward": [3.0, 3.0],
        "step": [2.0, 2.0],
    }


def test_a_run_writes_json_and_markdown(tmp_path, set_threads):
    set_threads(1)
    arguments = ["--classes", "2000", "--batch", "16", "--dim", "32", "--feature-rate", "0.5"]
    arguments += ["--sample-rate", "0.1", "--rounds", "3", "--threads", "1", "--no-memory"]
    arguments += ["--peers", "partialfc,published,gemm", "--output", str(tmp_path)]
    run = CliRunner().invoke(head_step.main, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "PartialFC v2" in run.output

    name = "c2000-b16-d32-r0.1-f0.5"
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["shape"]["num_sampled"] == 200
    assert result["shape"]["num_features"] == 16
    assert result["machine"]["torch"] == torch.__version__
    assert [c["name"] for c in result["candidates"]] == [
        "ours-fp32", "ours-bf16", "ours-stored", "ours-dense", "partialfc", "published", "gemm",
    ]  # fmt: skip
    for candidate in result["candidates"]:
        assert candidate["skipped"] is None
        for phase in measure.PHASES:
            assert len(candidate["seconds"][phase]) == 3
            assert min(candidate["seconds"][phase]) >= 0
        step = candidate["summary"]["step"]
        assert 0 < step["min"] <= step["median"] <= step["max"]
    assert set(result["ratios"]) == {"ours-fp32", "ours-bf16", "ours-stored", "ours-dense"}
    assert set(result["ratios"]["ours-fp32"]) == {"partialfc", "published", "gemm"}
    assert len(result["ratios"]["ours-fp32"]["gemm"]["forward"]["pairs"]) == 3

    text = (tmp_path / f"{name}.md").read_text()
    assert text == tables.markdown(result)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (6, 7)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_counts_the_gradient_and_the_logits(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: CONTEXT)
    shape = Shape(20_000, 256, 64, sample_rate=0.5, feature_rate=1.0)
    logits = 256 * shape.num_sampled * 4
    memory = measure.peak_memory(shape, "partialfc", 1)
    assert isinstance(memory, dict), memory
    assert memory["forward+backward"] > shape.weight_bytes + 2 * logits
    assert memory["forward+backward"] <= memory["step"] < shape.weight_bytes + 20 * logits


def test_a_skipped_candidate_is_visible(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["--classes", "200", "--batch", "4", "--dim", "8", "--rounds", "1", "--no-memory"]
    arguments += ["--peers", "compile,partialfc", "--threads", "1", "--output", str(tmp_path)]
    run = CliRunner().invoke(head_step.main, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "SKIPPED PartialFC v2 compiled" in run.output
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    skipped = next(c for c in result["candidates"] if c["name"] == "compile")
    assert "no-such-compiler" in skipped["skipped"]
    assert "SKIPPED" in written.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "partialfc,cublas"], "'cublas' is not one of"),
        (["--dim", "1", "--feature-rate", "0.1"], "feature_rate must give at least one dimension"),
        (["--sample-rate", "0"], "0<x<=1"),
        (["--rounds", "0"], "x>=1"),
    ],
)
def test_bad_options(arguments, message, tmp_path):
    output = tmp_path / "results"
    run = CliRunner().invoke(head_step.main, [*arguments, "--output", str(output)])
    assert run.exit_code == 2
    assert message in run.output
    assert not output.exists()


SMALL = {
    "selection": lambda: [parts.selection(3000, 0.1, batch=8)],
    "pack": lambda: [parts.pack(500, 0.1, 24, 12)],
    "optimizer": lambda: [parts.optimizer(500, 0.1, 24)],
    "forward": lambda: list(parts.products(8, 200, 24, backward=False)),
    "backward": lambda: list(parts.products(8, 200, 24, backward=True)),
    "full": lambda: [parts.full_softmax(8, 200, 24)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", parts.KINDS)
def test_parts_write_json_and_markdown(kind, tmp_path, monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setattr(parts, "parts", lambda quick, kinds: SMALL[kinds[0]]())
    arguments = ["--only", kind, "--rounds", "2", "--output", str(tmp_path)]
    run = CliRunner().invoke(parts.main, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    written = sorted(tmp_path.glob("parts-*.json"))
    assert len(written) == (2 if kind in ("forward", "backward") else 1)
    text = (tmp_path / "parts.md").read_text()
    for path in written:
        result = json.loads(path.read_text())
        assert len(result["seconds"]) >= 2
        assert len(result["ratios"]) == len(result["seconds"]) - 1
        assert result["title"] in text
        assert all(len(times) == 2 and min(times) > 0 for times in result["seconds"].values())


def test_contestants_of_the_full_softmax_do_the_same_work():
    part = parts.full_softmax(16, 50, 24)
    assert "unicom_ext fp32" in part.contestants
    # Without a margin all of them are one loss.
    weight = torch.nn.Parameter(torch.randn(50, 24))
    x, labels = torch.randn(16, 24), torch.randint(50, (16,))
    ours = parts._loss(weight)
    ours.margin = ArcFace(0.0)
    expected = ours(x, labels)
    if hasattr(F, "linear_cross_entropy"):
        unit = 64.0 * F.normalize(x), F.normalize(weight)
        torch.testing.assert_close(F.linear_cross_entropy(*unit, labels), expected)
    try:
        peer = parts._metric_learning(weight)
    except Unavailable:
        return
    torch.testing.assert_close(peer(x, labels), parts._loss(weight)(x, labels), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, set_threads):
    set_threads(1)
    shapes = {b: Shape(300, b, 24, sample_rate=0.2, feature_rate=0.5) for b in (4, 8)}
    monkeypatch.setitem(sweep.AXES, "batch", ("batch B", shapes))
    for values in ("4", "8"):
        arguments = ["--axis", "batch", "--rounds", "2", "--values", values]
        run = CliRunner().invoke(
            sweep.main, [*arguments, "--output", str(tmp_path)], catch_exceptions=False
        )
        assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "sweep-batch.json").read_text())
    assert [point["value"] for point in result["points"]] == [4, 8]
    assert [point["result"]["shape"]["batch"] for point in result["points"]] == [4, 8]
    assert (tmp_path / "sweep-batch.md").read_text() == tables.sweep_markdown(result)
    assert (tmp_path / "sweep-batch.png").stat().st_size > 10_000
    run = CliRunner().invoke(sweep.main, ["--axis", "batch", "--values", "5"])
    assert run.exit_code == 2
    assert "5 not among 4, 8" in run.output


@pytest.mark.parametrize(
    ("kind", "cone", "leading"), [("clip", 0.45, 0.47), ("centres", 0.02, 0.4), ("noise", 0, 0.25)]
)
def test_rows_of_each_kind(tmp_path, monkeypatch, kind, cone, leading):
    monkeypatch.setattr(clustering, "SHARD_ROWS", 3000)
    clustering.make_rows(tmp_path, kind, 5000, 32, 50)
    shards = [np.load(tmp_path / f"rows_000{i}.npy") for i in range(2)]
    assert [len(shard) for shard in shards] == [3000, 2000]
    rows = np.concatenate(shards)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6
    mean = rows.mean(0)
    assert np.square(mean).sum() == pytest.approx(cone, abs=0.03)
    variances = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    # What eight of 32 axes have of the variance.
    assert variances[:8].sum() / variances.sum() == pytest.approx(leading, abs=0.06)
    init = np.load(tmp_path / "init" / "init.npy")
    assert init.shape == (50, 32)
    assert {row.tobytes() for row in init} <= {row.tobytes() for row in rows}


def clustering_run(seconds, objective=0.5, pass_seconds=(1.0, 2.0), **more):
    return {
        "seconds": seconds, "process_seconds": seconds + 1, "stages": {"k-means": seconds - 1},
        "pass_seconds": list(pass_seconds), "objective": objective, "peak_bytes": 2**30, **more,
    }  # fmt: skip


def test_clustering_compares_within_a_round(tmp_path):
    result = {
        "kind": "clip", "rows": 1000, "dim": 10, "clusters": 100, "passes": 2,
        "runs": {
            "ours-lloyd": [
                clustering_run(2.0, products=[1.0, 0.2]), clustering_run(4.0, products=[1.0, 0.4])
            ],
            "faiss": [clustering_run(6.0, objective=0.49), clustering_run(20.0, objective=0.49)],
            "ours-two-level": [clustering_run(3.0, pass_seconds=())] * 2,
            "superkmeans-default": [clustering_run(6.0, pass_seconds=())] * 2,
        },
    }  # fmt: skip
    flat, two_level, stages = clustering.tables(result)
    ours, peer = flat.rows
    assert ours[:3] == ["ours-lloyd", "3.00 (2.00 to 4.00)", "1.00 (1.00 to 1.00)"]
    assert ours[3:5] == ["1.50 (1.50 to 1.50)", "65.0 %"]
    assert peer[2] == "4.00 (3.00 to 5.00)"  # not 13 / 3
    assert peer[4] == ""
    assert peer[6] == "-2.0000 %"
    assert [row[:3] for row in two_level.rows] == [
        ["ours-two-level", "3.00 (3.00 to 3.00)", "1.00 (1.00 to 1.00)"],
        ["superkmeans-default", "6.00 (6.00 to 6.00)", "2.00 (2.00 to 2.00)"],
    ]
    assert stages.rows[1][1:3] == ["", "12.00 (5.00 to 19.00)"]
    clustering.draw(result, tmp_path / "seconds.png")
    assert (tmp_path / "seconds.png").stat().st_size > 1000


def test_passes_of_superkmeans_are_told_from_its_lines(monkeypatch, tmp_path):
    figures = {"train_seconds": 4.0, "assign_seconds": 1.0, "pass_seconds": []}
    lines = [(0.5, "Using 9 vectors"), (2.0, "Iteration 1/2 | 5"), (2.1, ""),
             (3.5, "Iteration 2/2 | 4"), (3.6, ""), (5.0, json.dumps(figures))]  # fmt: skip
    monkeypatch.setattr(
        clustering, "run_process", lambda *_: {"process_seconds": 7.0, "lines": list(lines)}
    )
    run = clustering.run_peer("superkmeans", tmp_path, 2, tmp_path)
    assert run["pass_seconds"] == [1.5, 1.5]
    assert run["seconds"] == 5.0
    assert run["stages"] == {"start-up": 2.0, "k-means": 4.0, "labels": 1.0}


def test_a_blas_that_does_not_work_here_is_not_chosen(monkeypatch, tmp_path):
    def run_peer(name, data, passes, output, blas):
        if blas == "SkylakeX":
            raise subprocess.CalledProcessError(-4, "faiss")
        return {"seconds": {"": 2.0, "Haswell": 1.0}[blas]}

    clustering.make_rows(tmp_path / "rows", "noise", 100, 8, 2)
    monkeypatch.setattr(clustering, "run_peer", run_peer)
    found = clustering.try_blas(tmp_path / "rows", tmp_path / "trial")
    assert found == {"": 2.0, "Haswell": 1.0}


@pytest.mark.parametrize("name", clustering_peers.PEERS)
def test_a_peer_clusters_all_rows_or_says_why_not(tmp_path, capfd, name):
    clustering.make_rows(tmp_path / "rows", "clip", 900, 32, 4)
    clustering_peers.main(name, tmp_path / "rows", 3, tmp_path / "out")
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    if "skipped" in figures:
        pytest.skip(figures["skipped"])
    assert figures["train_seconds"] > 0
    assert figures["assign_seconds"] > 0
    assert len(figures["pass_seconds"]) == (3 if name.startswith("faiss") else 0)
    start = clustering.objective_of(tmp_path / "rows", tmp_path / "rows" / "init" / "init.npy")
    found = clustering.objective_of(tmp_path / "rows", tmp_path / "out" / "centroids.npy")
    assert found > start + 0.02


def test_a_peer_that_is_not_installed_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "superkmeans", None)
    clustering.make_rows(tmp_path / "rows", "noise", 20, 8, 2)
    clustering_peers.main("superkmeans", tmp_path / "rows", 1, tmp_path / "out")
    assert "superkmeans" in json.loads(capsys.readouterr().out)["skipped"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_clustering_times_the_whole_command(tmp_path):
    arguments = ["--kind=noise", "--rows=700", "--dim=16", "--clusters=9", "--passes=2",
                 "--rounds=1", "--peers=", f"--output={tmp_path / 'results'}"]  # fmt: skip
    done = CliRunner().invoke(clustering.main, [*arguments, f"--data={tmp_path / 'data'}"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "results" / "clustering-noise.json").read_text())
    assert list(result["runs"]) == ["ours-lloyd", "ours-two-level"]
    for (run,) in result["runs"].values():
        assert sum(run["stages"].values()) == pytest.approx(run["process_seconds"])
        assert all(seconds > 0 for seconds in run["stages"].values())
        assert 0 < run["objective"] < 1
        assert run["peak_bytes"] > 2**26
    assert len(result["runs"]["ours-lloyd"][0]["pass_seconds"]) == 2
    text = (tmp_path / "results" / "clustering-noise.md").read_text()
    assert "noise: 700 x 16 rows into 9 clusters, 2 passes" in text
    assert (tmp_path / "results" / "clustering-noise.png").stat().st_size > 1000
    done = CliRunner().invoke(clustering.main, ["--peers=faiss,scann"])
    assert done.exit_code == 2
    assert "scann not among faiss, faiss-super, superkmeans" in done.output


def test_streaming_writes_rates_and_deletes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_stream, "ALONE_SECONDS", 0.01)
    monkeypatch.setattr(cluster_stream, "SHARD_ROWS", 300)
    arguments = ["--rows=700", "--dim=16", "--clusters=8", f"--output={tmp_path / 'results'}"]
    done = CliRunner().invoke(cluster_stream.main, [*arguments, f"--data={tmp_path / 'data'}"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "results" / "cluster-stream.json").read_text())
    assert (result["rows"], result["dim"], result["clusters"]) == (700, 16, 8)
    assert set(result["rows_per_second"]) == {"read", "search", "pass"}
    assert all(rate > 0 for rate in result["rows_per_second"].values())
    assert "nearest centroids alone" in (tmp_path / "results" / "cluster-stream.md").read_text()
    assert not list((tmp_path / "data").iterdir())


# ---- the scaling model ----

GRID = [scaling_model.Shape(b, c, d) for b in (64, 256) for c in (20_000, 100_000)
        for d in (128, 256)]  # fmt: skip


def test_the_fit_of_the_scaling_model_finds_the_constants_of_its_timings():
    machine = scaling_model.Machine(
        start=4e-4, flops=2e11, entries=1.5e9, memory=1.2e10, alpha=1e-3, beta=2e9, crowding=1.3
    )
    alone = [scaling_model.predict(machine, shape, 1, 2) for shape in GRID]
    pairs = [scaling_model.predict(machine, shape, 2, 2) for shape in GRID]
    found = scaling_model.fit(GRID, alone, pairs, cores=2)
    assert found == pytest.approx(machine, rel=1e-6)
    # Four ranks on two cores take turns; with cores of their own they do not.
    crowded, free = (scaling_model.predict(machine, GRID[0], 4, cores) for cores in (2, None))
    assert crowded - free == pytest.approx(
        machine.crowding * scaling_model.local_work(machine, GRID[0], 4, None)
    )


def bytes_of_a_step(group, shape):
    """What a rank holds: state; unit rows, ids and gradient of the drawn classes; samples."""
    module = PartialMarginSoftmax(
        shape.dim, shape.classes, sample_rate=shape.sample_rate, feature_rate=shape.feature_rate,
        sparse_grad=True, workspace_bytes=0, process_group=group,
    )  # fmt: skip
    optimizer = RowAdamW(module.parameters())
    x = torch.randn(shape.batch, shape.dim, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = module(x, torch.randint(shape.classes, (shape.batch,)))
    loss.backward()
    optimizer.step()

    def size(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    everyone, slot, _, class_index, _, _, state, packed, _ = saved
    gradient = torch.empty(len(class_index), shape.dim)  # on CUDA; on CPUs it is cut to the count
    assert len(gradient) >= module.weight.grad._nnz() > 0
    held = [t for t in optimizer.state[module.weight].values() if t.dim() > 0]
    return (
        size(module.weight, *held),
        size(packed, class_index, gradient, class_index),
        size(everyone, everyone, slot, state),  # the gradient of all is as large as they are
    )


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_memory_of_the_scaling_model_is_what_tensors_hold(ranks, world_size):
    shape = scaling_model.Shape(32, 20_000, 96)
    expected = scaling_model.memory(shape, world_size, unit_bytes=4)
    for held in ranks.run(world_size, bytes_of_a_step, shape):
        assert held == pytest.approx(tuple(expected), rel=0.03)  # blocks of 16 rows


@pytest.mark.slow
def test_training_on_wrong_labels(monkeypatch):
    monkeypatch.setattr(noisy_labels, "CLUSTERS", 25)
    monkeypatch.setattr(noisy_labels, "FEATURES", 16)
    noisy, wrong = noisy_labels.with_noise(DATA[0], 0)
    assert ((noisy.labels != DATA[0].labels) == wrong).all()
    assert 0.1 < wrong.mean() < 0.3
    found = noisy_labels.run(replace(TINY, epochs=1), DATA, Console(file=io.StringIO()))
    assert len(found) == 8
    assert all(0 <= share <= 1 for share in found["cleaning"].values())
    shown = noisy_labels.table([found, found])
    assert shown.header == ["", "4", "8"]
    assert [row[0] for row in shown.rows] == [name for name in found if name != "cleaning"]
    for name, *cells in shown.rows:
        right = [f"{value:.3f}" for value in found[name].values()]
        assert [cell.split()[0] for cell in cells] == right
