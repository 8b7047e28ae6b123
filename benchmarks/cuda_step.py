"""The step of the head on a GPU: ``head_step.py --device cuda``.

Shapes come in the order of what they tell, and each is written as soon as it is measured, so that a
run that is cut has the first of them. Each candidate is timed beside ours, turn by turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plain_softmax
import torch
from candidates import Candidate, Head, Problem, Shape, Unavailable, compiled, ours, partial_fc
from device import Cuda
from measure import describe_machine, prepare, ratios, spans, summary, time_rounds
from tables import cuda_markdown

REFERENCE = "ours-fp16"
HALF = {"linear_dtype": torch.float16}

# (B, |S|, d'), most telling first.
GRID = [
    (8192, 100_000, 256),
    (8192, 100_000, 512),
    (1024, 100_000, 256),
    (8192, 1_000_000, 256),
    (8192, 1_000_000, 512),
    (1024, 100_000, 512),
    (32768, 100_000, 256),
    (32768, 100_000, 512),
    (1024, 1_000_000, 256),
    (1024, 1_000_000, 512),
    (32768, 1_000_000, 256),
    (32768, 1_000_000, 512),
]
DIM, SAMPLE_RATE = 512, 0.1
SPARE_BYTES = 2 << 30  # for libraries, workspaces and what lies in between
MOST_SECONDS = 0.5  # of a step, by arithmetic: slower ones are left out


class GraphHead(Head):
    """Forward and backward captured once and replayed; the update as ever."""

    cuda: Any = torch.cuda

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):  # modules are loaded and libraries made before the capture
            for _ in range(2):
                super().forward()
                super().backward()
                self.zero_grad()
        self.cuda.current_stream().wait_stream(side)
        self.graph = self.cuda.CUDAGraph()
        with self.cuda.graph(self.graph):
            super().forward()
            super().backward()
        self.gradient = self.module.weight.grad  # every replay writes it again
        self.zero_grad()

    def forward(self) -> None:
        self.graph.replay()

    def backward(self) -> None:
        pass

    def update(self) -> None:
        self.module.weight.grad = self.gradient
        self.optimizer.step()
        self.zero_grad()


@dataclass(frozen=True)
class CudaCandidate(Candidate):
    """precision: type of the operands, whose product rate is the candidate's ceiling."""

    precision: str = "fp16"

    @property
    def in_backward(self) -> bool:
        """Whether backward updates the prototypes."""
        return "in backward" in self.description

    def extra_bytes(self, shape: Shape) -> int:
        """About what a step needs beside parameters and moments."""
        rows = shape.num_sampled * shape.dim * 4
        if self.ours:
            stored = 0 if self.in_backward else rows
            return stored + shape.num_sampled * shape.num_features * 4 + SPARE_BYTES
        # Logits in fp32, in fp16, exponentials, their gradient, one-hot; rows, and their gradient.
        logits = shape.batch * shape.num_sampled * 4
        return 5 * logits + 4 * rows + shape.weight_bytes + SPARE_BYTES


def _candidate(
    name: str, label: str, description: str, build: Callable[..., Any], **rest: Any
) -> CudaCandidate:
    return CudaCandidate(
        name, label, description, build, ours=name.startswith("ours"), fragile=True, **rest
    )


CANDIDATES = [
    _candidate(REFERENCE, "unicom_ext fp16", "fp16 operands, RowAdamW in backward", ours("fp16")),
    _candidate(
        "partialfc",
        "PartialFC v2",
        "eager, product in fp16, AdamW(fused=True)",
        partial_fc("fused", **HALF),
    ),
    _candidate(
        "ours-stored",
        "unicom_ext fp16, gradient stored",
        "fp16 operands, a row-sparse gradient, then RowAdamW",
        ours("fp16", "rows"),
    ),
    _candidate(
        "ours-graph",
        "unicom_ext fp16, CUDA graph",
        "the same; forward and backward are one graph, timed as forward",
        ours("fp16", "rows", GraphHead),
    ),
    _candidate(
        "compile",
        "PartialFC v2 compiled",
        "torch.compile, product in fp16, AdamW(fused=True)",
        compiled(**HALF),
    ),
    _candidate(
        "published",
        "PartialFC v2 as published",
        "eager, product in fp16, arccos and cos of all logits, plain AdamW",
        partial_fc("plain", whole_matrix=True, **HALF),
    ),
    _candidate(
        "compile-max",
        "PartialFC v2 compiled, max-autotune",
        "torch.compile(mode='max-autotune'), product in fp16, AdamW(fused=True)",
        compiled(mode="max-autotune", **HALF),
    ),
    _candidate(
        "ours-bf16",
        "unicom_ext bf16",
        "bf16 operands, RowAdamW in backward",
        ours("bf16"),
        precision="bf16",
    ),
    _candidate(
        "ours-fp32",
        "unicom_ext fp32",
        "fp32 operands, cosines kept in up to 256 MiB, a row-sparse gradient, then RowAdamW",
        ours("fp32", "rows"),
        precision="fp32",
    ),
    _candidate(
        "ours-fp32-recompute",
        "unicom_ext fp32, nothing kept",
        "the same with workspace_bytes=0",
        ours("fp32", "rows", workspace_bytes=0),
        precision="fp32",
    ),
]


@dataclass(frozen=True)
class Run:
    """One shape: (B, |S|, d'), the candidates, and whether the plain softmax is measured too."""

    size: tuple[int, int, int]
    names: tuple[str, ...]
    plain: bool
    suffix: str = ""


_EAGER = (REFERENCE, "partialfc", "ours-stored", "ours-graph")
PLANS = {
    "all": [Run(size, tuple(c.name for c in CANDIDATES), plain=True) for size in GRID],
    "first": [Run(size, _EAGER, plain=False) for size in GRID[:4]],
    # Compiling takes longer than the rest of a shape.
    "peers": [Run(GRID[0], (REFERENCE, "compile"), plain=True, suffix="-compiled")],
    "rest": [Run(size, _EAGER, plain=False) for size in GRID[4:]],
    # For each value of UNICOM_CUDA_CHUNK_MIB, which a process reads once.
    "chunk": [Run(size, (REFERENCE, "ours-stored"), plain=False) for size in GRID[:2]],
}


def floors(shape: Shape, ceilings: dict[str, Any], precision: str) -> dict[str, float]:
    """Seconds below which no step can be, by the device's measured rates: one product forward,
    three backward (one of them the logits again), and seven passes over the sampled rows for the
    update (parameter and moments read and written, the gradient read)."""
    product = 2 * shape.batch * shape.num_sampled * shape.num_features / ceilings[precision]
    update = 7 * shape.num_sampled * shape.dim * 4 / ceilings["copy"]
    floor = {"forward": product, "backward": 3 * product, "optimizer": update}
    return {**floor, "forward+backward": 4 * product, "step": 4 * product + update}


def fitting(shape: Shape, free: int, say: Callable[[str], None]) -> Shape:
    """The shape, or with fewer classes of which all are sampled, where prototypes do not fit."""
    needed = 3 * shape.weight_bytes + CANDIDATES[0].extra_bytes(shape)
    if needed <= free:
        return shape
    say(
        f"{shape.classes} prototypes and their moments need {needed / 1e9:.0f} GB, "
        f"{free / 1e9:.0f} GB are free: {shape.num_sampled} classes, all sampled, instead"
    )
    return replace(shape, classes=shape.num_sampled, sample_rate=1.0)


def compare(
    shape: Shape,
    chosen: list[CudaCandidate],
    rounds: int,
    where: Cuda,
    ceilings: dict[str, Any],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A record of each candidate, as it goes into the JSON."""
    problem = Problem(shape, where.device)
    _ = problem.ours
    reference, records = None, []
    for candidate in chosen:
        floor = floors(shape, ceilings, candidate.precision)
        if candidate.in_backward:
            floor["backward"] += floor["optimizer"]
            floor["forward+backward"] += floor["optimizer"]
        record: dict[str, Any] = {
            "name": candidate.name,
            "label": candidate.label,
            "description": candidate.description,
            "skipped": None,
            "failed": False,  # the reason is an error
            "floor": floor,
            "phases_apart": True,  # forward and backward were timed apart
        }
        records.append(record)
        needed, free = candidate.extra_bytes(shape), where.free_bytes()
        try:
            if needed > free:
                raise Unavailable(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB free")
            if floor["step"] > MOST_SECONDS:
                raise Unavailable(f"a step would take more than {floor['step']:.1f} s")
            head = prepare(candidate, problem, where)
            record["phases_apart"] = not isinstance(head, GraphHead)
            # What a graph holds, it holds between steps too.
            record["memory"] = _peaks(head, where) if record["phases_apart"] else None
            heads = {candidate.name: head}
            if reference is not None:
                heads = {REFERENCE: reference, **heads}
            seconds = time_rounds(heads, rounds, lambda _: None, where)
        except Unavailable as reason:
            record["skipped"] = str(reason)
            record["failed"] = reason.__cause__ is not None  # of `prepare`
        except torch.OutOfMemoryError as error:
            record["skipped"], record["failed"] = str(error).splitlines()[0], True
        else:
            record["seconds"] = seconds[candidate.name]
            record["summary"] = {s: summary(v) for s, v in spans(record["seconds"]).items()}
            if reference is not None:
                record["reference_seconds"] = seconds[REFERENCE]
                record["ratios"] = ratios(seconds[REFERENCE], record["seconds"])
            if candidate.name == REFERENCE:
                reference = head
        step = record["skipped"] or f"{1e3 * record['summary']['step']['median']:.2f} ms a step"
        say(f"  {candidate.label}: {step}")
        head = heads = None
        problem.ours.weight.grad = problem.embeddings.grad = None
        where.release()
    return records


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Times of a step and their floors, run by run; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = 0.8 / len(CANDIDATES)
    figure, axes = plt.subplots(figsize=(3 + 2 * len(results), 4.5), layout="constrained")
    for i, candidate in enumerate(CANDIDATES):
        points = [
            (number + (i + 0.5) * width - 0.4, record["summary"]["step"]["median"], record["floor"])
            for number, result in enumerate(results)
            for record in result["candidates"]
            if record["name"] == candidate.name and record["skipped"] is None
        ]
        if not points:
            continue
        x, seconds, floor = zip(*points, strict=True)
        axes.bar(x, [1e3 * s for s in seconds], width, label=candidate.label)
        axes.scatter(x, [1e3 * f["step"] for f in floor], marker="_", color="black", zorder=3)
    names = [
        f"B = {r['shape']['batch']}\n|S| = {r['shape']['num_sampled']}\n"
        f"d' = {r['shape']['num_features']}"
        for r in results
    ]
    axes.set_xticks(range(len(results)), names)
    axes.set(yscale="log", ylabel="ms per step (black: floor)")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def failures(results: list[dict[str, Any]]) -> list[str]:
    """What of ours did not run, for another reason than its size."""
    return [
        f"{result['name']}, {c['label']}: {c['skipped']}"
        for result in results
        for c in result["candidates"]
        if c["name"].startswith("ours") and c["skipped"] is not None and c["failed"]
    ]


def _peaks(head: Head, where: Cuda) -> dict[str, int]:
    _, backward, step = where.peak_bytes(head.forward, head.backward, head.update)
    return {"forward+backward": backward, "step": step}


def run(
    output: Path,
    *,
    plan: list[Run],
    minutes: float,
    rounds: int,
    where: Cuda,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure what is planned for as long as there is time.

    Writes cuda-NAME.json for each run as it is done, and cuda.md and cuda.png from all of them.
    """
    start = time.monotonic()
    machine = {**describe_machine(), "gpu": where.describe()}
    say(f"{machine['gpu']}")
    ceilings = where.ceilings()
    where.release()
    products = ", ".join(f"{n} {ceilings[n] / 1e12:.0f}" for n in ("fp16", "bf16", "fp32"))
    say(f"products {products} TFLOP/s, copy {ceilings['copy'] / 1e12:.2f} TB/s")
    output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for number, planned in enumerate(plan):
        if time.monotonic() - start > 60 * minutes:
            say(f"{minutes:g} minutes are over: {len(plan) - number} runs are left out")
            break
        batch, sampled, features = planned.size
        shape = Shape(round(sampled / SAMPLE_RATE), batch, DIM, SAMPLE_RATE, features / DIM)
        name = f"cuda-b{batch}-s{sampled}-d{features}{planned.suffix}"
        say(f"[{number + 1}/{len(plan)}] B = {batch}, |S| = {sampled}, d' = {features}")
        shape = fitting(shape, where.free_bytes(), say)
        result = {
            "benchmark": "head_step",
            "name": name,
            "shape": shape.record(),
            "rounds": rounds,
            "machine": machine,
            "ceilings": ceilings,
            "candidates": compare(
                shape,
                [c for c in CANDIDATES if c.name in planned.names],
                rounds,
                where,
                ceilings,
                say,
            ),
        }
        where.release()
        if planned.plain:
            result["plain_softmax"] = plain_softmax.compare(shape, where, rounds)
            for record in result["plain_softmax"]:
                say(f"  plain softmax, {record['label']}: {record['skipped'] or 'measured'}")
        results.append(result)
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (output / "cuda.md").write_text(cuda_markdown(results))
        plot(results, output / "cuda.png")
        where.release()
    return results


def one_step(candidate: Candidate, shape: Shape, where: torch.device | str = "cuda") -> None:
    """For a profiler to look at."""
    head = candidate.build(Problem(shape, where))
    head.forward()
    head.backward()
    head.update()


if __name__ == "__main__":
    one_step(CANDIDATES[0], Shape(1_000_000, 8192, DIM, SAMPLE_RATE, 1.0))
