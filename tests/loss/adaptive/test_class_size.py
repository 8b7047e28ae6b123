"""Margins by the sizes of classes."""

from __future__ import annotations

import math

import pytest
import torch

from unicom_ext import PartialMarginSoftmax
from unicom_ext.margins import ArcFace, ClassSizeMargin

COUNTS = torch.tensor([1, 16, 81, 256, 10_000])


def test_is_the_papers():
    margins = ClassSizeMargin(COUNTS)
    # n^(-1/4) is 1, 1/2, 1/3, 1/4 and 1/10.
    a = (0.5 - 0.05) / (1 - 0.1)
    b = 0.5 - a
    right = a * torch.tensor([1, 1 / 2, 1 / 3, 1 / 4, 1 / 10]) + b
    torch.testing.assert_close(margins.margins, right)
    given = margins(torch.zeros(4, 2), torch.tensor([4, 0, -100, 2]))
    torch.testing.assert_close(given.m2[[0, 1, 3]], torch.tensor([0.05, 0.5, a / 3 + b]))
    assert given.m2.isfinite().all()
    assert (given.m1, given.m3) == (1.0, 0.0)


def test_its_options():
    margins = ClassSizeMargin(torch.tensor([4, 1, 2]), 0.1, 0.4, exponent=1, ignore_index=9)
    torch.testing.assert_close(margins.margins, torch.tensor([0.1, 0.4, 0.2]))
    assert margins(torch.zeros(1, 1), torch.tensor([9])).m2.isfinite().all()


def test_classes_without_samples_and_classes_of_one_size():
    torch.testing.assert_close(
        ClassSizeMargin(torch.tensor([0, 16, 1, 0])).margins, torch.tensor([0.5, 0.05, 0.5, 0.5])
    )
    assert ClassSizeMargin(torch.tensor([7, 7, 0])).margins.tolist() == [0.5] * 3
    assert ClassSizeMargin(COUNTS, 0.2, 0.2).margins.tolist() == pytest.approx([0.2] * 5)


def test_from_labels_counts():
    labels = torch.tensor([[0, 1, 1], [3, -100, 1]], dtype=torch.int32)
    right = ClassSizeMargin(torch.tensor([1, 3, 0, 1, 0]), 0.1)
    assert torch.equal(ClassSizeMargin.from_labels(labels, 5, smallest=0.1).margins, right.margins)
    with pytest.raises(
        ValueError, match=r"^labels must be in \[0, num_classes = 3\) or ignore_index, got 3"
    ):
        ClassSizeMargin.from_labels(labels, 3)
    with pytest.raises(ValueError, match=r"got -100$"):
        ClassSizeMargin.from_labels(labels, 5, ignore_index=-1)


def test_the_loss_takes_them_and_state_dict_has_them():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, -100])
    margins, other = ClassSizeMargin(COUNTS), ClassSizeMargin(COUNTS.flip(0))
    assert margins(x, y) != other(x, y)
    other.load_state_dict(margins.state_dict())
    assert margins(x, y) == other(x, y)
    loss = PartialMarginSoftmax(4, 5, scale=8.0)
    value = loss(x, y, margin=margins(x, y))
    unit = torch.nn.functional.normalize
    cosine = (unit(x) @ unit(loss.weight.detach()).T)[:5]
    target = (cosine.diag().arccos() + margins.margins).cos()
    right = torch.nn.functional.cross_entropy(8 * cosine.diagonal_scatter(target), y[:5])
    torch.testing.assert_close(value.detach(), right, rtol=1e-5, atol=0)


def test_each_of_several_positives_has_its_classs_margin():
    x = torch.randn(2, 4)
    positives = torch.tensor([[0, 4], [-100, 2]])
    margins = ClassSizeMargin(COUNTS)
    loss = PartialMarginSoftmax(4, 5, scale=8.0, reduction="none")
    value = loss(x, positives, margin=margins(x, positives))
    alone = [
        loss(x[[i]], torch.tensor([y]), margin=ArcFace(float(margins.margins[y])))
        for i, y in ((0, 0), (0, 4), (1, 2))
    ]
    torch.testing.assert_close(value[1:], alone[2], rtol=1e-6, atol=0)
    # Without each other among the negatives both positives' losses are smaller than alone.
    assert value[0] < (alone[0] + alone[1]) / 2
    swapped = loss(x, positives.flip(1), margin=margins(x, positives.flip(1)))
    torch.testing.assert_close(swapped, value, rtol=1e-6, atol=0)


def test_a_compiled_graph_gives_nan_for_what_is_no_class():
    margins = ClassSizeMargin(COUNTS)
    m2 = torch.compile(lambda y: margins(y, y).m2, fullgraph=True, backend="eager")
    assert m2(torch.tensor([0, 5, -100, -1])).isnan().tolist() == [False, True, False, True]


def test_vmap_has_the_margins_of_each_batch():
    margins = ClassSizeMargin(COUNTS)
    y = torch.tensor([[0, 1], [-100, 4], [5, 2]])
    given = torch.func.vmap(lambda y: margins(y, y).m2)(y)
    assert torch.equal(given[:2], torch.stack([margins(y, y).m2 for y in y[:2]]))
    assert given[2].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("counts", "options", "error", "message"),
    [
        ([1, 2], {}, TypeError, r"counts must be a tensor of integers \[C\], got list"),
        (COUNTS.float(), {}, TypeError, r"counts must be .*, got a torch.float32 tensor"),
        (COUNTS[None], {}, ValueError, r"counts must be .*, got the shape \[1, 5\]"),
        (torch.tensor([1, -2]), {}, ValueError, "counts must be >= 0, got -2 at position 1"),
        (torch.tensor([0, 0]), {}, ValueError, "counts must have a class with samples, got none"),
        (COUNTS[:0], {}, ValueError, "counts must have a class with samples, got none"),
        (COUNTS, {"smallest": -0.1}, ValueError, r"smallest must be a number in \[0, 3.14159\]"),
        (COUNTS, {"largest": 0.01}, ValueError, r"largest must be a number in \[0.05, 3.14159\]"),
        (COUNTS, {"exponent": 0}, ValueError, "exponent must be a finite number > 0, got 0"),
        (COUNTS, {"exponent": math.inf}, ValueError, "exponent must be a finite .*, got inf"),
    ],
)
def test_a_bad_option_is_named(counts, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ClassSizeMargin(counts, **options)


def test_a_bad_label_is_named():
    margins = ClassSizeMargin(COUNTS)
    for bad in (5, -1):
        with pytest.raises(
            ValueError,
            match=rf"^labels must be in \[0, 5\) or ignore_index \(-100\), got {bad} "
            r"at position \[1\]",
        ):
            margins(torch.zeros(2, 1), torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"^labels must be an int32 or int64 tensor, got list"):
        margins(torch.zeros(2, 1), [0, 1])
