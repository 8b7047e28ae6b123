"""`topk` and `logits` of the loss in one process, against all cosines in double."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.memory import LiveBytes

from unicom_ext import ArcFace, NearestClasses, PartialMarginSoftmax
from unicom_ext.utils import search

CPU_ONLY = True


def make(num_classes=300, dim=24, dtype=torch.float32, **options) -> PartialMarginSoftmax:
    options = {"sample_rate": 0.1, "feature_rate": 0.5, "scale": 30.0, **options}
    return PartialMarginSoftmax(dim, num_classes, dtype=dtype, **options)


def unit(x):
    x = x.detach().double().numpy()
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def all_cosines(x, loss):
    return unit(x) @ unit(loss.weight).T


def right_topk(x, loss, k):
    """Sorted by the cosine in float32, then by id."""
    cosine = all_cosines(x, loss).astype(np.float32)
    ids = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, ids, 1), ids


def check_topk(x, loss, k):
    found = loss.topk(x, k)
    assert isinstance(found, NearestClasses)
    cosine, ids = right_topk(x, loss, k)
    assert (found.cosine.dtype, found.class_index.dtype) == (torch.float32, torch.int64)
    assert not found.cosine.requires_grad
    np.testing.assert_allclose(found.cosine.numpy(), cosine, rtol=0, atol=6e-8)
    assert np.array_equal(found.class_index.numpy(), ids)


@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(1, 9), st.data(),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_topk_is_the_largest_of_all_cosines(batch, num_classes, dim, data, of_x, of_weight):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    loss = make(num_classes, dim, of_weight, feature_rate=1.0)
    x = (torch.randn(batch, dim) * 5).to(of_x)
    check_topk(x, loss, data.draw(st.integers(1, num_classes)))


def test_topk_meets_the_classes_in_blocks(monkeypatch):
    monkeypatch.setattr(search, "block_shape", lambda *_: (3, 7))
    check_topk(torch.randn(11, 24), make(), 20)


def test_the_memory_of_topk_does_not_grow_with_all_cosines(monkeypatch):
    monkeypatch.setattr("unicom_ext.loss.inference.DEFAULT_BLOCK_BYTES", 1 << 16)
    loss, x = make(1000, 8, feature_rate=1.0), torch.randn(100, 8)
    with LiveBytes(x, loss.weight) as memory:
        loss.topk(x, 5)
    assert memory.peak < (1 << 16) + 100 * (4 * 5 * 12 + 32) < 100 * 1000 * 4 / 4


def test_of_equal_classes_the_lower_ids_come_first(monkeypatch):
    monkeypatch.setattr(search, "block_shape", lambda *_: (2, 4))
    loss = make(9, 4, feature_rate=1.0)
    directions = torch.tensor([[1.0, 1, 1, 1], [1.0, -1, 1, -1], [0, 0, 0, 0]])
    lengths = torch.tensor([3.0, 0.25, 8, 1, 2, 5, 6, 7, 9])
    loss.weight.data = directions[[1, 0, 2, 0, 1, 1, 2, 0, 0]] * lengths[:, None]
    found = loss.topk(torch.tensor([[2.0, 2, 2, 2], [-3.0, -3, -3, -3], [0, 0, 0, 0]]), 7)
    assert found.class_index.tolist() == [
        [1, 3, 7, 8, 0, 2, 4],
        [0, 2, 4, 5, 6, 1, 3],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert found.cosine.tolist() == [[1.0] * 4 + [0.0] * 3, [0.0] * 5 + [-1.0] * 2, [0.0] * 7]


def test_classes_that_float32_cannot_tell_apart_in_products_are_told_apart():
    # Cosines a few float32 steps apart, where a product in float32 errs by more.
    torch.manual_seed(0)
    x = torch.randn(1, 512, dtype=torch.float64)
    away = torch.randn(64, 512, dtype=torch.float64)
    loss = make(64, 512)
    loss.weight.data = (x / x.norm() + 0.02 * away / away.norm(dim=1, keepdim=True)).float()
    cosine = all_cosines(x, loss)[0]
    assert np.diff(np.sort(cosine)).min() < 1e-6
    check_topk(x.float(), loss, 64)


def test_logits_are_scaled_cosines():
    loss = make(margin=ArcFace(0.5))
    x = torch.randn(5, 24)
    x[2] = 0
    loss.weight.data[7] = 0
    ids = torch.tensor([7, 299, 0, 7, 13, 13])
    right = torch.from_numpy(30.0 * all_cosines(x, loss))
    for class_index in (ids, ids.int()):
        found = loss.logits(x, class_index)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right[:, ids].float(), rtol=1e-7, atol=1e-7)
        assert found[2].count_nonzero() == found[:, 0].count_nonzero() == 0
    torch.testing.assert_close(loss.logits(x), right.float(), rtol=1e-7, atol=1e-7)
    assert loss.logits(x, ids[:0]).shape == (5, 0)
    assert loss.logits(x[:0]).shape == (0, 300)


@pytest.mark.parametrize("scale", [7.5, torch.tensor([7.5], requires_grad=True)], ids=str)
def test_logits_of_a_scale_of_the_call(scale):
    loss, x = make(), torch.randn(5, 24)
    ids = torch.tensor([7, 299])
    found = loss.logits(x, ids, scale=scale)
    right = torch.from_numpy(7.5 * all_cosines(x, loss)[:, ids]).float()
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-7)
    assert not found.requires_grad
    assert loss.scale == 30.0


def test_a_bad_scale_of_logits_is_named():
    with pytest.raises(ValueError, match=r"^scale must be a finite number > 0, got -1\.0$"):
        make().logits(torch.randn(5, 24), scale=torch.tensor(-1.0))
    with pytest.raises(TypeError, match=r"^scale must be a number, got str: 'a'$"):
        make().logits(torch.randn(5, 24), scale="a")


def test_logits_do_not_depend_on_blocks(monkeypatch):
    loss, x = make(), torch.randn(5, 24)
    whole = loss.logits(x)
    monkeypatch.setattr("unicom_ext.loss.inference.DEFAULT_BLOCK_BYTES", 2000)
    torch.testing.assert_close(loss.logits(x), whole, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("of_x", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_float64_where_an_input_is(of_x, of_weight):
    loss, x = make(dtype=of_weight), torch.randn(5, 24).to(of_x)
    wide = torch.float64 in (of_x, of_weight)
    right = torch.from_numpy(30.0 * all_cosines(x, loss))
    found = loss.logits(x)
    assert found.dtype == (torch.float64 if wide else torch.float32)
    precision = 1e-14 if wide else 1e-7
    torch.testing.assert_close(found.double(), right, rtol=precision, atol=precision)


def test_they_see_all_classes_and_dimensions_and_change_nothing():
    loss, x = make().train(), torch.randn(4, 24, requires_grad=True)
    loss(x, torch.arange(4))
    before, metrics, selection = copy.deepcopy(loss.state_dict()), loss.last_metrics, loss._drawn
    cosine, ids = loss.topk(x, 300)
    logits = loss.logits(x)
    assert torch.allclose(logits.gather(1, ids), 30 * cosine)
    assert not logits.requires_grad
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert loss.last_metrics is metrics
    assert loss._drawn is selection
    for training in (loss, loss.eval()):
        assert torch.equal(training.logits(x), logits)


def test_autocast_changes_nothing():
    loss, x = make(), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = loss.topk(x, 5), loss.logits(x)
    assert torch.equal(found.cosine, loss.topk(x, 5).cosine)
    assert torch.equal(logits, loss.logits(x))


@pytest.mark.parametrize(
    ("k", "kind", "message"),
    [
        (0, ValueError, "k must be an integer in [1, 300], got 0"),
        (301, ValueError, "k must be an integer in [1, 300], got 301"),
        (2.0, TypeError, "k must be an integer in [1, 300], got 2.0"),
    ],
)
def test_bad_k(k, kind, message):
    with pytest.raises(kind) as raised:
        make().topk(torch.randn(2, 24), k)
    assert str(raised.value) == message


BAD_EMBEDDINGS = {
    "list": ([[1.0]], TypeError, "embeddings must be a float32, float64, bfloat16 or float16 "
             "tensor, got list"),
    "int": (torch.ones(2, 24).int(), TypeError, "embeddings must be a float32, float64, bfloat16 "
            "or float16 tensor, got a torch.int32 tensor"),
    "vector": (torch.ones(24), ValueError, "embeddings must be a matrix, got the shape [24]"),
    "dimensions": (torch.ones(2, 23), ValueError,
                   "embeddings must be [B, 24] like the prototypes [300, 24], got [2, 23]"),
    "device": (torch.ones(2, 24, device="meta"), ValueError,
               "embeddings must be on cpu like the prototypes, got meta"),
    "nan": (torch.tensor([0.0, torch.nan])[:, None].expand(2, 24), ValueError,
            "embeddings: row 1 holds NaN or a value outside fp32, it has no cosine"),
}  # fmt: skip


@pytest.mark.parametrize("call", [lambda loss, x: loss.topk(x, 2), lambda loss, x: loss.logits(x)])
@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_bad_embeddings(name, call):
    x, kind, message = BAD_EMBEDDINGS[name]
    with pytest.raises(kind) as raised:
        call(make(), x)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("class_index", "kind", "message"),
    [
        ([1], TypeError, "class_index must be None or an int32 or int64 tensor, got list"),
        (torch.ones(2), TypeError,
         "class_index must be None or an int32 or int64 tensor, got torch.float32"),
        (torch.zeros(1, 2).long(), ValueError,
         "class_index must be a vector, got the shape [1, 2]"),
        (torch.zeros(1, device="meta").long(), ValueError,
         "class_index must be on cpu like the prototypes, got meta"),
        (torch.tensor([4, 300]), ValueError,
         "class_index must be in [0, 300), got 300 at position 1"),
        (torch.tensor([4, 2, -1]), ValueError,
         "class_index must be in [0, 300), got -1 at position 2"),
    ],
)  # fmt: skip
def test_bad_classes(class_index, kind, message):
    with pytest.raises(kind) as raised:
        make().logits(torch.randn(2, 24), class_index)
    assert str(raised.value) == message


def test_prototypes_that_are_not_finite_are_named():
    loss, x = make(), torch.randn(2, 24)
    loss.weight.data[70, 3] = torch.inf
    message = "prototypes: row 70 holds NaN or a value outside fp32, it has no cosine"
    for call in (lambda: loss.topk(x, 1), lambda: loss.logits(x, torch.tensor([5, 70]))):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()


def test_prototypes_without_values_are_refused():
    loss = make(device="meta").to_empty(device="cpu")
    for call in (lambda: loss.topk(torch.ones(1, 24), 1), lambda: loss.logits(torch.ones(1, 24))):
        with pytest.raises(RuntimeError, match="have no values: call reset_parameters"):
            call()
