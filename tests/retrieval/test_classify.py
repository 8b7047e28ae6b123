"""k-NN and linear probe against plain formulas in float64, SciPy's minimum and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from unicom_ext.retrieval import classify, evaluate, knn_accuracy, linear_probe


def problem(classes=6, rows=25, dim=8, spread=1.0, seed=0):
    """Training and test rows of the same classes: train, its labels, test, its labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    parts = []
    for n in (rows, 10):
        labels = torch.arange(classes).repeat(n)
        x = centers[labels] + spread * torch.randn(len(labels), dim, generator=generator)
        parts += [x, labels]
    return parts


def unit(x):
    return x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-30)


# ---- k-NN ----------------------------------------------------------------------------------------


def right_by_votes(cosine, classes, wanted, k, temperature):
    """One query: neighbours one by one, ties against the model."""
    order = np.lexsort((np.arange(len(cosine)), classes == wanted, -cosine))[:k]
    votes = {}
    for i in order:
        votes[classes[i]] = votes.get(classes[i], 0) + np.exp(cosine[i] / temperature)
    others = [v for c, v in votes.items() if c != wanted]
    return votes.get(wanted, 0) > max(others, default=0) * (1 + 1e-12)


@st.composite
def knn_problem(draw):
    """Cosines are exact in fp32, so ties are real ties; some rows have no label."""
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4)
    label = st.sampled_from([0, 0, 1, 2, 7, -1])
    parts = []
    for most in (15, 5):
        rows = draw(st.lists(signs, min_size=1, max_size=most))
        labels = draw(st.lists(label, min_size=len(rows), max_size=len(rows)))
        parts += [torch.tensor(rows), torch.tensor(labels)]
    return parts


@settings(max_examples=40)
@given(knn_problem(), st.sampled_from([0.07, 1.0, 1e-3]), st.sampled_from([1500, 1 << 26]))
def test_knn_is_that_of_votes_one_by_one(data, temperature, block_bytes):
    train, labels, test, wanted = data
    if not ((labels >= 0).any() and (wanted >= 0).any()):
        return
    ks = [1, 2, 3, 100]
    found = knn_accuracy(*data, ks, temperature=temperature, block_bytes=block_bytes)
    x, y = train[labels >= 0], labels[labels >= 0].numpy()
    cosine = (unit(test[wanted >= 0]) @ unit(x).T).numpy()
    for k in ks:
        right = [
            # By the distance from the nearest, which no exponential makes infinite.
            right_by_votes(of_one - of_one.max(), y, label, k, temperature)
            for of_one, label in zip(cosine, wanted[wanted >= 0].tolist(), strict=True)
        ]
        assert found[k] == np.mean(right)


def test_one_neighbour_is_recall_at_1():
    train, labels, test, wanted = problem()
    (result,) = evaluate(test, wanted, train, labels, ks=[1])
    assert knn_accuracy(train, labels, test, wanted, [1]) == result.recall
    assert 0.5 < result.recall[1] < 1


def test_a_class_without_training_rows_is_wrong():
    x = torch.eye(3)
    labels = torch.tensor([0, 1, 2])
    assert knn_accuracy(x[:2], labels[:2], x, labels, [1]) == {1: pytest.approx(2 / 3)}
    assert linear_probe(x[:2], labels[:2], x, labels, l2=1e-3).accuracy == pytest.approx(2 / 3)


def test_the_temperature_weighs_votes():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    arguments = train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(*arguments, [3], temperature=0.07) == {3: 1.0}
    assert knn_accuracy(*arguments, [3], temperature=10.0) == {3: 0.0}


def test_a_collapsed_model_classifies_nothing():
    labels = torch.arange(40) % 4
    for row in (torch.zeros(1, 3), torch.ones(1, 3)):
        x = row.expand(40, 3)
        assert knn_accuracy(x, labels, x, labels, (1, 20)) == {1: 0, 20: 0}
        assert linear_probe(x, labels, x, labels).accuracy <= 0.25


# ---- linear probe --------------------------------------------------------------------------------


def plain_objective(weights, x, y, classes, l2):
    """Value and gradient in float64, by the formula."""
    w = weights.reshape(-1, classes)
    logits = x @ w[:-1] + w[-1]
    log_p = special.log_softmax(logits, axis=1)
    p = special.softmax(logits, axis=1)
    p[np.arange(len(y)), y] -= 1
    gradient = np.concatenate([x.T @ p / len(y) + l2 * w[:-1], p.sum(0, keepdims=True) / len(y)])
    value = -log_p[np.arange(len(y)), y].mean() + l2 / 2 * (w[:-1] ** 2).sum()
    return value, gradient.ravel()


@pytest.mark.parametrize("block_bytes", [1000, 1 << 26])
def test_the_objective_is_the_formula_and_its_gradient(block_bytes):
    train, labels, *_ = problem()
    weights = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, gradient = plain_objective(weights.numpy(), unit(train).numpy(), labels.numpy(), 6, 0.01)
    loss, found = classify._objective(weights, unit(train), labels, 0.01, block_bytes)
    assert loss.item() == pytest.approx(value, rel=1e-13)
    assert found.numpy().ravel() == pytest.approx(gradient, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_the_fit_is_scipys_minimum(l2):
    train, labels, *_ = problem()
    start = torch.zeros(9, 6, dtype=torch.float64)
    found, converged = classify.fit(unit(train), labels, l2, start, 500, 1 << 26)
    assert converged
    right = optimize.minimize(
        plain_objective, start.numpy().ravel(), (unit(train).numpy(), labels.numpy(), 6, l2),
        jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0, "maxiter": 2000},
    )  # fmt: skip
    value, _ = plain_objective(found.numpy(), unit(train).numpy(), labels.numpy(), 6, l2)
    assert value == pytest.approx(right.fun, rel=1e-5)
    right = right.x.reshape(9, 6)
    near = 0.02 * np.abs(right).max()
    assert found.numpy()[:-1] == pytest.approx(right[:-1], abs=near)
    # The same number may be added to all biases.
    bias, theirs = found.numpy()[-1], right[-1]
    assert bias - bias.mean() == pytest.approx(theirs - theirs.mean(), abs=near)


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_scikit_learn_finds_the_same(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels, test, wanted = problem()
    model = linear_model.LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000)
    model.fit(unit(train).numpy(), labels.numpy())
    start = torch.zeros(9, 6, dtype=torch.float64)
    found, _ = classify.fit(unit(train), labels, l2, start, 500, 1 << 26)
    assert found[:-1].T.numpy() == pytest.approx(model.coef_, abs=0.02 * found.abs().max().item())
    accuracy = model.score(unit(test).numpy(), wanted.numpy())
    assert linear_probe(train, labels, test, wanted, l2=l2).accuracy == accuracy


@pytest.mark.filterwarnings("error")
def test_l2_is_chosen_on_rows_held_out():
    train, labels, test, wanted = problem(spread=1.2)
    strengths = [1e-6, 1e-3, 1e-5, 1.0, 1e-7]
    found = linear_probe(train, labels, test, wanted, l2=strengths, max_iter=1000, seed=3)
    held_out = classify._held_out(labels, 3)
    assert torch.equal(torch.bincount(labels[held_out]), torch.full((6,), 5))  # of 25
    for l2 in found.validation:
        alone = linear_probe(
            train[~held_out], labels[~held_out], train[held_out], labels[held_out], l2=l2,
            max_iter=1000,
        )  # fmt: skip
        assert found.validation[l2] == alone.accuracy
        assert alone.validation == {}
    best = max(found.validation.values())
    assert found.l2 == max(l2 for l2, accuracy in found.validation.items() if accuracy == best)
    # The first that is worse than the best is the last.
    tried = list(found.validation.values())
    assert list(found.validation) == sorted(strengths, reverse=True)[: len(tried)]
    assert 2 < len(tried) < 5
    assert tried[-1] < max(tried)
    assert all(tried[i] == max(tried[: i + 1]) for i in range(len(tried) - 1))
    again = linear_probe(train, labels, test, wanted, l2=found.l2, max_iter=1000)
    assert again == (found.accuracy, found.l2, {})


def test_of_equally_good_l2_the_largest_is_taken():
    found = linear_probe(*problem(spread=0.1), l2=[1e-5, 1e-3, 1e-4])
    assert found == (1.0, 1e-3, {1e-3: 1.0, 1e-4: 1.0, 1e-5: 1.0})


def test_rows_without_labels_and_numbers_of_classes_do_not_matter():
    train, labels, test, wanted = problem()
    other = torch.tensor([70, 3, 2**40, 9, 11, 5])
    more = [torch.cat([x, torch.ones(2, 8)]) for x in (train, test)]
    theirs = [torch.cat([other[y], torch.tensor([-1, -9])]) for y in (labels, wanted)]
    assert knn_accuracy(more[0], theirs[0], more[1], theirs[1]) == knn_accuracy(
        train, labels, test, wanted
    )
    right = linear_probe(train, labels, test, wanted, l2=1e-3).accuracy
    assert linear_probe(more[0], theirs[0], more[1], theirs[1], l2=1e-3).accuracy == pytest.approx(
        right, abs=0.02  # classes are in another order, so sums are
    )  # fmt: skip


def test_a_fit_that_has_not_converged_is_told():
    arguments = problem()
    with pytest.warns(UserWarning, match="^linear_probe: ") as noticed:
        linear_probe(*arguments, l2=1e-6, max_iter=2)
    assert [str(w.message) for w in noticed] == [
        "linear_probe: L-BFGS has not converged in 2 iterations at l2 = 1e-06; max_iter allows more"
    ]
    assert noticed[0].filename == __file__


X, Y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "test: got 3 dimensions, the training rows have 4",
         lambda: knn_accuracy(X, Y, X[:, :3], Y)),
        (TypeError, "train: got list, must be a torch.Tensor [N, d]",
         lambda: linear_probe([1.0], Y, X, Y)),
        (ValueError, "train_labels: got shape [5], must be [6], one per row of train",
         lambda: knn_accuracy(X, Y[:5], X, Y)),
        (ValueError, "test_labels: no row has a label",
         lambda: knn_accuracy(X, Y, X, torch.full((6,), -1))),
        (ValueError, "test: row 1 holds NaN or a value outside fp32, it has no cosine",
         lambda: linear_probe(X, Y, torch.tensor([[1.0], [torch.nan]]).expand(2, 4), Y[:2])),
        (ValueError, "k: got [0], must be a non-empty list of ints, each at least 1",
         lambda: knn_accuracy(X, Y, X, Y, [0])),
        (ValueError, "temperature: got 0, must be a finite number above 0",
         lambda: knn_accuracy(X, Y, X, Y, temperature=0)),
        (TypeError, "temperature: got 'a', must be a number",
         lambda: knn_accuracy(X, Y, X, Y, temperature="a")),
        (ValueError, "l2: got -1.0, must be a finite number above 0",
         lambda: linear_probe(X, Y, X, Y, l2=[1.0, -1.0])),
        (ValueError, "l2: got no numbers, must be one or several above 0",
         lambda: linear_probe(X, Y, X, Y, l2=[])),
        (ValueError, "train_labels: no class has 5 rows, of which one is held out to choose among "
         "several l2; give one l2", lambda: linear_probe(X, Y, X, Y)),
        (ValueError, "max_iter: got 0, must be at least 1",
         lambda: linear_probe(X, Y, X, Y, max_iter=0)),
        (ValueError, "seed: got -1, must be from 0 to 2^63 - 1",
         lambda: linear_probe(X, Y, X, Y, seed=-1)),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
