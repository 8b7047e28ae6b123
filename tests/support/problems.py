"""Problems, yardsticks and error measures shared by the tests of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext import reference
from unicom_ext.margins import ArcFace, CombinedMargin


@dataclass(frozen=True)
class Problem:
    """Inputs of one call of the loss, with the upstream gradient of its result."""

    embeddings: Tensor  # [B, d]
    labels: Tensor  # [B] or [B, P]
    prototypes: Tensor  # [C * num_centers, d]
    options: dict = field(default_factory=dict)
    upstream: Tensor | None = None  # [B] for reduction="none", else a scalar or None for 1

    def to(self, dtype: torch.dtype, prototype_dtype: torch.dtype | None = None) -> Problem:
        return replace(
            self,
            embeddings=self.embeddings.to(dtype),
            prototypes=self.prototypes.to(prototype_dtype or dtype),
        )

    def having(self, **options) -> Problem:
        return replace(self, options={**self.options, **options})


class Outcome(NamedTuple):
    loss: Tensor
    grad_embeddings: Tensor
    grad_prototypes: Tensor


def solve(implementation: Callable, problem: Problem) -> Outcome:
    """Loss and both gradients, each of its own dtype; a sparse gradient comes back dense."""
    x = problem.embeddings.detach().clone().requires_grad_()
    w = problem.prototypes.detach().clone().requires_grad_()
    loss = implementation(x, problem.labels, w, **problem.options)
    upstream = torch.ones_like(loss) if problem.upstream is None else problem.upstream.to(loss)
    grad_x, grad_w = torch.autograd.grad(loss, (x, w), upstream)
    return Outcome(loss.detach(), grad_x, grad_w.to_dense())


def truth(problem: Problem) -> Outcome:
    """What float64 says."""
    return solve(reference.partial_margin_softmax, problem.to(torch.float64))


def eager_partial_fc(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    interclass_filter: float | None = None,
    margin_grad: str = "straight_through",
    beyond_pi: str = "keep",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_centers: int = 1,
    **_of_the_engine,
) -> Tensor:
    """The loss as trainers write it: normalise, multiply, arccos, cross entropy, autograd.

    The yardstick of the error budgets, in the dtype of its inputs. Nothing is done about the
    corners, beyond keeping arccos off +-1 where autograd differentiates it.
    """
    kept = labels != ignore_index
    x, y = embeddings[kept], labels[kept].long()
    m2, m3 = (m[kept].to(x) if isinstance(m, Tensor) else m for m in (margin.m2, margin.m3))
    prototypes = prototypes.unflatten(0, (-1, num_centers))
    if class_index is not None:
        prototypes, y = prototypes[class_index], torch.searchsorted(class_index, y)
    if feature_index is not None:
        x, prototypes = x[:, feature_index], prototypes[..., feature_index]
    cosine = (F.normalize(x) @ F.normalize(prototypes, dim=2).flatten(0, 1).T).clamp(-1, 1)
    cosine = cosine.unflatten(1, (-1, num_centers)).max(dim=2).values
    rows = torch.arange(len(y))
    target = cosine[rows, y]
    if interclass_filter is not None:
        cosine = cosine.masked_fill(cosine > interclass_filter, 0.0)

    inner = target if margin_grad == "straight_through" else target.clamp(-1 + 1e-7, 1 - 1e-7)
    angle = margin.m1 * inner.arccos() + m2
    psi = torch.cos(angle.clamp(min=0) if beyond_pi == "linear" else angle) - m3
    if beyond_pi == "linear":
        last = ((math.pi - torch.as_tensor(m2)) / margin.m1).clamp(0, math.pi)
        drop = torch.maximum((math.pi - last) * last.sin(), 1 + last.cos()).to(x)
        psi = torch.where(target.arccos() > last, target - drop - m3, psi)
    if margin_grad == "straight_through":
        psi = target + (psi - target).detach()
    logits = scale * cosine.index_put((rows, y), psi)
    loss = embeddings.new_zeros(len(labels)).masked_scatter(
        kept, F.cross_entropy(logits, y, reduction="none")
    )
    if reduction == "none":
        return loss
    return loss.sum() / (kept.sum() if reduction == "mean" else 1)


def eager_multi_label(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    margin: CombinedMargin,
    scale: float,
    multi_label: str = "average",
    reduction: str = "mean",
    ignore_index: int = -100,
    class_index: Tensor | None = None,
    feature_index: Tensor | None = None,
    **_of_the_engine,
) -> Tensor:
    """The yardstick for several positives, as trainers write it; straight-through gradients."""
    if feature_index is not None:
        embeddings, prototypes = embeddings[:, feature_index], prototypes[:, feature_index]
    if class_index is not None:
        labels = torch.where(labels < 0, labels, torch.searchsorted(class_index, labels))
        prototypes = prototypes[class_index]
    cosine = (F.normalize(embeddings) @ F.normalize(prototypes).T).clamp(-1, 1)
    of_each = [m if isinstance(m, Tensor) else torch.tensor(m) for m in (margin.m2, margin.m3)]
    m2, m3 = (m.to(cosine).expand(labels.shape) for m in of_each)
    losses = []
    for i, row in enumerate(labels):
        first = [p for p, y in enumerate(row) if y != ignore_index and y not in row[:p]]
        if not first:
            losses.append(cosine[i].sum() * 0)
            continue
        target = cosine[i, row[first]]
        psi = torch.cos(margin.m1 * target.detach().arccos() + m2[i, first]) - m3[i, first]
        z = scale * (target + (psi - target).detach())
        others = torch.ones(len(prototypes), dtype=torch.bool).index_fill(0, row[first], False)
        negatives = scale * cosine[i, others]
        if multi_label == "average":
            each = [torch.logsumexp(torch.cat([one[None], negatives]), 0) - one for one in z]
            losses.append(torch.stack(each).mean())
        else:
            zero = z.new_zeros(1)
            two = [torch.logsumexp(torch.cat([zero, part]), 0) for part in (negatives, -z)]
            losses.append(sum(two))
    loss = torch.stack(losses)
    if reduction == "none":
        return loss
    counted = (labels != ignore_index).any(dim=1).sum()
    return loss.sum() / (counted if reduction == "mean" else 1)


def matrix(labels: Tensor) -> Tensor:
    """[B, P] of labels [B, P] or [B]."""
    return labels if labels.dim() == 2 else labels[:, None]


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| over all elements; 0 for two zero tensors."""
    error, size = distance(a, b), float(torch.linalg.vector_norm(b.double()))
    return error if error == 0 else error / size if size > 0 else math.inf


def row_errors(a: Tensor, b: Tensor) -> Tensor:
    """Relative error of each row, [n]; a vector has rows of one element."""
    a, b = (t.double().reshape(len(t), -1) for t in (a, b))
    error, size = (a - b).norm(dim=1), b.norm(dim=1)
    return torch.where(error == 0, 0.0, error / size)


class Budget(NamedTuple):
    right: Outcome
    allowed: tuple[float, ...]  # relative errors

    def check(self, outcome: Outcome) -> None:
        for name, a, b, allowed in zip(
            Outcome._fields, outcome, self.right, self.allowed, strict=True
        ):
            error = relative_error(a, b)
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


def fp32_budget(problem: Problem) -> Budget:
    """A relative error of at most three times the eager formula's in float32, plus 3e-6."""
    yardstick = eager_partial_fc if problem.labels.dim() == 1 else eager_multi_label
    right, eager = truth(problem), solve(yardstick, problem.to(torch.float32))
    errors = (relative_error(e, b) for e, b in zip(eager, right, strict=True))
    return Budget(right, tuple(3 * error + 3e-6 for error in errors))


def check_fp32(outcome: Outcome, problem: Problem) -> None:
    fp32_budget(problem).check(outcome)


def check_conditioned(outcome: Outcome, problem: Problem) -> None:
    """The bound that fits any problem (straight-through), one sample or one dimension included.

    There the eager formula is right by luck or the gradient cancels, so errors are measured
    against what a relative rounding error in each logit can do: scale times as much in the loss,
    and as much of every gradient before it is projected onto the tangent of its row.
    """
    right, double = truth(problem), problem.to(torch.float64)
    _, sample = reference.partial_margin_softmax(
        double.embeddings,
        double.labels,
        double.prototypes,
        **double.having(return_metrics=True).options,
    )
    arithmetic = torch.finfo(torch.promote_types(torch.float32, outcome.loss.dtype))
    # Below, numbers lose their last digits (or, in float64, their squares do).
    smallest = max(arithmetic.tiny / arithmetic.eps, 1e-100)
    scale = problem.options["scale"]
    # 1 - p_y; with several positives at least how fast the loss changes with its logits
    weight = (-torch.expm1(-sample.loss)).clamp(min=smallest)
    if problem.upstream is not None:
        weight = weight * problem.upstream.double()
    elif problem.options.get("reduction", "mean") == "mean":
        weight = weight / max(1, int((matrix(problem.labels) != -100).any(dim=1).sum()))
    x, w = double.embeddings, double.prototypes
    if (features := problem.options.get("feature_index")) is not None:
        x, w = x[:, features], w[:, features]
    if (classes := problem.options.get("class_index")) is not None:
        w = w.unflatten(0, (-1, problem.options.get("num_centers", 1)))[classes].flatten(0, 1)
    sizes = (
        smallest,
        float((scale * weight / x.norm(dim=1)).norm()),
        float((scale * weight).norm() / w.norm(dim=1).min()),
    )
    # An angle near 0 or pi is that much less certain than its cosine.
    sine = (1 - sample.target_cosine**2).clamp(min=arithmetic.eps).sqrt().min()
    allowed = 2 * (scale / float(sine) + 25) * arithmetic.eps
    for name, a, b, size in zip(Outcome._fields, outcome, right, sizes, strict=True):
        error = distance(a, b) / max(size, float(b.norm()))
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def random_problem(
    batch: int,
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    closeness: float = 0.0,
    sampled: int | None = None,
    features: int | None = None,
    ignored: int = 0,
    positives: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Problem:
    """Gaussian embeddings and prototypes, representable in dtype.

    closeness: how much of its own prototype, of several the first, each embedding holds.
    sampled: number of classes in class_index (the labels', filled up at random); None for all.
    features: number of dimensions in feature_index; None for all.
    ignored: number of samples with the label -100.
    positives: P of labels [B, P], of which some are -100 and some stand twice; None for [B].
    """
    generator = torch.Generator().manual_seed(seed)
    centers = options.get("num_centers", 1)
    prototypes = torch.randn(num_classes * centers, dim, generator=generator)
    labels = torch.randint(num_classes, (batch, positives or 1), generator=generator)
    own = prototypes[labels * centers].mean(dim=1)
    embeddings = torch.randn(batch, dim, generator=generator) + closeness * own
    if positives is None:
        labels = labels[:, 0]
    else:
        chance = torch.rand(labels.shape, generator=generator)
        labels = torch.where(chance < 0.1, labels[:, :1], labels).masked_fill(chance > 0.8, -100)
    labels[torch.randperm(batch, generator=generator)[:ignored]] = -100
    if sampled is not None:
        present = torch.zeros(num_classes)
        present[labels[labels >= 0]] = 2
        order = present + torch.rand(num_classes, generator=generator)
        options["class_index"] = order.topk(sampled).indices.sort().values
    if features is not None:
        chosen = torch.randperm(dim, generator=generator)[:features]
        options["feature_index"] = chosen.sort().values
    options = {"margin": ArcFace(0.3), "scale": 64.0, **options}
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.rand(batch, generator=generator) + 0.5
    return Problem(embeddings.to(dtype), labels, prototypes.to(dtype), options, upstream)


def per_sample_margin(batch: int, seed: int = 0) -> CombinedMargin:
    generator = torch.Generator().manual_seed(seed)
    m2, m3 = 0.5 * torch.rand(2, batch, generator=generator)
    return CombinedMargin(1.0, m2, m3)
