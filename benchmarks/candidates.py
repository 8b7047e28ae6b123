"""What is timed: heads that all work on the same prototypes, moments, embeddings and labels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from partial_fc import CompiledPartialFC, PartialFC
from torch import Tensor, nn

from unicom_ext import ArcFace, PartialMarginSoftmax, _engine
from unicom_ext.ops import memory
from unicom_ext.ops.row_sparse import attach, updater_of
from unicom_ext.optim import RowAdamW
from unicom_ext.sampling import num_sampled_classes, num_selected_features

MARGIN, SCALE = 0.3, 64.0  # UNICOM's recipe


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison. Raises ValueError where the rates leave nothing to compute."""

    classes: int
    batch: int
    dim: int
    sample_rate: float
    feature_rate: float

    def __post_init__(self) -> None:
        num_selected_features(self.dim, self.feature_rate)

    @property
    def num_sampled(self) -> int:
        return num_sampled_classes(self.classes, self.sample_rate)

    @property
    def num_features(self) -> int:
        return num_selected_features(self.dim, self.feature_rate)

    @property
    def weight_bytes(self) -> int:
        """Size of the prototypes, and of their dense gradient."""
        return self.classes * self.dim * 4

    def record(self) -> dict[str, int | float]:
        """As it goes into the JSON."""
        return {
            **asdict(self),
            "num_sampled": self.num_sampled,
            "num_features": self.num_features,
            "weight_bytes": self.weight_bytes,
        }


class Prototypes:
    """A weight and its optimizers, which share their moments.

    The learning rate is tiny: the prototypes hardly move, and every round is the same work.
    """

    def __init__(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        generator = torch.Generator(weight.device).manual_seed(0)
        self.weight = nn.Parameter(weight.normal_(0, 0.01, generator=generator))
        moments = {"exp_avg": exp_avg.zero_(), "exp_avg_sq": exp_avg_sq.fill_(1e-8)}
        rows = RowAdamW([self.weight], lr=1e-6)
        self.optimizers = {
            "rows": rows,
            "in backward": RowAdamW([self.weight], lr=1e-6),
            "fused": torch.optim.AdamW([self.weight], lr=1e-6, fused=True),
            "plain": torch.optim.AdamW([self.weight], lr=1e-6),
        }
        for name in ("fused", "plain"):
            # Fused, the count of steps is where the parameter is.
            device = weight.device if name == "fused" else "cpu"
            state = {"step": torch.tensor(1.0, device=device), **moments}
            self.optimizers[name].state[self.weight] = state
        rows.state[self.weight] = {"step": torch.tensor(0.0), **moments}
        rows.init_row_state([self.weight])
        self.optimizers["in backward"].state = rows.state


class Problem:
    """The tensors that the heads share, so that a million classes fit in memory.

    On the CPU prototypes and moments are there twice: ours where the package puts them, and the
    peers' where torch does.
    """

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        self.shape, self.device = shape, torch.device(device)
        generator = torch.Generator().manual_seed(1)
        embeddings = torch.empty(shape.batch, shape.dim).normal_(generator=generator)
        self.embeddings = embeddings.to(device).requires_grad_()
        self.labels = torch.randint(shape.classes, (shape.batch,), generator=generator).to(device)

    @cached_property
    def ours(self) -> Prototypes:
        return self._prototypes(memory.empty)

    @cached_property
    def theirs(self) -> Prototypes:
        return self.ours if self.device.type == "cuda" else self._prototypes(torch.empty)

    def _prototypes(self, empty: Callable[..., Tensor]) -> Prototypes:
        size = self.shape.classes, self.shape.dim
        return Prototypes(*(empty(*size, device=self.device) for _ in range(3)))


class Head:
    """Forward, backward and update of a loss module whose `weight` are the prototypes."""

    def __init__(
        self, problem: Problem, prototypes: Prototypes, module: nn.Module, optimizer: str
    ) -> None:
        self.problem = problem
        self.module = module
        self.module.weight = prototypes.weight
        self.optimizer = prototypes.optimizers[optimizer]
        self.updater = None
        if optimizer == "in backward":
            self.optimizer.update_in_backward(module)
            self.updater = updater_of(module.weight)
            attach(module.weight, None)

    def forward(self) -> None:
        attach(self.module.weight, self.updater)  # the heads take turns on one parameter
        self.loss = self.module(self.problem.embeddings, self.problem.labels)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.zero_grad()
        self.loss = None

    def zero_grad(self) -> None:
        self.module.weight.grad = self.problem.embeddings.grad = None


class BareProducts:
    """The three matrix products of a head, fp32, into memory that is already there."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        size = (shape.num_sampled, shape.num_features)
        self.x: Tensor = F.normalize(problem.embeddings.detach()[:, : size[1]])
        self.w: Tensor = F.normalize(torch.randn(size))
        self.logits = torch.empty(len(self.x), len(self.w))
        self.grad_x, self.grad_w = torch.empty_like(self.x), torch.empty_like(self.w)

    def forward(self) -> None:
        torch.mm(self.x, self.w.T, out=self.logits)

    def backward(self) -> None:
        # The logits stand for their gradient: the arithmetic is the same.
        torch.mm(self.logits, self.w, out=self.grad_x)
        torch.mm(self.logits.T, self.x, out=self.grad_w)

    def update(self) -> None:
        pass


@dataclass(frozen=True)
class Candidate:
    """A head to time.

    name: its name on the command line and in the JSON.
    label: its name in the tables.
    description: what it is and at which settings.
    build: makes it. It may raise `Unavailable`, and so may the first steps of a `fragile` one.
    """

    name: str
    label: str
    description: str
    build: Callable[[Problem], Head | BareProducts]
    ours: bool = False
    fragile: bool = False


class Unavailable(Exception):
    """A candidate cannot run here; the message is the reason."""


def ours(
    precision: str, optimizer: str = "in backward", kind: type[Head] = Head, **options: Any
) -> Callable[[Problem], Head]:
    def build(problem: Problem) -> Head:
        shape = problem.shape
        with torch.device("meta"):  # its own prototypes are not needed
            module = PartialMarginSoftmax(
                shape.dim,
                shape.classes,
                margin=ArcFace(MARGIN),
                scale=SCALE,
                sample_rate=shape.sample_rate,
                feature_rate=shape.feature_rate,
                precision=precision,
                sparse_grad=optimizer != "fused",
                **options,
            )
        module.step = torch.zeros((), dtype=torch.int64, device=problem.device)
        return kind(problem, problem.ours, module, optimizer)

    return build


def partial_fc(
    optimizer: str, kind: type[PartialFC] = PartialFC, **options
) -> Callable[[Problem], Head]:
    def build(problem: Problem) -> Head:
        shape = problem.shape
        with torch.device("meta"):  # its own prototypes are not needed
            module = kind(
                shape.dim,
                shape.classes,
                margin=MARGIN,
                scale=SCALE,
                sample_rate=shape.sample_rate,
                feature_rate=shape.feature_rate,
                **options,
            )
        return Head(problem, problem.theirs, module, optimizer)

    return build


def compiled(**options: Any) -> Callable[[Problem], Head]:
    def build(problem: Problem) -> Head:
        compiler = os.environ.get("CXX")
        if not any(map(shutil.which, [compiler] if compiler else ["g++", "clang++"])):
            raise Unavailable(f"torch.compile needs a C++ compiler: {compiler or 'g++'} not found")
        return partial_fc("fused", CompiledPartialFC, **options)(problem)

    return build


_BF16 = "bf16 against fp32: unit vectors in bf16, parameters and moments in fp32"
if "avx512_bf16" not in _engine.cpu_capabilities():
    _BF16 += ". This CPU has no bf16 instructions, so that bf16 can save memory but no time"
CANDIDATES = [
    Candidate(
        "ours-fp32",
        "unicom_ext fp32",
        "fp32, RowAdamW inside backward",
        ours("fp32"),
        ours=True,
    ),
    Candidate(
        "ours-bf16",
        "unicom_ext bf16",
        f"{_BF16}; RowAdamW inside backward",
        ours("bf16"),
        ours=True,
    ),
    Candidate(
        "ours-stored",
        "unicom_ext fp32, gradient stored",
        "fp32, a row-sparse gradient, then RowAdamW",
        ours("fp32", "rows"),
        ours=True,
    ),
    Candidate(
        "ours-dense",
        "unicom_ext fp32, dense gradient",
        "fp32, a dense gradient, then AdamW(fused=True), as the peers",
        ours("fp32", "fused"),
        ours=True,
    ),
    Candidate("partialfc", "PartialFC v2", "fp32, eager, AdamW(fused=True)", partial_fc("fused")),
    Candidate(
        "published",
        "PartialFC v2 as published",
        "fp32, eager, arccos and cos of all logits, plain AdamW",
        partial_fc("plain", whole_matrix=True),
    ),
    Candidate(
        "compile",
        "PartialFC v2 compiled",
        "fp32, torch.compile, AdamW(fused=True)",
        compiled(),
        fragile=True,
    ),
    Candidate(
        "partialfc-bf16",
        "PartialFC v2 bf16",
        "bf16 products under autocast, logits and the rest fp32, eager, AdamW(fused=True)",
        partial_fc("fused", linear_dtype=torch.bfloat16),
    ),
    Candidate(
        "compile-bf16",
        "PartialFC v2 bf16, compiled",
        "the same by torch.compile, AdamW(fused=True)",
        compiled(linear_dtype=torch.bfloat16),
        fragile=True,
    ),
    Candidate(
        "gemm",
        "bare GEMMs",
        "fp32 torch.mm into given memory: one forward, two backward, no update; the floor",
        BareProducts,
    ),
]
PEERS = [candidate.name for candidate in CANDIDATES if not candidate.ours]
