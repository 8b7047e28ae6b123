"""Codes and what is found by them, against NumPy and faiss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.memory import LiveBytes

from unicom_ext.retrieval import encode, evaluate


def random_rows(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_are_numpys(dtype):
    x = random_rows(40, 13, dtype=dtype)
    x[3] = 0
    rows = x.double().numpy()
    largest = np.abs(rows).max(1, keepdims=True)
    right = np.rint(rows / np.where(largest == 0, 1, largest) * 127)
    code = encode(x, "int8")
    assert code.dtype == torch.int8
    assert np.array_equal(code.numpy(), right)
    assert code.abs().max() == 127
    assert torch.equal(encode(4 * x, "int8"), code)  # a row's length is nothing
    cosine = torch.nn.functional.cosine_similarity(code.double(), x.double())
    assert (cosine[torch.arange(40) != 3] > 0.9999).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 13, 64])
def test_binary_codes_are_packed_as_numpy_does(dim, dtype):
    x = random_rows(20, dim, dtype=dtype)
    x[2] = 0
    x[3] = -0.0
    code = encode(x, "binary")
    assert code.dtype == torch.uint8
    assert np.array_equal(code.numpy(), np.packbits(x.double().numpy() > 0, axis=1))


def oracle(score, labels, among, ks):
    """Recall@K and mAP@R of exact scores by full sorting, ties against the model."""
    recall, average = dict.fromkeys(ks, 0.0), 0.0
    for of_query, label in zip(score, labels, strict=True):
        wrong = among != label
        right = ~wrong[np.lexsort((~wrong, -of_query))]
        r = right.sum()
        terms = right * np.cumsum(right) / np.arange(1, len(right) + 1)
        average += terms[:r].sum() / r / len(labels)
        for k in ks:
            recall[k] += right[:k].any() / len(labels)
    return pytest.approx(recall, abs=1e-12), pytest.approx(average, abs=1e-12)


@pytest.mark.parametrize("block_bytes", [10_000, 1 << 26])
@pytest.mark.parametrize("dim", [3, 24, 37])
def test_binary_codes_are_ranked_by_their_hamming_distance(dim, block_bytes):
    """Of which many are equal: of 300 rows at most dim + 1 are told apart."""
    x, y = random_rows(30, 40), random_rows(300, 40, seed=1)
    labels, among = torch.arange(30) % 7, torch.arange(300) % 7
    bits = [np.unpackbits(encode(rows[:, :dim], "binary").numpy(), axis=1) for rows in (x, y)]
    hamming = (bits[0][:, None] != bits[1]).sum(2)
    (found,) = evaluate(
        x, labels, y, among, dims=[dim], ks=[1, 9], codes="binary", block_bytes=block_bytes
    )
    assert (found.recall, found.map_at_r) == oracle(-hamming, labels.numpy(), among.numpy(), (1, 9))
    assert found.codes == "binary"


@pytest.mark.parametrize("dim", [3, 40])
def test_int8_codes_are_ranked_by_their_cosine(dim):
    """From integers; squares of cosines with the sign, as fractions of one denominator."""
    x, y = random_rows(60, 40), random_rows(300, 40, seed=1)
    y[100:200] = y[:100] * 3  # ties
    labels, among = torch.arange(60) % 7, torch.arange(300) % 5
    q, g = (encode(rows[:, :dim], "int8").double().numpy() for rows in (x, y))
    cosine = (q @ g.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(g, axis=1)
    keep = labels < 5
    (found,) = evaluate(x[keep], labels[keep], y, among, dims=[dim], ks=[1, 9], codes="int8")
    assert (found.recall, found.map_at_r) == oracle(
        cosine[keep.numpy()].astype(np.float32), labels[keep].numpy(), among.numpy(), (1, 9)
    )
    assert found.codes == "int8"


def test_faiss_finds_the_same_by_binary_codes():
    faiss = pytest.importorskip("faiss")
    x, y = random_rows(50, 64), random_rows(400, 64, seed=1)
    index = faiss.IndexBinaryFlat(64)
    index.add(encode(y, "binary").numpy())
    distance, nearest = index.search(encode(x, "binary").numpy(), 2)
    # Each query's class is that of its nearest row alone, if no other row is as near.
    clear = distance[:, 0] < distance[:, 1]
    assert clear.sum() > 20
    among = torch.arange(400)
    labels = torch.from_numpy(np.where(clear, nearest[:, 0], -1))
    (found,) = evaluate(x, labels, y, among, codes="binary", ks=[1])
    assert found.recall == {1: 1.0}
    assert found.num_queries == clear.sum()


def test_exact_codes_change_nothing():
    """Rows of 1 and -1 are their own codes, of both kinds."""
    x = torch.randint(2, (80, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    labels = torch.arange(80) % 9
    right = evaluate(x, labels, dims=[4, 16])
    for codes in ("int8", "binary"):
        found = evaluate(x, labels, dims=[4, 16], codes=codes)
        assert found == [r._replace(codes=codes) for r in right]


@pytest.mark.parametrize("codes", ["int8", "binary"])
def test_a_collapsed_model_scores_zero_by_its_codes(codes):
    labels = torch.arange(200) % 7
    for dim in (3, 50):
        x = random_rows(1, dim).expand(200, dim)
        (found,) = evaluate(x, labels, codes=codes)
        assert (found.map_at_r, found.recall[10]) == (0, 0)
        assert evaluate(torch.zeros(200, dim), labels, codes=codes)[0].map_at_r == 0


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["int8", "binary"])
def test_memory_does_not_grow_with_gallery_times_queries(codes):
    x, labels, block_bytes = random_rows(800, 64), torch.arange(800) % 80, 1 << 19
    with LiveBytes(x, labels) as memory:
        evaluate(x, labels, block_bytes=block_bytes, codes=codes)
    assert block_bytes / 8 < memory.peak < block_bytes + 800 * 8 * 8


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "codes: got 'int4', must be 'int8' or 'binary'",
         lambda: encode(torch.ones(2, 3), "int4")),
        (ValueError, "codes: got 'PQ8', must be 'int8' or 'binary'",
         lambda: evaluate(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), codes="PQ8")),
        (TypeError, "rows: got dtype torch.int64, must be floating point",
         lambda: encode(torch.ones(2, 3).long(), "int8")),
        (ValueError, "rows: row 1 holds NaN or a value outside fp32, it has no cosine",
         lambda: encode(torch.tensor([[1.0], [torch.nan]]), "binary")),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
