"""How well embeddings tell classes apart that they were given rows of: k-NN and a linear probe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unicom_ext.retrieval.arguments import (
    check_block_bytes,
    check_counts,
    check_int,
    check_integers,
    check_positive,
    check_rows,
    check_same_width,
    check_seed,
)
from unicom_ext.retrieval.relevance import against_the_model
from unicom_ext.utils.search import (
    DEFAULT_BLOCK_BYTES,
    VALUE_BYTES,
    best_keys,
    check_finite,
    id_of,
    score_of,
    unit_rows,
)

STRENGTHS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_HELD_OUT = 5  # every fifth row of a class


class Probe(NamedTuple):
    """What `linear_probe` found.

    Attributes:
        accuracy: on the test rows, in [0, 1].
        l2: that was used.
        validation: accuracy on held-out training rows, by the l2 that were tried.
    """

    accuracy: float
    l2: float
    validation: dict[float, float]


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: Sequence[int] = (1, 20),
    *,
    temperature: float = 0.07,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> dict[int, float]:
    """Share of the test rows that their k nearest training rows classify rightly, by k.

    Ties are broken against the model: of neighbours at equal fp32 cosines those of other classes
    come first, and a class wins with more votes than any other, not with as many. With k = 1 this
    is Recall@1 of `retrieval.evaluate`.

    Args:
        train: [n, d] floating point, of any norm.
        train_labels: [n] integers. A negative label is none: such rows are left out.
        test: [m, d] floating point, of any norm, on the same device.
        test_labels: [m] integers, as `train_labels`.
        k: how many neighbours vote. One beyond the training rows takes all of them.
        temperature: each votes for its class with weight exp(cosine / temperature) (Wu, Xiong, Yu,
            Lin: "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
            2018; so has DINO).
        block_bytes: bound on the working memory, as in `retrieval.evaluate`.

    Returns:
        Shares in [0, 1], by k.

    Raises:
        TypeError: a type is wrong.
        ValueError: no row has a label, NaN or infinity, or shapes, devices or values that do not
            fit.
    """
    check_block_bytes(block_bytes)
    ks = check_counts("k", k, None)
    temperature = check_positive("temperature", temperature)
    x, y, test, wanted = _labelled(train, train_labels, test, test_labels)
    num_right = torch.zeros(len(ks), dtype=torch.int64)
    for ids, keys in best_keys(
        test,
        x,
        torch.arange(len(test), device=test.device),
        lambda _: min(max(ks), len(x)),
        against_the_model(wanted, y),
        exclude_self=False,
        block_bytes=block_bytes,
    ):
        # On the CPU, where sums have one order, so that equal votes are equal.
        cosine, classes = score_of(keys).double().cpu(), y[id_of(keys)].cpu()
        weight = ((cosine - cosine[:, :1]) / temperature).exp_()
        for i, count in enumerate(ks):
            right = _wins(classes[:, :count], weight[:, :count], wanted[ids].cpu())
            num_right[i] += right.sum()
    shares = (num_right.double() / len(test)).tolist()
    return dict(zip(ks, shares, strict=True))


def _wins(classes: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """Whether the wanted class [q] has more of the votes [q, k] than any other, bool [q]."""
    base = int(torch.maximum(classes.max(), wanted.max())) + 1
    query = torch.arange(len(classes))[:, None]
    pairs, of = (query * base + classes).flatten().unique(return_inverse=True)
    votes = torch.zeros(len(pairs), dtype=weight.dtype).index_add_(0, of, weight.flatten())
    query, own = pairs // base, pairs % base == wanted[pairs // base]
    most = torch.zeros(2, len(classes), dtype=weight.dtype)  # of other classes, of the own one
    most[0].scatter_reduce_(0, query[~own], votes[~own], "amax")
    most[1][query[own]] = votes[own]
    return most[1] > most[0]


@torch.no_grad()
def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2: float | Sequence[float] = STRENGTHS,
    max_iter: int = 200,
    seed: int = 0,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> Probe:
    """Accuracy on the test rows of multinomial logistic regression on the training rows.

    Rows are normalised; what is minimised, by L-BFGS over all rows, is the mean cross entropy of
    the logits W x + b, plus ``l2 / 2 |W|^2``, in double.

    Args:
        train: as for `knn_accuracy`, and so are the next three.
        train_labels: [n] integers.
        test: [m, d].
        test_labels: [m] integers; rows of classes that have no training row are wrong.
        l2: one number, or several, of which the best is taken: the one with the most accuracy on
            every fifth training row of each class, after training on the others; of equally good
            ones the largest. They are tried from the largest on, until one is worse than the best.
            With the best all training rows are trained on.
        max_iter: of L-BFGS, for each l2.
        seed: of which rows are held out.
        block_bytes: bound on the memory for logits; the rows are held in double, and the weights.

    Returns:
        The accuracy, and how it came about.

    Raises:
        TypeError, ValueError: as `knn_accuracy`; several l2 are given and no class has five
            training rows.

    Warns:
        UserWarning: L-BFGS has not converged.
    """
    check_block_bytes(block_bytes)
    given = l2 if isinstance(l2, Sequence) else [l2]
    strengths = sorted({check_positive("l2", strength) for strength in given}, reverse=True)
    if not strengths:
        raise ValueError("l2: got no numbers, must be one or several above 0")
    max_iter, seed = check_int("max_iter", max_iter), check_seed(seed)
    if max_iter < 1:
        raise ValueError(f"max_iter: got {max_iter}, must be at least 1")
    x, y, test, wanted = _labelled(train, train_labels, test, test_labels)
    x, test = _unit(x, block_bytes), _unit(test, block_bytes)
    known, y = y.unique(return_inverse=True)
    index = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    wanted = torch.where(known[index] == wanted, index, -1)

    start = torch.zeros(x.shape[1] + 1, len(known), dtype=torch.float64, device=x.device)
    validation: dict[float, float] = {}
    best, chosen = strengths[0], start
    if len(strengths) > 1:
        held_out = _held_out(y, seed)
        rows, labels, weights = x[~held_out], y[~held_out], start
        for strength in strengths:  # from strong to weak, each begins where the last one ended
            weights, _ = fit(rows, labels, strength, weights, max_iter, block_bytes)
            validation[strength] = _accuracy(x[held_out], y[held_out], weights, block_bytes)
            if validation[strength] < validation[best]:
                break  # weaker ones take longest, and would only be worse
            if strength == best or validation[strength] > validation[best]:
                best, chosen = strength, weights
    weights, converged = fit(x, y, best, chosen, max_iter, block_bytes)
    if not converged:
        warnings.warn(
            f"linear_probe: L-BFGS has not converged in {max_iter} iterations at l2 = {best:g}; "
            "max_iter allows more",
            stacklevel=3,  # no_grad is in between
        )
    return Probe(_accuracy(test, wanted, weights, block_bytes), best, validation)


def fit(
    x: Tensor, y: Tensor, l2: float, start: Tensor, max_iter: int, block_bytes: int
) -> tuple[Tensor, bool]:
    """Logistic regression: weights [d + 1, C], the last row for the bias, and if it converged.

    x float64 [n, d], y int64 [n] in [0, C), start float64 [d + 1, C]; see `linear_probe` for what
    is minimised. It has converged where no part of the gradient is above 1e-4 of the largest at
    zero.
    """
    weights = torch.nn.Parameter(start.clone())
    _, gradient = _objective(torch.zeros_like(start), x, y, l2, block_bytes)
    tolerance = max(1e-4 * gradient.abs().max().item(), 1e-12)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iter, max_eval=3 * max_iter, history_size=20,
        tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        loss, weights.grad = _objective(weights.detach(), x, y, l2, block_bytes)
        return loss

    optimizer.step(closure)
    _, gradient = _objective(weights.detach(), x, y, l2, block_bytes)
    return weights.detach(), bool(gradient.abs().max() <= tolerance)


def _objective(
    weights: Tensor, x: Tensor, y: Tensor, l2: float, block_bytes: int
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient [d + 1, C]."""
    loss = l2 / 2 * weights[:-1].square().sum()
    gradient = l2 * weights
    gradient[-1] = 0
    for rows, labels in _blocks(x, y, weights, block_bytes):
        log_p = torch.log_softmax(torch.addmm(weights[-1], rows, weights[:-1]), dim=1)
        own = labels[:, None]
        loss -= log_p.gather(1, own).sum() / len(x)
        p = log_p.exp_().scatter_add_(1, own, log_p.new_full(own.shape, -1.0)).div_(len(x))
        gradient[:-1].addmm_(rows.T, p)
        gradient[-1] += p.sum(0)
    return loss, gradient


def _accuracy(x: Tensor, y: Tensor, weights: Tensor, block_bytes: int) -> float:
    """Share of the rows whose own class, -1 for none, has a larger logit than any other."""
    right = 0
    for rows, labels in _blocks(x, y, weights, block_bytes):
        logits = torch.addmm(weights[-1], rows, weights[:-1])
        own = logits.gather(1, labels.clamp(min=0)[:, None])
        right += int((((logits >= own).sum(1) == 1) & (labels >= 0)).sum())
    return right / len(x)


def _blocks(
    x: Tensor, y: Tensor, weights: Tensor, block_bytes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, block_bytes // (VALUE_BYTES * weights.shape[1]))
    return zip(x.split(size), y.split(size), strict=True)


def _unit(rows: Tensor, block_bytes: int) -> Tensor:
    """Unit rows in double."""
    unit = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    size = max(1, block_bytes // (VALUE_BYTES * rows.shape[1]))
    for part, block in zip(unit.split(size), rows.split(size), strict=True):
        part.copy_(unit_rows("rows", block, 0))
    return unit


def _held_out(y: Tensor, seed: int) -> Tensor:
    """Every fifth row of each class, in an order drawn by the seed: bool [n]."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    order = order[y[order].argsort(stable=True)]
    first = torch.searchsorted(y[order], y[order])
    place = torch.arange(len(y), device=y.device) - first
    held_out = torch.zeros_like(y, dtype=torch.bool)
    held_out[order[place % _HELD_OUT == _HELD_OUT - 1]] = True
    if not held_out.any():
        raise ValueError(
            f"train_labels: no class has {_HELD_OUT} rows, of which one is held out to choose "
            "among several l2; give one l2"
        )
    return held_out


def _labelled(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and labels of both, checked, those without a label left out; labels count from 0."""
    parts = []
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        check_rows(name, rows)
        check_integers(f"{name}_labels", labels, name, rows)
        check_finite(name, rows)
        labelled = labels >= 0
        if not labelled.any():
            raise ValueError(f"{name}_labels: no row has a label")
        parts += [rows, labels] if labelled.all() else [rows[labelled], labels[labelled]]
    check_same_width("test", test, "training rows", train)
    x, y, test, wanted = parts
    numbers = torch.cat([y.long(), wanted.long()]).unique(return_inverse=True)[1]
    y, wanted = numbers.split([len(x), len(test)])
    return x, y, test, wanted
