"""Text encoders: n-grams, and libraries with others in their place."""

from __future__ import annotations

import re
import sys
import types
from collections import Counter
from zlib import crc32

import pytest
import torch

from unicom_ext.data.ngrams import BUCKETS, NGrams
from unicom_ext.encoders import text
from unicom_ext.utils.settings import ConfigError

TEXTS = ["GREEK SMALL LETTER ALPHA", "BLACK CHESS QUEEN", "ξ", "", "GREEK SMALL LETTER BETA", "ξ"]


def grams(text):
    """How often each bucket is in a text."""
    text = f" {text} "
    return Counter(
        crc32(text[i : i + n].encode()) % BUCKETS
        for n in (2, 3, 4)
        for i in range(len(text) - n + 1)
    )


def formula(texts, fitted_on, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(BUCKETS, dim, generator=generator).double()
    with_it = Counter(bucket for text in fitted_on for bucket in grams(text))
    rows = []
    for each in texts:
        row = torch.zeros(dim, dtype=torch.float64)
        for bucket, count in grams(each).items():
            rarity = torch.tensor(len(fitted_on) / max(with_it[bucket], 1)).double().log()
            row += count**0.5 * rarity * directions[bucket]
        rows.append(row / row.norm().clamp(min=1e-12))
    return torch.stack(rows)


@pytest.mark.parametrize("others", [[], ["quite", "another text", "BLACK"]])
def test_ngrams_are_their_formula(others):
    encoder = text.create("ngrams", dim=16, seed=3)
    assert isinstance(encoder, text.TextEncoder)
    encoder.fit(TEXTS)
    found = encoder.encode([*TEXTS, *others])
    assert found.dtype == torch.float32
    expected = formula([*TEXTS, *others], TEXTS, 16, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_ngrams_of_shards_are_those_of_all(monkeypatch):
    """Fitted on parts of an iterator, encoded one shard at a time: the same bits."""
    texts = TEXTS * 5
    whole = NGrams(24, 1)
    whole.fit(texts)
    expected = whole.encode(texts)
    monkeypatch.setattr("unicom_ext.data.ngrams._AT_ONCE", 7)
    encoder = NGrams(24, 1)
    encoder.fit(iter(texts))
    shards = [encoder.encode(texts[i : i + 4]) for i in range(0, len(texts), 4)]
    assert torch.equal(torch.cat(shards), expected)
    assert encoder.encode([]).shape == (0, 24)


def test_ngrams_before_they_are_fitted():
    with pytest.raises(RuntimeError, match=r"^NGrams: fit\(texts\) comes first$"):
        NGrams().encode(["a"])
    with pytest.raises(ValueError, match=r"^texts: got none, must be at least one to fit on$"):
        NGrams().fit([])


# ---- folders of models ----


class Tokens:
    """A tokenizer of transformers, whose tokens are the characters' numbers."""

    def __call__(self, texts, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        assert len(texts) <= 3
        width = max(map(len, texts)) + 1
        ids = torch.tensor([[1, *map(ord, t), *[0] * (width - 1 - len(t))] for t in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Hidden(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled()
        values = torch.stack([input_ids, input_ids**2], 2).float() * self.scale
        # What is padded must not count.
        values = values.where(attention_mask[:, :, None] > 0, torch.tensor(1e9))
        return types.SimpleNamespace(last_hidden_state=values)


def test_the_mean_of_tokens(tmp_path, monkeypatch):
    """In the place of transformers something with the functions of its version 5."""
    where = {"pretrained_model_name_or_path": str(tmp_path), "local_files_only": True}

    def loader(made):
        def from_pretrained(**given):
            assert given == where
            return made

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    library = types.ModuleType("transformers")
    library.AutoTokenizer, library.AutoModel = loader(Tokens()), loader(Hidden())
    monkeypatch.setitem(sys.modules, "transformers", library)
    monkeypatch.setattr(text, "_AT_ONCE", 3)
    encoder = text.create(f"sentence:{tmp_path}")
    assert (encoder.dim, isinstance(encoder, text.TextEncoder)) == (2, True)
    encoder.fit(["nothing"])
    texts = ["abc", "", "a much longer text", "ab", "z"]
    expected = []
    for each in texts:
        ids = torch.tensor([1, *map(ord, each)], dtype=torch.float64)
        mean = torch.stack([ids.mean(), ids.square().mean()])
        expected.append(mean / mean.norm())
    found = encoder.encode(texts)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert encoder.encode([]).shape == (0, 2)


def test_sentence_transformers(tmp_path, monkeypatch):
    """In its place something with the function of its version 6."""

    class SentenceTransformer:
        def __init__(self, name, device, local_files_only):
            assert (name, device, local_files_only) == (str(tmp_path), "cpu", True)

        def encode(self, texts, batch_size, show_progress_bar, convert_to_tensor):
            assert isinstance(texts, list)
            assert (show_progress_bar, convert_to_tensor) == (False, True)
            return torch.tensor([[len(t), 1, 0] for t in texts], dtype=torch.float16)

    library = types.ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    (tmp_path / "modules.json").write_text("[]")
    encoder = text.create(f"sentence:{tmp_path}")
    assert encoder.dim == 3
    assert encoder.encode(("ab", "c")).tolist() == [[2, 1, 0], [1, 1, 0]]
    assert encoder.encode(("ab",)).dtype == torch.float32


def test_a_factory(tmp_path, monkeypatch):
    (tmp_path / "my_texts.py").write_text(
        "class Lengths:\n"
        "    dim = 1\n"
        "    def fit(self, texts): ...\n"
        "    def encode(self, texts): ...\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert text.create("my_texts:Lengths").dim == 1
    message = (
        "text_encoder: my_texts:number returns a int, must return something with fit, encode and "
        "dim"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        text.create("my_texts:number")


NAMES = "There are ngrams, sentence:FOLDER and package.module:function"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ngram", f"text_encoder: got 'ngram', but there is none of that name; did you mean "
         f"ngrams? {NAMES}"),
        ("?", f"text_encoder: got '?', but there is none of that name. {NAMES}"),
        ("sentence:/no/way", "text_encoder: got 'sentence:/no/way', but /no/way is no folder"),
        ("no_such_module:f", "text_encoder: got 'no_such_module:f', but there is no module "
         "'no_such_module'; it must be installed or in a folder of PYTHONPATH"),
        ("sentence:{}", "sentence:{} needs the package transformers, which is not installed: pip "
         "install transformers"),
        ("sentence:{}/st", "sentence:{}/st needs the package sentence-transformers, which is not "
         "installed: pip install sentence-transformers"),
    ],
)  # fmt: skip
def test_bad_names(tmp_path, monkeypatch, name, message):
    for library in ("transformers", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "st").mkdir()
    (tmp_path / "st" / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(*[tmp_path] * 2))}$"):
        text.create(name.format(tmp_path))
