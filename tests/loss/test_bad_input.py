"""Bad input: a message that names the argument, what was given and what is allowed; no change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.problems import random_problem

from unicom_ext import ArcFace, PartialMarginSoftmax, functional, reference

B, C, D = 8, 50, 6


def labels_with(*changes: tuple[int, int]) -> torch.Tensor:
    labels = torch.arange(B)
    for position, value in changes:
        labels[position] = value
    return labels


# (name of the case, arguments that replace good ones, error, what the message has to say)
TENSORS = [
    (
        "label too large",
        {"labels": labels_with((5, C))},
        ValueError,
        ["labels", "50", "position 5"],
    ),
    ("label far too large", {"labels": labels_with((2, 2**40))}, ValueError, [f"{2**40}", "2"]),
    ("label negative", {"labels": labels_with((3, -1))}, ValueError, ["labels", "-1", "3", "-100"]),
    (
        "first of several",
        {"labels": labels_with((4, 77), (2, 99), (6, -5))},
        ValueError,
        ["labels", "99", "position 2", "[0, 50)"],
    ),
    (
        "int32 label",
        {"labels": labels_with((7, -7)).int()},
        ValueError,
        ["labels", "-7", "position 7"],
    ),
    ("float labels", {"labels": torch.zeros(B)}, TypeError, ["labels", "int64", "float32"]),
    ("int16 labels", {"labels": torch.zeros(B).short()}, TypeError, ["labels", "int32", "int16"]),
    ("bool labels", {"labels": torch.zeros(B).bool()}, TypeError, ["labels", "int32", "bool"]),
    ("list of labels", {"labels": [0] * B}, TypeError, ["labels", "int32", "list"]),
    ("too few labels", {"labels": torch.zeros(5).long()}, ValueError, ["labels", "[8]", "[5]"]),
    ("one-hot", {"labels": torch.zeros(B, C).long()}, ValueError, ["labels", "[8]", "[8, 50]"]),
    ("scalar label", {"labels": torch.tensor(3)}, ValueError, ["labels", "[8]", "[]"]),
    (
        "integer embeddings",
        {"embeddings": torch.ones(B, D).long()},
        TypeError,
        ["embeddings", "float32", "int64"],
    ),
    (
        "complex embeddings",
        {"embeddings": torch.ones(B, D) * 1j},
        TypeError,
        ["embeddings", "float32", "complex64"],
    ),
    ("vector", {"embeddings": torch.ones(D)}, ValueError, ["embeddings", "matrix", "[6]"]),
    ("3-d", {"embeddings": torch.ones(B, 2, D)}, ValueError, ["embeddings", "matrix", "[8, 2, 6]"]),
    ("width", {"embeddings": torch.ones(B, D + 1)}, ValueError, ["embeddings", "6", "[8, 7]"]),
    ("None", {"embeddings": None}, TypeError, ["embeddings", "float32", "None"]),
    (
        "labels elsewhere",
        {"labels": torch.zeros(B, device="meta").long()},
        ValueError,
        ["labels", "cpu", "meta"],
    ),
    (
        "margin of another batch size",
        {"margin": ArcFace(torch.zeros(B + 1))},
        ValueError,
        ["m2", "[8]", "[9]"],
    ),
    (
        "margin elsewhere",
        {"margin": ArcFace(torch.zeros(B, device="meta"))},
        ValueError,
        ["m2", "cpu", "meta"],
    ),
    ("a number as margin", {"margin": 0.5}, TypeError, ["margin", "ArcFace(0.3)", "0.5"]),
]

OPTIONS = [
    ("zero scale", {"scale": 0.0}, ValueError, ["scale", "> 0", "0.0"]),
    ("negative scale", {"scale": -64.0}, ValueError, ["scale", "> 0", "-64.0"]),
    ("infinite scale", {"scale": math.inf}, ValueError, ["scale", "finite", "inf"]),
    ("NaN scale", {"scale": math.nan}, ValueError, ["scale", "finite", "nan"]),
    ("word as scale", {"scale": "64"}, TypeError, ["scale", "number", "64"]),
    ("filter above 1", {"interclass_filter": 1.5}, ValueError, ["interclass_filter", "1", "1.5"]),
    (
        "NaN filter",
        {"interclass_filter": math.nan},
        ValueError,
        ["interclass_filter", "[-1, 1]", "nan"],
    ),
    (
        "margin_grad",
        {"margin_grad": "none"},
        ValueError,
        ["margin_grad", "straight_through", "exact", "'none'"],
    ),
    ("beyond_pi", {"beyond_pi": True}, ValueError, ["beyond_pi", "keep", "linear", "True"]),
    ("precision", {"precision": "tf32"}, ValueError, ["precision", "bf16", "'tf32'"]),
    ("reduction", {"reduction": "avg"}, ValueError, ["reduction", "mean", "none", "'avg'"]),
    ("ignore_index", {"ignore_index": None}, TypeError, ["ignore_index", "int", "None"]),
]

SELECTIONS = [
    ("label not in S", torch.arange(B - 1), ValueError, ["class_index", "7", "position 7"]),
    ("unsorted", torch.arange(C).flip(0), ValueError, ["class_index", "sorted", "48"]),
    ("repeated", torch.arange(C).repeat_interleave(2), ValueError, ["class_index", "unique", "0"]),
    ("too large", torch.arange(C + 1), ValueError, ["class_index", "[0, 50)", "50"]),
    ("negative", torch.arange(-1, C), ValueError, ["class_index", "[0, 50)", "-1"]),
    ("int32", torch.arange(C).int(), TypeError, ["class_index", "int64", "int32"]),
    ("mask", torch.ones(C).bool(), TypeError, ["class_index", "int64", "bool"]),
    ("matrix", torch.arange(C)[None], ValueError, ["class_index", "vector", "[1, 50]"]),
    ("list", list(range(C)), TypeError, ["class_index", "int64", "list"]),
    (
        "elsewhere",
        torch.arange(C, device="meta"),
        ValueError,
        ["class_index", "cpu", "meta"],
    ),
]

PROTOTYPES = [
    ("vector", torch.ones(D), ValueError, ["prototypes", "matrix", "[6]"]),
    ("no class", torch.ones(0, D), ValueError, ["prototypes", "[0, 6]"]),
    ("integers", torch.ones(C, D).int(), TypeError, ["prototypes", "float32", "int32"]),
    ("elsewhere", torch.ones(C, D, device="meta"), ValueError, ["prototypes", "cpu", "meta"]),
]

FEATURES = [
    ("none", torch.arange(0), ValueError, ["feature_index", "at least one"]),
    ("too large", torch.arange(D + 1), ValueError, ["feature_index", "[0, 6)", "6"]),
    ("negative", torch.arange(-1, D), ValueError, ["feature_index", "[0, 6)", "-1"]),
    ("unsorted", torch.arange(D).flip(0), ValueError, ["feature_index", "sorted", "4"]),
    ("int32", torch.arange(D).int(), TypeError, ["feature_index", "int64", "int32"]),
    ("matrix", torch.arange(D)[None], ValueError, ["feature_index", "vector", "[1, 6]"]),
]


def cases(*tables: list[tuple]):
    rows = [row for table in tables for row in table]
    return pytest.mark.parametrize(
        ("changes", "error", "words"),
        [row[1:] for row in rows],
        ids=[row[0].replace(" ", "-") for row in rows],
    )


def named(name: str, table: list[tuple]) -> list[tuple]:
    return [(f"{name}: {case}", {name: value}, error, words) for case, value, error, words in table]


def arguments(**changes) -> dict:
    problem = random_problem(B, C, D)
    good = {
        "embeddings": problem.embeddings,
        "labels": labels_with(),
        "prototypes": problem.prototypes,
        "margin": ArcFace(0.3),
        "scale": 64.0,
    }
    return {**good, **changes}


def assert_says(message: str, words: list[str]) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def call(implementation, arguments: dict):
    positional = [arguments.pop(name) for name in ("embeddings", "labels", "prototypes")]
    return implementation(*positional, **arguments)


@pytest.mark.parametrize(
    "implementation", [functional.partial_margin_softmax, reference.partial_margin_softmax],
    ids=["op", "reference"],
)  # fmt: skip
@cases(
    TENSORS,
    OPTIONS,
    named("class_index", SELECTIONS),
    named("feature_index", FEATURES),
    named("prototypes", PROTOTYPES),
)
def test_the_function_says_what_is_wrong(implementation, changes, error, words):
    with pytest.raises(error) as caught:
        call(implementation, arguments(**changes))
    assert_says(str(caught.value), words)


@cases(TENSORS)
def test_a_bad_call_of_the_module_changes_nothing(changes, error, words):
    module = PartialMarginSoftmax(D, C, sample_rate=0.5, feature_rate=0.5)
    good = arguments()
    module(good["embeddings"], good["labels"])
    weight = module.weight.detach().clone()
    selection, metrics = module.last_selection, module.last_metrics
    bad = arguments(**changes)
    with pytest.raises(error) as caught:
        module(bad["embeddings"], bad["labels"], margin=bad["margin"])
    assert_says(str(caught.value), words)
    assert int(module.step) == 1
    assert torch.equal(module.weight, weight)
    assert module.weight.grad is None
    for before, after in (
        *zip(selection, module.last_selection, strict=True),
        *zip(metrics, module.last_metrics, strict=True),
    ):
        assert torch.equal(before, after)
    # And it goes on as if nothing had happened.
    untouched = PartialMarginSoftmax(D, C, sample_rate=0.5, feature_rate=0.5)
    untouched(good["embeddings"], good["labels"])
    for one in (module, untouched):
        one(good["embeddings"], good["labels"])
    assert torch.equal(module.last_selection.class_index, untouched.last_selection.class_index)


@cases(OPTIONS)
def test_the_module_refuses_bad_options_when_it_is_made(changes, error, words):
    with pytest.raises(error) as caught:
        PartialMarginSoftmax(D, C, **changes)
    assert_says(str(caught.value), words)


@pytest.mark.parametrize(
    ("name", "allowed"), [("sample_rate", "[0, 1]"), ("feature_rate", "(0, 1]")]
)
@pytest.mark.parametrize("rate", [-0.1, -1e-300, 1.0001, math.nan, math.inf])
def test_rates_are_in_0_1(name, allowed, rate):
    with pytest.raises(ValueError, match=name) as caught:
        PartialMarginSoftmax(D, C, **{name: rate})
    assert str(caught.value) == f"{name} must be in {allowed}, got {rate}"


def test_a_feature_rate_of_0():
    with pytest.raises(ValueError, match=r"^feature_rate must be in \(0, 1\], got 0.0$"):
        PartialMarginSoftmax(D, C, feature_rate=0.0)


@pytest.mark.parametrize(
    ("name", "allowed"), [("sample_rate", "[0, 1]"), ("feature_rate", "(0, 1]")]
)
def test_rates_are_numbers(name, allowed):
    with pytest.raises(TypeError) as caught:
        PartialMarginSoftmax(D, C, **{name: "0.5"})
    assert str(caught.value) == f"{name} must be a number in {allowed}, got str: '0.5'"


def test_a_feature_rate_that_leaves_no_dimension():
    with pytest.raises(ValueError, match="feature_rate") as caught:
        PartialMarginSoftmax(D, C, feature_rate=0.01)
    assert_says(str(caught.value), ["0.01", "6"])


@pytest.mark.parametrize("name", ["embedding_size", "num_classes"])
@pytest.mark.parametrize("size", [0, -5, 2.5, "7", None, True])
def test_sizes_are_positive_integers(name, size):
    sizes = {"embedding_size": D, "num_classes": C, name: size}
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        PartialMarginSoftmax(**sizes)
    assert_says(str(caught.value), [">= 1", repr(size)])


def test_sizes_and_seed_may_be_numpys():
    labels = np.array([3, 0, 49])
    module = PartialMarginSoftmax(np.int32(D), labels.max() + 1, seed=np.int64(3))
    assert (module.embedding_size, module.num_classes, module.seed) == (D, 50, 3)
    assert all(type(n) is int for n in (module.embedding_size, module.num_classes, module.seed))


@pytest.mark.parametrize("dtype", [torch.int32, "float32"])
def test_prototypes_are_floating_point(dtype):
    with pytest.raises(TypeError, match="dtype must be") as caught:
        PartialMarginSoftmax(D, C, dtype=dtype)
    assert_says(str(caught.value), ["torch.bfloat16", repr(dtype)])


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5, "a", None])
def test_the_seed_is_an_int64(seed):
    with pytest.raises((ValueError, TypeError), match="seed") as caught:
        PartialMarginSoftmax(D, C, seed=seed)
    assert_says(str(caught.value), ["int64", repr(seed)])


@pytest.mark.parametrize("step", [0.5, "1", True, torch.tensor(0.5), torch.zeros(2).long()])
def test_the_step_is_an_integer(step):
    module, good = PartialMarginSoftmax(D, C), arguments()
    with pytest.raises((ValueError, TypeError), match="step must be an int"):
        module(good["embeddings"], good["labels"], step=step)


@pytest.mark.parametrize("size", [-1, 0.5, "1M", None])
def test_the_workspace_is_a_number_of_bytes(size):
    for make in (
        lambda: PartialMarginSoftmax(D, C, workspace_bytes=size),
        lambda: call(functional.partial_margin_softmax, arguments(workspace_bytes=size)),
    ):
        with pytest.raises((ValueError, TypeError), match="workspace_bytes") as caught:
            make()
        assert_says(str(caught.value), [">= 0", repr(size)])


def test_a_process_group_must_be_one():
    for make in (
        lambda: PartialMarginSoftmax(D, C, process_group=object()),
        lambda: call(
            functional.partial_margin_softmax, arguments(process_group=object(), num_classes=C)
        ),
    ):
        with pytest.raises(ValueError, match=r"process_group must be .* got <object"):
            make()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite(value):
    embeddings = arguments()["embeddings"].clone()
    embeddings[3, 1] = value
    for implementation in (functional.partial_margin_softmax, reference.partial_margin_softmax):
        assert call(implementation, arguments(embeddings=embeddings)).isnan()
        with pytest.raises(ValueError, match=r"embeddings must be finite.*row 3"):
            call(implementation, arguments(embeddings=embeddings, check_inputs=True))
    module = PartialMarginSoftmax(D, C, sample_rate=0.5, check_inputs=True)
    with pytest.raises(ValueError, match=r"embeddings must be finite.*row 3"):
        module(embeddings, labels_with())
    assert int(module.step) == 0
    assert module.last_selection is None
    module.check_inputs = False
    loss = module(embeddings, labels_with())
    assert loss.isnan()
    loss.backward()


def test_finite_embeddings_pass_the_check():
    good = arguments(check_inputs=True)
    good["embeddings"] = good["embeddings"] * 1e30  # their squares are not finite
    assert call(functional.partial_margin_softmax, good).isfinite()


@pytest.mark.parametrize(
    ("reals", "codes", "message"),
    [
        ([1.0] * 5, [0] * 7 + [1, 0], r"reals must be \[m1, .*, label_smoothing\], got 5 values"),
        ([1.0] * 7, [0] * 7 + [1, 0], r"reals must be .*, got 7 values"),
        ([0.5] * 6, [0] * 8, r"codes must be \[exact_margin_grad, .*, got 8 values"),
        ([0.5] * 6, [0, 0, 3, 0, 0, 0, 0, 1, 0], r"precision must be 0, 1 or 2, got 3"),
        ([0.5] * 6, [0, 0, 0, -1, 0, 0, 0, 1, 0], r"reduction must be 0, 1 or 2, got -1"),
        (
            [0.5, 0.0, 0.0, math.nan, 2.0, 0.0],
            [0] * 7 + [1, 0],
            r"scale must be a finite number > 0, got nan",
        ),
        ([1.0] * 6, [0] * 7 + [1, 0], r"label_smoothing must be in \[0, 1\), got 1"),
        ([0.5] * 6, [0, 0, 0, 0, 2, 0, 0, 1, 0], r"multi_label must be 0 or 1, got 2"),
        ([0.5] * 6, [0, 0, 0, 0, 0, -5, 0, 1, 0], r"workspace_bytes must be at least 0, got -5"),
        ([0.5] * 6, [0] * 9, r"num_centers must be at least 1, got 0"),
        ([0.5] * 6, [0] * 7 + [2, 0], r"label_smoothing must be 0 with several centers, got 0\.5"),
        (
            [0.5] * 5 + [0.0],
            [0] * 7 + [7, 0],
            r"prototypes must have num_centers = 7 rows for each ",
        ),
        (
            [0.5] * 5 + [0.0],
            [0] * 7 + [25, 0],
            r"num_centers must be at most 16 in this .*, got 25",
        ),
    ],
)
def test_lists_of_options_that_operators_take(reals, codes, message):
    tensors = [arguments()[name] for name in ("embeddings", "labels", "prototypes")]
    with pytest.raises(ValueError, match=message):
        torch.ops.unicom_ext.loss(*tensors, None, None, None, None, None, None, reals, codes)
