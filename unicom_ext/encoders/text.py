"""Text encoders by name, for captions.

ngrams                   hashed character n-grams, without a neural network
sentence:FOLDER          a model of sentence-transformers or of transformers
package.module:function  whatever a function of yours makes
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.data.ngrams import NGrams
from unicom_ext.encoders.packages import call_factory, closest, package
from unicom_ext.utils.settings import ConfigError

_AT_ONCE = 64  # texts of a batch


@runtime_checkable
class TextEncoder(Protocol):
    """Features of texts. `fit` sees all texts once, before any is encoded."""

    dim: int

    def fit(self, texts: Iterable[str]) -> None: ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """fp32 [n, dim]; those of a text do not depend on the others."""


def create(name: str, dim: int = 128, seed: int = 0) -> TextEncoder:
    """The text encoder of a name.

    Args:
        name: ngrams, sentence:FOLDER or package.module:function.
        dim, seed: of ngrams; others have their own.

    Raises ConfigError: there is none of that name, or a package is missing.
    """
    if name == "ngrams":
        return NGrams(dim, seed)
    kind, _, rest = name.partition(":")
    if not rest:
        raise ConfigError(
            f"text_encoder: got {name!r}, but there is none of that name"
            f"{closest(name, ['ngrams', 'sentence:FOLDER'])} There are ngrams, sentence:FOLDER "
            "and package.module:function"
        )
    if kind == "sentence":
        return _sentence_encoder(name, Path(rest))
    made = call_factory("text_encoder", name)
    if not isinstance(made, TextEncoder):
        raise ConfigError(
            f"text_encoder: {name} returns a {type(made).__name__}, must return something with "
            "fit, encode and dim"
        )
    return made


def _sentence_encoder(name: str, folder: Path) -> TextEncoder:
    if not folder.is_dir():
        raise ConfigError(f"text_encoder: got {name!r}, but {folder} is no folder")
    if (folder / "modules.json").exists():  # which says how tokens are pooled
        return SentenceEncoder(
            package("sentence_transformers", "sentence-transformers", name), folder
        )
    return MeanOfTokens(package("transformers", "transformers", name), folder)


class SentenceEncoder:
    """A folder of sentence-transformers, used as it says itself."""

    def __init__(self, sentence_transformers: Any, folder: Path) -> None:
        self._model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True
        )
        self.dim: int = self.encode([""]).shape[1]

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing: it has been trained."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.dim)
        return self._model.encode(
            list(texts), batch_size=_AT_ONCE, show_progress_bar=False, convert_to_tensor=True
        ).float()


class MeanOfTokens:
    """A folder of a transformers text model: the mean of its last hidden states, of norm 1."""

    def __init__(self, transformers: Any, folder: Path) -> None:
        where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        self._model = transformers.AutoModel.from_pretrained(**where).float().eval()
        self.dim: int = self.encode([""]).shape[1]

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing: it has been trained."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.dim)
        # Similar lengths stand together, so that little is padded.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for first in range(0, len(order), _AT_ONCE):
            part = [texts[i] for i in order[first : first + _AT_ONCE]]
            tokens = self._tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][:, :, None].to(hidden.dtype)
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)))
        encoded = torch.cat(parts)
        return torch.empty_like(encoded).index_copy_(0, torch.tensor(order), encoded)
