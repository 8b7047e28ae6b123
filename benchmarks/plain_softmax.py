"""What our loss has in common with fused linear cross entropies: a plain softmax over all classes.

Everyone gets fp16 unit embeddings, multiplied by the scale, and fp16 unit prototypes, and makes
both gradients. Ours gets the same rows and normalises them again, with the derivative of that.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from candidates import SCALE, Shape, Unavailable
from device import Cpu, Cuda
from torch import Tensor

from unicom_ext import CombinedMargin
from unicom_ext.functional import partial_margin_softmax

CHUNK = (
    2048  # rows at a time for those who chunk the batch: what fills a GPU, yet bounds the logits
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of embeddings, prototypes, labels


def contestants() -> dict[str, Callable[[], Loss]]:
    """Ours first. Each raises Unavailable where it is not installed."""
    return {
        "unicom_ext fp16": lambda: _ours,
        "torch cross_entropy, materialised": lambda: _materialised,
        "torch linear_cross_entropy": _torch_fused,
        f"torch linear_cross_entropy, chunks of {CHUNK}": lambda: _torch_fused(CHUNK),
        "cut-cross-entropy": lambda: _cut_cross_entropy("cce"),
        "cut-cross-entropy, without gradient filter": lambda: _cut_cross_entropy("cce_exact"),
        "Liger": _liger,
        f"Liger, chunks of {CHUNK}": lambda: _liger(CHUNK),
    }


def _ours(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return partial_margin_softmax(
        x, labels, w, margin=CombinedMargin(), scale=SCALE, precision="fp16"
    )


def _materialised(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).float(), labels)


def _torch_fused(chunk: int | None = None) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy")
    options = {}
    if chunk is not None:
        options["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda x, w, labels: F.linear_cross_entropy(x, w, labels, **options)


def _cut_cross_entropy(implementation: str) -> Loss:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"pip install cut-cross-entropy ({error})") from None
    return lambda x, w, labels: linear_cross_entropy(x, w, labels, impl=implementation)


def _liger(chunk: int | None = None) -> Loss:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"pip install liger-kernel ({error})") from None
    loss = LigerFusedLinearCrossEntropyLoss()
    if chunk is None:
        return lambda x, w, labels: loss(w, x, labels)
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    if not hasattr(module, "triton"):
        raise Unavailable("this Liger chooses its chunks in another place")

    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        # Its chunks hold as many logits as the batch has embeddings: next_power_of_2(B d / C) rows,
        # a few dozen where C is much larger than d. There is no option for it.
        triton = module.triton
        rows = -(-len(x) // -(-len(w) // w.shape[1]))
        module.triton = types.SimpleNamespace(
            cdiv=triton.cdiv,
            next_power_of_2=lambda n: chunk if n == rows else triton.next_power_of_2(n),
        )
        try:
            return loss(w, x, labels)
        finally:
            module.triton = triton

    return run


def compare(shape: Shape, where: Cpu | Cuda, rounds: int) -> list[dict[str, Any]]:
    """A record of each contestant: times of forward + backward, each beside ours, and memory."""
    generator = torch.Generator(where.device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        values = torch.randn(rows, shape.num_features, generator=generator, device=where.device)
        return F.normalize(values).half()

    x, w = unit(shape.batch), unit(shape.num_sampled).requires_grad_()
    labels = torch.randint(
        shape.num_sampled, (shape.batch,), generator=generator, device=where.device
    )
    inputs = {True: x.clone().requires_grad_(), False: (SCALE * x).requires_grad_()}

    def step(loss: Loss) -> Callable[[], None]:
        x = inputs[loss is _ours]

        def run() -> None:
            loss(x, w, labels).backward()
            x.grad = w.grad = None

        return run

    ours, records = step(_ours), []
    for label, find in contestants().items():
        record: dict[str, Any] = {"label": label, "skipped": None}
        records.append(record)
        try:
            call = step(find())
            where.time(call)  # compile and allocate
            record["memory"] = where.peak_bytes(call)[0]
            pairs = [(where.time(ours)[0], where.time(call)[0]) for _ in range(rounds)]
        except Unavailable as reason:
            record["skipped"] = str(reason)
        except Exception as error:  # out of memory, or a shape that it does not take
            record["skipped"] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        else:
            record["ours_seconds"], record["seconds"] = map(list, zip(*pairs, strict=True))
        where.release()
    return records
