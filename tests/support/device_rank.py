"""One rank of a process group, in a process of its own: trains the loss on a device and saves what
came out. It is forked from a server, as none can be that uses a GPU from one that does."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from support.processes import Process

CLASSES, DIM, BATCH, STEPS = 301, 16, 24, 3


def run(folder: Path, world_size: int, **options) -> list[dict[str, torch.Tensor]]:
    """What each rank saved.

    options: device, "cpu" or "cuda"; backend, None for no process group; captured, whether forward
    and backward are replayed from a CUDA graph.
    """
    folder.mkdir()
    ranks = [
        Process(folder / f"{rank}.txt", partial(_serve, **options), folder, rank, world_size)
        for rank in range(world_size)
    ]
    for rank, process in enumerate(ranks):
        assert process.end() == 0, f"rank {rank}:\n{process.text()[-4000:]}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def train(group, device: str, captured: bool) -> dict[str, torch.Tensor]:
    from unicom_ext import PartialMarginSoftmax
    from unicom_ext.optim import RowAdamW

    loss_fn = PartialMarginSoftmax(
        DIM, CLASSES, sample_rate=0.3, feature_rate=0.75, scale=16.0, seed=5, sparse_grad=True,
        process_group=group,
    ).to(device)  # fmt: skip
    optimizer = RowAdamW([loss_fn.weight], lr=0.01)
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    part = slice(BATCH * rank // world_size, BATCH * (rank + 1) // world_size)
    x = torch.empty(BATCH // world_size, DIM, device=device, requires_grad=True)
    labels = torch.empty(BATCH // world_size, dtype=torch.int64, device=device)

    def forward_and_backward() -> torch.Tensor:
        loss = loss_fn(x, labels)
        loss.backward()
        return loss

    def fill(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(BATCH, DIM, generator=generator)
        x.detach().copy_(rows[part])
        labels.copy_(torch.randint(CLASSES, (BATCH,), generator=generator)[part])

    fill(0)
    replay = forward_and_backward
    if captured:
        replay = _captured(forward_and_backward, x, loss_fn)
    found = {}
    for step in range(STEPS):
        fill(step)
        if not captured:
            x.grad = loss_fn.weight.grad = None
        found[f"loss of step {step}"] = replay().detach().clone()
        found[f"gradient of step {step}"] = x.grad.clone()
        optimizer.step()
    weight = loss_fn.state_dict()["weight"]
    found["weight"] = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return {name: value.cpu() for name, value in found.items()}


def _captured(work, x, loss_fn):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = loss_fn.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = work()
    loss_fn.step.zero_()  # which the run before the capture has raised
    gradient = loss_fn.weight.grad  # every replay writes it again

    def replay() -> torch.Tensor:
        graph.replay()
        loss_fn.weight.grad = gradient
        return loss

    return replay


def _serve(
    folder: Path,
    rank: int,
    world_size: int,
    *,
    device: str,
    backend: str | None = None,
    captured: bool = False,
) -> None:
    group = None
    if backend is not None:
        dist.init_process_group(
            backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        group = dist.group.WORLD
    torch.save(train(group, device, captured), folder / f"{rank}.pt")
    if group is not None:
        dist.barrier()  # nobody leaves while another still asks
        dist.destroy_process_group()
