"""What only a GPU can show. Its numbers are tested as those of the CPU are: the tests of the loss
run on it as the capability "cuda"."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from rich.console import Console
from support.problems import random_problem, relative_error, solve, truth

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.cluster import Centroids, ClusterConfig, UnitSums, cluster, pictures
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.ops import library
from unicom_ext.optim import RowAdamW, RowSGD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not library.HAS_CUDA, reason="unicom_ext is built without CUDA"),
]


def make(device="cuda", **options) -> PartialMarginSoftmax:
    torch.manual_seed(0)
    options = {"sample_rate": 0.1, "feature_rate": 0.5, "seed": 3, **options}
    module = PartialMarginSoftmax(64, 5000, **options)
    return module.to(device)


def batch(device="cuda", dtype=torch.float32, size=200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 64, generator=generator).to(device, dtype)
    labels = torch.randint(0, 5000, (size,), generator=generator).to(device)
    return x.requires_grad_(), labels


@contextlib.contextmanager
def no_waiting():
    """Raises where the host waits for the device, as it does to copy what a test begins with."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "centers"),
    [((1, 2, 1), 1), ((7, 65, 17), 1), ((129, 300, 70), 1), ((300, 1100, 200), 1),
     ((129, 300, 70), 3), ((7, 65, 64), 8)],
    ids=str,
)  # fmt: skip
def test_small_sizes(shape, centers, precision):
    """Also what `make gpu-check` runs under compute-sanitizer."""
    problem = random_problem(*shape, closeness=0.5, precision=precision, num_centers=centers)
    x = problem.embeddings.cuda().requires_grad_()
    w = problem.prototypes.cuda().requires_grad_()
    loss = partial_margin_softmax(x, problem.labels.cuda(), w, **problem.options)
    loss.backward()
    right = truth(problem)
    allowed = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}[precision]
    assert abs(float(loss) - float(right.loss)) < allowed * 64
    assert relative_error(x.grad.cpu(), right.grad_embeddings) < allowed
    assert relative_error(w.grad.cpu(), right.grad_prototypes) < allowed


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_step_never_waits_for_the_device(sparse_grad):
    module = make(sparse_grad=sparse_grad)
    x, labels = batch()
    with no_waiting():
        for _ in range(3):
            module(x, labels).backward()


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: RowAdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1),
        lambda p: RowAdamW(p, lr=0.01, eps=1e-3, row_second_moment=True),
        lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: RowSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, exact=True),
    ],
    ids=["adamw", "adamw-row", "sgd", "sgd-exact"],
)
def test_row_optimizers_never_wait_and_do_what_they_do_on_the_cpu(make_optimizer, backwards):
    modules = make(sparse_grad=True), make("cpu", sparse_grad=True)
    inputs = batch(), batch("cpu")
    with no_waiting():
        for module, (x, labels) in zip(modules, inputs, strict=True):
            optimizer = make_optimizer([module.weight])
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(backwards):
                    module(x, labels).backward()
                optimizer.step()
    on_gpu, on_cpu = (module.weight.detach().cpu() for module in modules)
    start = make("cpu").weight.detach()
    assert relative_error(on_gpu - start, on_cpu - start) < 1e-4


def test_an_update_in_backward_never_waits_and_is_the_update_after_it():
    results = []
    for inside in (False, True):
        module = make(sparse_grad=True)
        optimizer = RowAdamW([module.weight], lr=0.01)
        if inside:
            optimizer.update_in_backward(module)
        x, labels = batch()
        with no_waiting():
            for _ in range(4):
                x.grad = None
                module(x, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append((module.weight.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    before = module.weight.detach().clone()
    (module(x, labels) * 2).backward()  # nobody waits to see it, so nothing is updated
    assert torch.equal(module.weight.detach(), before)
    assert x.grad.isnan().any()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_kept_for_backward_changes_nothing(precision):
    results = []
    for workspace_bytes in (0, 1 << 20, 1 << 28):
        module = make(precision=precision, workspace_bytes=workspace_bytes, sample_rate=0.9)
        x, labels = batch(size=300)
        module(x, labels).backward()
        results.append((x.grad, module.weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_twenty_replays_of_a_graph_draw_twenty_selections(precision):
    module, eager = make(precision=precision), make(precision=precision)
    x, labels = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module(x, labels).backward()
    torch.cuda.current_stream().wait_stream(side)
    module.step.zero_()
    x.grad = module.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = module(x, labels)
        loss.backward()
    module.step.zero_()
    drawn = set()
    for _ in range(20):
        x.grad.zero_()
        module.weight.grad.zero_()
        graph.replay()
        y = x.detach().clone().requires_grad_()
        eager.weight.grad = None
        right = eager(y, labels)
        right.backward()
        assert torch.equal(module.last_selection.class_index, eager.last_selection.class_index)
        assert torch.equal(loss, right)
        assert torch.equal(x.grad, y.grad)
        assert torch.equal(module.weight.grad, eager.weight.grad)
        drawn.add(tuple(module.last_selection.class_index.tolist()))
    assert len(drawn) == 20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_kernels_may_be_used_first_in_a_graph(precision):
    """CUDA loads a kernel at its first launch: in a fresh process, while a graph is captured."""
    script = f"""
import torch
from unicom_ext import PartialMarginSoftmax
module = PartialMarginSoftmax(64, 5000, sample_rate=0.1, feature_rate=0.5, precision="{precision}")
module.to("cuda")
x = torch.randn(200, 64, device="cuda", requires_grad=True)
labels = torch.arange(200, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = module(x, labels)
    loss.backward()
graph.replay()
got = [t.clone() for t in (loss.detach(), x.grad, module.weight.grad)]
module.step.zero_()
x.grad = module.weight.grad = None
right = module(x, labels)
right.backward()
for a, b in zip(got, (right.detach(), x.grad, module.weight.grad), strict=True):
    assert torch.equal(a, b)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_compiled_graph_draws_twenty_selections():
    module, eager = make(), make()
    compiled = torch.compile(module, fullgraph=True)
    x, labels = batch()
    drawn = set()
    for _ in range(20):
        loss = compiled(x, labels)
        assert torch.equal(loss, eager(x, labels))
        drawn.add(tuple(module.last_selection.class_index.tolist()))
    loss.backward()
    assert len(drawn) == 20
    assert x.grad.isfinite().all()


def test_the_module_is_that_of_the_cpu():
    on_gpu, on_cpu = make(), make("cpu")
    for _ in range(3):
        (x, labels), (y, cpu_labels) = batch(), batch("cpu")
        on_gpu.weight.grad = on_cpu.weight.grad = None
        loss, right = on_gpu(x, labels), on_cpu(y, cpu_labels)
        loss.backward()
        right.backward()
        for a, b in zip(on_gpu.last_selection, on_cpu.last_selection, strict=True):
            assert torch.equal(a.cpu(), b)
        for a, b in ((loss, right), (x.grad, y.grad), (on_gpu.weight.grad, on_cpu.weight.grad)):
            assert relative_error(a.detach().cpu(), b.detach()) < 1e-5


def test_the_same_bits_twice():
    results = []
    for _ in range(2):
        module = make(precision="fp16")
        x, labels = batch(size=3000)
        loss = module(x, labels)
        loss.backward()
        results.append((loss.detach(), x.grad, module.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_other_streams_and_threads():
    right = make()(*batch())
    results = {}

    def work(name: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x, labels = batch()
            module = make()
            for _ in range(5):
                loss = module(x, labels, step=0)
                loss.backward()
            stream.synchronize()
            results[name] = loss.detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for loss in results.values():
        assert torch.equal(loss, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU")
def test_several_devices_in_one_process():
    losses = []
    for device in ("cuda:0", "cuda:1"):  # cuda:0 stays the current one
        module = make(device)
        x, labels = batch(device)
        loss = module(x, labels)
        loss.backward()
        assert x.grad.device == loss.device == torch.device(device)
        losses.append(float(loss))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="must be on cuda:1"):
        make("cuda:0")(*batch("cuda:1"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler(dtype):
    encoder = torch.nn.Linear(32, 64).cuda()
    module = make()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *module.parameters()], lr=1e-2)
    scaler = torch.amp.GradScaler("cuda")
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, 32, generator=generator).cuda()
    _, labels = batch()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            embeddings = encoder(inputs)
            assert embeddings.dtype == dtype
            loss = module(embeddings, labels)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_multiplies_in_fp16():
    x, labels = batch()
    with torch.autocast("cuda"):
        auto = make()(x, labels)
    assert torch.equal(auto, make(precision="fp16")(x, labels))
    assert not torch.equal(auto, make(precision="fp32")(x, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_embeddings(dtype):
    x, labels = batch(dtype=dtype)
    loss = make()(x, labels)
    loss.backward()
    y = x.detach().float().requires_grad_()
    right = make()(y, labels)
    right.backward()
    assert x.grad.dtype == dtype
    assert relative_error(loss.detach(), right.detach()) < 1e-6
    assert relative_error(x.grad, y.grad) < 1e-2


def test_memory_does_not_grow_with_batch_times_classes():
    def extra(size: int, num_classes: int) -> int:
        x = torch.randn(size, 64, device="cuda", requires_grad=True)
        w = torch.randn(num_classes, 64, device="cuda", requires_grad=True)
        labels = torch.randint(0, num_classes, (size,), device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        partial_margin_softmax(x, labels, w, margin=ArcFace(0.3), scale=64.0).backward()
        gradients = 4 * (x.numel() + w.numel())
        return torch.cuda.max_memory_allocated() - before - gradients

    large = extra(16384, 200_000)  # logits in fp32 would take 13 GB
    assert large < 1 << 30


def test_out_of_memory_leaves_the_module_usable():
    module = make()
    x, labels = batch()
    right = make()(x, labels)
    many = x.detach().repeat(500, 1).requires_grad_()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + (32 << 20)  # the packed rows alone need more
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            module(many, labels.repeat(500))
        assert int(module.step) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(module(x, labels), right)


def test_tensors_of_both_kinds_are_refused():
    module = make()
    x, labels = batch()
    with pytest.raises(ValueError, match="labels must be on cuda:0 like the embeddings, got cpu"):
        module(x, labels.cpu())
    with pytest.raises(ValueError, match="prototypes must be on cpu"):
        module(x.detach().cpu(), labels.cpu())
    assert int(module.step) == 0


def test_a_problem_of_ten_million_values_is_right():
    # Offsets beyond 2^31 bytes, many chunks of classes in backward.
    problem = random_problem(2000, 40_000, 64, closeness=1.0, precision="fp32")
    x = problem.embeddings.cuda().requires_grad_()
    w = problem.prototypes.cuda().requires_grad_()
    loss = partial_margin_softmax(x, problem.labels.cuda(), w, **problem.options)
    loss.backward()
    right = solve(partial_margin_softmax, problem)
    assert relative_error(loss.detach().cpu(), right.loss) < 1e-5
    assert relative_error(x.grad.cpu(), right.grad_embeddings) < 1e-5
    assert relative_error(w.grad.cpu(), right.grad_prototypes) < 1e-5


# ---- clustering


def search(rows, values, device):
    rows, centroids = rows.to(device), Centroids(values.to(device))
    index, score = centroids.nearest(rows)
    again, _ = centroids.nearest(rows, index.flip(0))
    sums = UnitSums(*values.shape, rows=len(rows), device=device)
    sums.add(rows, index.flip(0))
    sums.add(rows, index, index.flip(0))
    return index, score, again, sums.values, sums.counts, sums.directions()


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 65, 17), (300, 1100, 200)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7])
def test_small_sizes_of_the_nearest_centroid(shape, spread):
    """Also what `make gpu-check` runs under compute-sanitizer."""
    check_search(*shape, spread)


@pytest.mark.parametrize("shape", [(20_000, 300, 8), (50_000, 3000, 256)], ids=str)
def test_more_rows_than_go_through_at_a_time(shape):
    check_search(*shape, 1.0)


def check_search(n, k, d, spread):
    """Every bit is the CPU's."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, d, generator=generator)
    rows = common + spread * torch.randn(n, d, generator=generator)
    values = common + spread * torch.randn(k, d, generator=generator)
    rows[n // 2] = 0
    for got, right in zip(search(rows, values, "cuda"), search(rows, values, "cpu"), strict=True):
        assert torch.equal(got.cpu(), right)


def test_the_search_never_waits_for_the_device():
    rows, centroids = torch.randn(3000, 64, device="cuda"), torch.randn(700, 64, device="cuda")
    found = Centroids(centroids)
    sums = UnitSums(700, 64, rows=6000, device="cuda")
    sums.add(rows, found.nearest(rows)[0])
    with no_waiting():
        index, _ = found.nearest(rows)
        found.nearest(rows, index)
        sums.add(rows, index)
        sums.add(rows, index, index.flip(0))
        sums.directions()
    assert sums.counts.sum() == 6000


def test_rows_and_centroids_of_two_devices_are_refused():
    found = Centroids(torch.ones(2, 3, device="cuda"))
    with pytest.raises(ValueError, match="rows must be on cuda:0 like the centroids, got cpu"):
        found.nearest(torch.ones(4, 3))
    with pytest.raises(ValueError, match="must be on the device of the other tensors"):
        found.nearest(torch.ones(4, 3, device="cuda"), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="centroids must be finite, but row 1 is not"):
        Centroids(torch.tensor([[1.0], [float("inf")]], device="cuda"))


@pytest.mark.parametrize("method", ["lloyd", "minibatch", "two-level"])
def test_a_clustering_is_that_of_the_cpu(method, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *arguments: [])
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 24))
    for shard in range(3):
        rows = centres[rng.integers(60, size=4000)] + 0.5 * rng.standard_normal((4000, 24))
        np.save(tmp_path / f"rows_{shard:04d}.npy", rows.astype(np.float16))
    for device in ("cpu", "cuda"):
        settings = ClusterConfig(
            clusters=60, passes=4, tolerance=0.0, method=method, batch_rows=3000, device=device
        )
        result = cluster(settings, tmp_path, tmp_path / device, console=Console(quiet=True))
        assert result["device"].startswith(device)
    for path in sorted((tmp_path / "cpu").glob("*.npy")):
        assert np.array_equal(np.load(path), np.load(tmp_path / "cuda" / path.name)), path.name
