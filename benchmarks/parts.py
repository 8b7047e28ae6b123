"""Time the parts of a training step alone, each against what does the same work elsewhere.

    python benchmarks/parts.py --quick
    python benchmarks/parts.py --only selection,optimizer

The contestants of a part take turns, and ratios are formed within a round. See README.md.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from candidates import MARGIN, SCALE, Unavailable
from measure import describe_machine, load_average, summary
from partial_fc import PartialFC
from rich.console import Console
from tables import part_tables, parts_markdown
from torch import Tensor, nn

from unicom_ext import ArcFace, PartialMarginSoftmax
from unicom_ext.ops import memory
from unicom_ext.optim import RowAdamW
from unicom_ext.sampling import select_classes

RESULTS = Path(__file__).parent / "results"


@dataclass
class Part:
    """One comparison: contestants by label, ours first. Ratios are theirs / ours."""

    name: str
    title: str
    contestants: dict[str, Callable[[], Any]]
    notes: list[str] = field(default_factory=list)


# ---- selection, pack, optimizer ------------------------------------------------------------------


def selection(classes: int, rate: float, batch: int = 256) -> Part:
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0))
    peer = PartialFC(1, classes, sample_rate=rate)
    step = iter(range(1 << 30))
    return Part(
        f"selection-c{classes}-r{rate:g}",
        f"Selection: C = {classes}, r1 = {rate:g}, B = {batch}",
        {
            "unicom_ext": lambda: select_classes(classes, rate, labels, seed=0, step=next(step)),
            "rand + topk + sort": lambda: peer.sample_classes(labels.view(-1, 1)),
        },
    )


def pack(classes: int, rate: float, dim: int, features: int) -> Part:
    """Gather rows and columns, normalise: ours is a forward pass of an empty batch."""
    weight = memory.empty(classes, dim).normal_(0, 0.01)
    generator = torch.Generator().manual_seed(0)
    labels = torch.empty(0, dtype=torch.int64)
    columns = torch.randperm(dim, generator=generator)[:features].sort().values
    empty = torch.empty(0, dim)

    def ours(precision: str) -> Callable[[], Any]:
        module = _loss(weight, sample_rate=rate, feature_rate=features / dim, precision=precision)
        module.sparse_grad = True
        return lambda: module(empty, labels)

    def peer() -> Tensor:
        rows = torch.rand(classes).topk(round(rate * classes)).indices.sort().values
        return F.normalize(weight[rows].index_select(1, columns))

    return Part(
        f"pack-c{classes}-r{rate:g}-d{dim}-f{features}",
        f"Selecting, gathering and normalising: C = {classes}, r1 = {rate:g}, "
        f"{features} of {dim} dimensions",
        {
            "unicom_ext fp32": ours("fp32"),
            "unicom_ext bf16": ours("bf16"),
            "rand + topk + sort, index, normalize": peer,
        },
    )


def optimizer(classes: int, rate: float, dim: int) -> Part:
    """The update alone, of gradients that are there."""
    weight = nn.Parameter(memory.empty(classes, dim).normal_(0, 0.01))
    generator = torch.Generator().manual_seed(0)
    count = round(rate * classes)
    rows = torch.randn(count, dim, generator=generator)
    dense = torch.zeros(classes, dim)
    ids = iter(
        select_classes(classes, rate, torch.empty(0, dtype=torch.int64), seed=0, step=step)
        for step in range(1 << 30)
    )
    first = RowAdamW([weight], lr=1e-6)
    first.init_row_state([weight])
    state = first.state[weight]
    shared = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    def by_rows(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def run() -> None:
            weight.grad = torch.sparse_coo_tensor(
                next(ids).unsqueeze(0), rows, weight.shape, is_coalesced=True,
                check_invariants=False,
            )  # fmt: skip
            optimizer.step()

        return run

    def by_all(**options: Any) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW([weight], lr=1e-6, **options)
        optimizer.state[weight] = {"step": torch.tensor(1.0), **shared}

        def run() -> None:
            weight.grad = dense
            optimizer.step()

        return run

    sparse_adam = torch.optim.SparseAdam([weight], lr=1e-6)
    sparse_adam.state[weight] = {"step": 1, **shared}
    return Part(
        f"optimizer-c{classes}-r{rate:g}-d{dim}",
        f"The update alone: C = {classes}, {count} rows of {dim}",
        {
            "RowAdamW": by_rows(first),
            "RowAdamW, one second moment per row": by_rows(
                RowAdamW([weight], lr=1e-6, row_second_moment=True)
            ),
            "RowAdamW, bf16 moments": by_rows(
                RowAdamW([weight], lr=1e-6, moment_dtype=torch.bfloat16)
            ),
            "torch SparseAdam (no decay)": by_rows(sparse_adam),
            "torch AdamW(fused=True), dense": by_all(fused=True),
            "torch AdamW, dense": by_all(),
        },
        ["The dense ones are given their gradient: making it is not counted."],
    )


# ---- against matrix products ---------------------------------------------------------------------

_CHUNK = 10_000  # classes whose logits stay near the caches, which suits the libraries


def _products(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """Ways of computing a @ b into out, by library."""
    ways = {"torch.mm": lambda a, b, out: torch.mm(a, b, out=out)}
    if dtype == torch.float32:
        ways["NumPy"] = lambda a, b, out: np.matmul(a.numpy(), b.numpy(), out=out.numpy())
        ways["oneDNN"] = lambda a, b, out: torch.ops.mkldnn._linear_pointwise(
            a, b.T, None, "none", [], ""
        )
    return ways


def _best_product(a: Tensor, b: Tensor, out: Tensor) -> tuple[str, Callable[[], Any]]:
    """The fastest library for this product."""
    times = {}
    for name, way in _products(a.dtype).items():
        way(a, b, out)
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            way(a, b, out)
            runs.append(time.perf_counter() - start)
        times[name] = min(runs)
    best = min(times, key=times.get)
    way = _products(a.dtype)[best]
    return best, lambda: way(a, b, out)


def products(batch: int, classes: int, dim: int, backward: bool) -> Iterator[Part]:
    """All classes and dimensions: the loss against its one or three bare products."""
    weight = nn.Parameter(memory.empty(classes, dim).normal_(0, 0.01))
    x = torch.randn(batch, dim).requires_grad_(backward)
    labels = torch.randint(classes, (batch,))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        chunk = min(classes, _CHUNK)
        a, b = x.detach().to(dtype), weight.detach()[:chunk].to(dtype)
        logits = torch.empty(batch, chunk, dtype=dtype)
        jobs = [(a, b.T, logits)]
        if backward:
            jobs += [
                (logits, b, torch.empty(batch, dim, dtype=dtype)),
                (logits.T, a, torch.empty(chunk, dim, dtype=dtype)),
            ]
        libraries, calls = zip(*(_best_product(*job) for job in jobs), strict=True)
        times = -(-classes // chunk)
        module = _loss(weight, precision=precision)
        module.sparse_grad = True

        def ours(module: nn.Module = module) -> None:
            if not backward:
                with torch.no_grad():
                    module(x, labels)
                return
            module(x, labels).backward()
            weight.grad = x.grad = None

        def bare(calls: tuple = calls, times: int = times) -> None:
            for call in calls:
                for _ in range(times):
                    call()

        what = "forward + backward against three products" if backward else "forward against one"
        yield Part(
            f"gemm-{'three' if backward else 'one'}-{precision}-b{batch}-c{classes}-d{dim}",
            f"{what}, {precision}: B = {batch}, {classes} classes, {dim} dimensions",
            {f"unicom_ext {precision}": ours, f"bare products {precision}": bare},
            [f"fastest library for each product: {', '.join(libraries)}; {chunk} classes a call"],
        )


# ---- full softmax --------------------------------------------------------------------------------


def full_softmax(batch: int, classes: int, dim: int) -> Part:
    """Forward and backward with all classes and dimensions: the work that libraries share."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(memory.empty(classes, dim).normal_(0, 0.01, generator=generator))
    x = torch.randn(batch, dim, generator=generator).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator)

    def run(loss: Callable[[], Tensor], param: Tensor = weight) -> Callable[[], Any]:
        def step() -> None:
            loss().backward()
            param.grad = x.grad = None

        return step

    def unit_logits(**options: Any) -> Callable[[], Tensor]:
        return lambda: F.linear_cross_entropy(
            SCALE * F.normalize(x), F.normalize(weight), labels, **options
        )

    fp32, bf16 = (_loss(weight, precision=p) for p in ("fp32", "bf16"))
    contestants = {
        "unicom_ext fp32": run(lambda: fp32(x, labels)),
        "unicom_ext bf16": run(lambda: bf16(x, labels)),
    }
    notes = ["PyTorch Metric Learning: ArcFaceLoss, the same margin and scale"]
    try:
        metric_learning = _metric_learning(weight)
        contestants["PyTorch Metric Learning"] = run(
            lambda: metric_learning(x, labels), metric_learning.W
        )
    except Unavailable as reason:
        notes.append(f"SKIPPED PyTorch Metric Learning: {reason}")
    if hasattr(F, "linear_cross_entropy"):
        notes.append("linear_cross_entropy: normalised and scaled before, no margin")
        contestants["torch linear_cross_entropy"] = run(unit_logits())
        contestants["torch linear_cross_entropy, chunked"] = run(
            unit_logits(options=nn.LinearCrossEntropyOptions())
        )
    else:
        notes.append("SKIPPED linear_cross_entropy: this torch has none")
    return Part(
        f"full-c{classes}-b{batch}-d{dim}",
        f"Full softmax, forward + backward: C = {classes}, B = {batch}, d = {dim}",
        contestants,
        notes,
    )


def _metric_learning(weight: Tensor) -> nn.Module:
    try:
        from pytorch_metric_learning.losses import ArcFaceLoss
    except ImportError:
        raise Unavailable("pip install pytorch-metric-learning") from None
    degrees = MARGIN * 180 / torch.pi
    module = ArcFaceLoss(len(weight), weight.shape[1], margin=degrees, scale=SCALE)
    module.W = nn.Parameter(weight.detach().T.contiguous())
    return module


def _loss(weight: Tensor, **options: Any) -> PartialMarginSoftmax:
    classes, dim = weight.shape
    with torch.device("meta"):  # its own prototypes are not needed
        module = PartialMarginSoftmax(dim, classes, margin=ArcFace(MARGIN), scale=SCALE, **options)
    state = {"weight": weight, "step": torch.zeros((), dtype=torch.int64)}
    module.load_state_dict(state, strict=False, assign=True)
    return module


# ---- all of them ---------------------------------------------------------------------------------

KINDS = ("selection", "pack", "optimizer", "forward", "backward", "full")


def parts(quick: bool, kinds: list[str]) -> Iterator[Part]:
    """One at a time: their tensors are large."""
    if "selection" in kinds:
        for classes, rate in [(1_000_000, 0.1), (10_000_000, 0.01)][: 1 if quick else 2]:
            yield selection(classes, rate)
    if "pack" in kinds:
        yield pack(100_000 if quick else 1_000_000, 0.1, 512, 256)
    if "optimizer" in kinds:
        yield optimizer(100_000 if quick else 1_000_000, 0.1, 512)
    if "forward" in kinds:
        yield from products(256, 20_000 if quick else 100_000, 512, backward=False)
    if "backward" in kinds:
        for batch in [256] if quick else [256, 1024, 8192]:
            yield from products(batch, 20_000 if quick else 100_000, 512, backward=True)
    if "full" in kinds:
        yield full_softmax(256, 10_000 if quick else 50_000, 512)


def measure(part: Part, rounds: int) -> dict[str, Any]:
    """Times and ratios of a part, as they go into the JSON."""
    load = [load_average()]
    for call in part.contestants.values():
        for _ in range(2):
            call()
    seconds: dict[str, list[float]] = {label: [] for label in part.contestants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for label, call in part.contestants.items():
                start = time.perf_counter()
                call()
                seconds[label].append(time.perf_counter() - start)
    finally:
        gc.enable()
    load.append(load_average())
    ours = next(iter(seconds))
    return {
        "name": part.name,
        "title": part.title,
        "notes": part.notes,
        "rounds": rounds,
        "load_average": load,
        "seconds": seconds,
        "summary": {label: summary(values) for label, values in seconds.items()},
        "ratios": {
            label: summary([t / o for t, o in zip(values, seconds[ours], strict=True)])
            for label, values in seconds.items()
            if label != ours
        },
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
    }


def _parse_kinds(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    kinds = [kind for kind in value.split(",") if kind]
    for kind in kinds:
        if kind not in KINDS:
            raise click.BadParameter(f"{kind!r} is not one of {', '.join(KINDS)}")
    return kinds


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--quick", is_flag=True, help="Small sizes: under a minute.")
@click.option(
    "--only", callback=_parse_kinds, default=",".join(KINDS), metavar="LIST",
    help="Which parts.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds to time.  [default: 10]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: torch's own]")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default="benchmarks/results", help="Directory for the JSON and the Markdown.",
)  # fmt: skip
def main(
    quick: bool, only: list[str], rounds: int | None, threads: int | None, output: Path
) -> None:
    """Time selection, pack, optimizer, and the loss against bare products and other losses.

    Writes parts-NAME.json for each and, from all that are there, parts.md to the output directory.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    for part in parts(quick, only):
        result = measure(part, rounds or (5 if quick else 10))
        for table in part_tables([result]):
            console.print(table.rich())
        (output / f"parts-{part.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        del part
        gc.collect()
    results = [json.loads(path.read_text()) for path in sorted(output.glob("parts-*.json"))]
    (output / "parts.md").write_text(parts_markdown(results))
    console.print(f"Written: {output}/parts.md", highlight=False)


if __name__ == "__main__":
    main()
