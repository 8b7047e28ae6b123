"""The benchmark of a GPU, run where there is none: torch.cuda stood in for, tiny sizes on the CPU.

Nothing it measures means anything here. What is tested is that it runs to its end, what it writes,
and that it uses nothing of torch.cuda that is not there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types

import cuda_nearest
import cuda_step
import device
import head_step
import plain_softmax
import pytest
import tables
import torch
import torch.nn.functional as F
from candidates import Problem, Shape
from click.testing import CliRunner

from unicom_ext import PartialMarginSoftmax


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


class Graph:
    """Replays nothing: what the capture computed stays."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class FakeCuda:
    """What the benchmark uses of torch.cuda; only names that torch.cuda has."""

    free = 64 << 30

    def __init__(self) -> None:
        self.device_properties = types.SimpleNamespace(
            name="none", major=0, minor=0, multi_processor_count=1, total_memory=1
        )
        self.fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": lambda graph: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
            "memory_allocated": lambda: 0,
            "memory_reserved": lambda: 0,
            "max_memory_allocated": lambda: 1000,
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda: (self.free, 80 << 30),
            "get_device_properties": lambda index: self.device_properties,
        }

    def __getattr__(self, name: str):
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        return self.fakes[name]


@pytest.fixture
def where(monkeypatch):
    """A GPU that is the CPU."""
    fake = device.Cuda(FakeCuda(), "cpu")
    fake.gemm_size, fake.copy_bytes = 16, 1024
    monkeypatch.setattr(cuda_step.GraphHead, "cuda", fake.cuda)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(cuda_step, "SPARE_BYTES", 0)
    return fake


NAMES = tuple(c.name for c in cuda_step.CANDIDATES)
PLAN = [
    cuda_step.Run((16, 300, 16), NAMES, plain=True),
    cuda_step.Run((8, 300, 32), NAMES[:2], plain=False),
]


def run(where, path, said, monkeypatch, **options):
    monkeypatch.setattr(cuda_step, "DIM", 32)
    # Rates of the stand-in would make every step too slow to be tried.
    monkeypatch.setattr(cuda_step, "MOST_SECONDS", 1e9)
    options = {"plan": PLAN, "minutes": 1.0, "rounds": 1, **options}
    return cuda_step.run(path, where=where, say=said.append, **options)


@pytest.mark.first
@pytest.mark.slow
def test_a_run_writes_every_shape(where, tmp_path, monkeypatch, set_threads):
    set_threads(1)
    said = []
    results = run(where, tmp_path, said, monkeypatch)
    assert not cuda_step.failures(results)
    assert [r["name"] for r in results] == ["cuda-b16-s300-d16", "cuda-b8-s300-d32"]
    for result in results:
        assert json.loads((tmp_path / f"{result['name']}.json").read_text()) == result
        assert result["shape"]["classes"] == 3000
        assert set(result["ceilings"]) == {"fp16", "bf16", "fp32", "copy", "seconds"}
        for c in result["candidates"]:
            if c["skipped"] is not None:  # fp16 exists on CUDA alone, where it says so
                assert "fp16" in c["skipped"]
                continue
            assert all(len(c["seconds"][phase]) == 1 for phase in c["seconds"])
            assert ("ratios" in c) == (c["name"] != cuda_step.REFERENCE)
    assert tuple(c["name"] for c in results[0]["candidates"]) == NAMES
    text = (tmp_path / "cuda.md").read_text()
    assert text == tables.cuda_markdown(results)
    assert text.count("Plain softmax") == 1
    for name in ("cut-cross-entropy", "Liger"):
        assert f"SKIPPED {name}: pip install" in text
    assert Graph.replays > 0
    assert (tmp_path / "cuda.png").stat().st_size > 10_000


@pytest.mark.slow
def test_time_runs_out_between_shapes(where, tmp_path, monkeypatch, set_threads):
    set_threads(1)
    said = []
    plan = [cuda_step.Run((8, 300, 16), ("ours-fp16", "partialfc"), plain=False)] * 2
    ends = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(cuda_step.time, "monotonic", lambda: next(ends))
    results = run(where, tmp_path, said, monkeypatch, plan=plan)
    assert len(results) == 1
    assert said[-1] == "1 minutes are over: 1 runs are left out"
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_what_does_not_fit_is_said_and_left_out(where, monkeypatch):
    shape = Shape(10_000_000, 8192, 512, 0.1, 0.5)
    said = []
    monkeypatch.setattr(cuda_step, "SPARE_BYTES", 2 << 30)
    assert cuda_step.fitting(shape, 140_000_000_000, said.append) == shape
    smaller = cuda_step.fitting(shape, 80_000_000_000 - (16 << 30), said.append)
    assert (smaller.classes, smaller.num_sampled) == (1_000_000, 1_000_000)
    assert len(said) == 1
    assert "10000000 prototypes and their moments need 65 GB, 63 GB are free" in said[0]

    small = Shape(3000, 16, 32, 0.1, 0.5)
    where.cuda.free = 10_000
    chosen = [c for c in cuda_step.CANDIDATES if c.name in (cuda_step.REFERENCE, "partialfc")]
    ceilings = {"fp16": 1e12, "copy": 1e12}
    records = cuda_step.compare(small, chosen, 1, where, ceilings, said.append)
    assert all("needs about" in r["skipped"] for r in records)
    assert not cuda_step.failures([{"name": "", "candidates": records}])


def test_an_error_of_ours_is_a_failure(where, monkeypatch):
    def broken(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(PartialMarginSoftmax, "forward", broken)
    chosen = [cuda_step.CANDIDATES[0]]
    ceilings = {"fp16": 1e15, "copy": 1e12}
    shape = Shape(3000, 16, 32, 0.1, 0.5)
    records = cuda_step.compare(shape, chosen, 1, where, ceilings, lambda _: None)
    (failure,) = cuda_step.failures([{"name": "x", "candidates": records}])
    assert "illegal memory access" in failure


def test_floors_are_those_that_were_computed_by_hand():
    # B = 8192, |S| = 100 000, d' = 256 on an H200: 0.53 and 1.6 ms.
    shape = Shape(1_000_000, 8192, 512, 0.1, 0.5)
    floor = cuda_step.floors(shape, {"fp16": 790e12, "copy": 4.3e12}, "fp16")
    assert floor["forward"] == pytest.approx(0.53e-3, rel=0.01)
    assert floor["backward"] == pytest.approx(1.6e-3, rel=0.01)
    assert floor["optimizer"] == pytest.approx(0.33e-3, rel=0.02)
    assert floor["step"] == pytest.approx(sum(floor[p] for p in ("forward", "backward",
                                                                 "optimizer")))  # fmt: skip


def test_contestants_of_the_plain_softmax_compute_the_same():
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(40, 16, generator=generator))
    w = F.normalize(torch.randn(300, 16, generator=generator))
    labels = torch.randint(300, (40,), generator=generator)
    right = plain_softmax._materialised(64 * x, w, labels)
    torch.testing.assert_close(
        plain_softmax.partial_margin_softmax(
            x, labels, w, margin=plain_softmax.CombinedMargin(), scale=64.0
        ),
        right,
    )
    for chunk in (None, 16):
        torch.testing.assert_close(plain_softmax._torch_fused(chunk)(64 * x, w, labels), right)


def test_liger_is_given_chunks_of_our_size(monkeypatch):
    # Its arithmetic of chunks, as in liger_kernel.ops.fused_linear_cross_entropy.
    module = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.triton = types.SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    chunks, original = [], module.triton

    class Loss:
        def __call__(self, w, x, labels):
            factor = module.triton.cdiv(len(w), w.shape[1])
            chunks.append(module.triton.next_power_of_2(module.triton.cdiv(len(x), factor)))
            assert module.triton.next_power_of_2(len(w)) == 1 << (len(w) - 1).bit_length()
            return x.sum()

    transformers = types.ModuleType("liger_kernel.transformers")
    transformers.LigerFusedLinearCrossEntropyLoss = Loss
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x, w = torch.zeros(8192, 2), torch.zeros(3000, 2)
    for chunk in (None, 2048):
        plain_softmax._liger(chunk)(x, w, None)
    assert chunks == [8, 2048]
    assert module.triton is original


def test_without_a_gpu_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ["--device", "cuda", "--output", str(tmp_path / "results")]
    run = CliRunner().invoke(head_step.main, arguments)
    assert run.exit_code == 2
    assert "--device cuda needs a GPU" in run.output
    assert not (tmp_path / "results").exists()


def test_a_graph_keeps_its_gradient_for_the_update(where):
    problem = Problem(Shape(500, 16, 24, sample_rate=0.2, feature_rate=0.5))
    (candidate,) = (c for c in cuda_step.CANDIDATES if c.name == "ours-graph")
    head = candidate.build(problem)
    for _ in range(2):
        before = head.module.weight.detach().clone()
        head.forward()
        head.backward()
        assert head.module.weight.grad is None
        head.update()
        assert not torch.equal(head.module.weight, before)


def test_one_step_to_be_profiled():
    (candidate,) = (c for c in cuda_step.CANDIDATES if c.name == "ours-fp32")
    cuda_step.one_step(candidate, Shape(500, 16, 24, sample_rate=0.2, feature_rate=0.5), "cpu")


def test_the_nearest_centroid(where, tmp_path, capsys):
    shapes = ["30x7x5", "8x300x16"]
    results = cuda_nearest.run(where, shapes, 2, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["results"] == json.loads(
        json.dumps(results)
    )
    assert [r["shape"] for r in results] == shapes
    for result in results:
        assert result["wrong"] == 0
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    assert "8x300x16" in capsys.readouterr().out
