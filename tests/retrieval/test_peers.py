"""The same figures as PyTorch Metric Learning and scikit-learn have, where these are installed, and
as benchmarks define them. Of what is measured elsewhere see the definitions in
unicom_ext/retrieval/metrics.py."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from unicom_ext.retrieval import evaluate


def problem(seed, n=400, m=300, dim=16, classes=23):
    """Queries and gallery, whose classes have from 1 to some 30 rows."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    parts = []
    for rows in (n, m):
        labels = (torch.rand(rows, generator=generator).square() * classes).long()
        x = centers[labels] + 0.9 * torch.randn(rows, dim, generator=generator)
        parts += [torch.nn.functional.normalize(x, dim=1), labels]
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("among_the_others", [True, False])
def test_pytorch_metric_learning_finds_the_same(among_the_others):
    pytest.importorskip("pytorch_metric_learning", exc_type=ImportError)
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    logging.getLogger("PML").setLevel(logging.ERROR)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count", knn_func=CustomKNN(CosineSimilarity()), device=torch.device("cpu"),
    )  # fmt: skip
    for seed in range(3):
        x, labels, y, among = problem(seed)
        if among_the_others:
            right = calculator.get_accuracy(x, labels)
            (found,) = evaluate(x, labels, ks=[1])
        else:
            right = calculator.get_accuracy(x, labels, y, among)
            (found,) = evaluate(x, labels, y, among, ks=[1])
        assert found.recall[1] == pytest.approx(right["precision_at_1"], abs=1e-6)
        assert found.r_precision == pytest.approx(right["r_precision"], abs=1e-6)
        assert found.map_at_r == pytest.approx(right["mean_average_precision_at_r"], abs=1e-6)
        assert 0.3 < found.map_at_r < 0.9


def test_scikit_learns_average_precision_is_map_at_all_of_the_gallery():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(3):
        x, labels, y, among = problem(seed)
        (found,) = evaluate(x, labels, y, among, ks=[len(y)])
        cosine = (x.double() @ y.double().T).numpy()
        right = [
            metrics.average_precision_score(among.numpy() == label, of_query)
            for of_query, label in zip(cosine, labels.tolist(), strict=True)
            if (among == label).any()
        ]
        assert found.num_queries == len(right)
        assert found.map_at_k[len(y)] == pytest.approx(np.mean(right), abs=1e-9)


def test_queries_and_gallery_of_in_shop():
    """DeepFashion In-Shop: queries are other photos of the gallery's items, so nothing is left out
    and there are no groups; Recall@K for K = 1, 10, 20, 30."""
    items = torch.eye(40)
    gallery, gallery_labels = items[:35].repeat(2, 1), torch.arange(35).repeat(2)
    queries = items[:20] + 0.1
    queries[:4] = items[[36, 37, 38, 39]]  # look like nothing in the gallery
    queries[4] = items[5] + 0.5 * items[4]  # like another item first, of which there are two photos
    (found,) = evaluate(queries, torch.arange(20), gallery, gallery_labels, ks=[1, 10, 20, 30])
    # What is like nothing is as far from all 70 photos, of which two are right, and come last.
    assert found.recall == {1: 15 / 20, 10: 16 / 20, 20: 16 / 20, 30: 16 / 20}
    assert (found.num_queries, found.num_excluded) == (20, 0)
