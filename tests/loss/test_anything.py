"""The operator and the module on problems that nobody thought of."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.problems import check_conditioned, per_sample_margin, random_problem, solve

from unicom_ext import PartialMarginSoftmax, sampling
from unicom_ext.functional import partial_margin_softmax
from unicom_ext.margins import ArcFace, CombinedMargin, CosFace


# The fixture only selects kernels, so it need not be set again for each example.
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 40),
    num_classes=st.integers(2, 300),
    dim=st.integers(1, 80),
    seed=st.integers(0, 10**6),
    part=st.tuples(*[st.none() | st.floats(0, 1)] * 3),
    scale=st.sampled_from([0.1, 1.0, 16.0, 64.0, 78.0, 90.0, 300.0]),
    closeness=st.sampled_from([0.0, 1.0, 10.0]),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    margin=st.sampled_from([CombinedMargin(), ArcFace(0.5), CosFace(0.4), "per sample"]),
    beyond_pi=st.sampled_from(["keep", "linear"]),
    interclass_filter=st.sampled_from([None, 0.2]),
    workspace_bytes=st.sampled_from([0, 20_000, 256 << 20]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_anything(
    capability, batch, num_classes, dim, seed, part, closeness, size, margin, dtype, **options
):
    of_classes, of_features, of_samples = part
    sampled = None if of_classes is None else int(of_classes * num_classes)
    problem = random_problem(
        batch,
        num_classes,
        dim,
        seed=seed,
        closeness=closeness,
        sampled=None if sampled is None else max(sampled, min(batch, num_classes)),
        features=None if of_features is None else max(1, round(of_features * dim)),
        ignored=0 if of_samples is None else int(of_samples * batch),
        dtype=dtype,
        margin=per_sample_margin(batch, seed) if margin == "per sample" else margin,
        **options,
    )
    problem.embeddings.mul_(size)
    check_conditioned(solve(partial_margin_softmax, problem), problem)


@given(
    num_classes=st.integers(1, 2000),
    dim=st.integers(1, 50),
    rates=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    size=st.integers(0, 40),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_the_selection_is_that_of_the_sampling_functions(num_classes, dim, rates, size, seed, step):
    sample_rate, feature_rate = rates
    feature_rate = max(feature_rate, 1 / dim)
    module = PartialMarginSoftmax(
        dim, num_classes, sample_rate=sample_rate, feature_rate=feature_rate, seed=seed
    )
    problem = random_problem(size, num_classes, dim, ignored=size // 3)
    loss = module(problem.embeddings, problem.labels, step=step)
    positives = problem.labels[problem.labels >= 0].unique()
    classes = torch.arange(num_classes)
    if sample_rate < 1:
        classes = sampling.select_classes(num_classes, sample_rate, positives, seed=seed, step=step)
    features = torch.arange(dim)
    if feature_rate < 1:
        features = sampling.select_features(dim, feature_rate, seed=seed, step=step)
    assert torch.equal(module.last_selection.class_index, classes)
    assert torch.equal(module.last_selection.feature_index, features)
    assert torch.isin(positives, classes).all()
    assert loss.isfinite()
