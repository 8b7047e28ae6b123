"""Image and text features of the glyphs, in the layout of public dumps of CLIP embeddings.

Something real to cluster without a download: the principal components of the pixels, and hashed
character n-grams of the Unicode names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from unicom_ext.data.baselines import BASELINES
from unicom_ext.data.glyphs import Glyphs
from unicom_ext.data.ngrams import NGrams
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import list_files, natural_key, write_file

SHARD_ROWS = 10_000
LIST = "files.json"  # of what a dump consists
_NAME = r"(img_emb/img_emb|text_emb/text_emb)_[0-9]{4,}\.npy|true_labels\.npy|images\.npy"


def write_dump(
    output: Path,
    glyphs: Glyphs,
    *,
    images: str = "raw pixels",
    dim: int = 128,
    kept_words: float = 1.0,
    seed: int = 0,
) -> None:
    """Write img_emb/, text_emb/ (float16 shards), true_labels.npy and images.npy to `output`.

    files.json there lists them. What an earlier call has written is replaced as a whole; raises
    SourceError where other files would be overwritten or lie among the shards.

    images      "raw pixels" or "HOG" (see `unicom_ext.data.baselines`), `dim` components of it
    kept_words  how much of its character's name the text of an image has: each word stays with
                this probability, and at least one does. Names are otherwise the same for all images
                of a class and different between classes, which no captions from the web are.
    """
    shards = {
        f"{kind}/{kind}_{number:04d}.npy": (kind, slice(first, first + SHARD_ROWS))
        for kind in ("img_emb", "text_emb")
        for number, first in enumerate(range(0, len(glyphs), SHARD_ROWS))
    }
    whole = {"true_labels.npy": glyphs.labels, "images.npy": glyphs.images}
    earlier = _earlier(output, [*shards, *whole])
    features = {
        "img_emb": BASELINES[images](glyphs.images, glyphs.labels, glyphs.images, dim),
        "text_emb": name_features(captions(glyphs, kept_words, seed), dim, seed),
    }
    # An earlier dump stays until the new one is whole.
    new = output / "extract.tmp"
    shutil.rmtree(new, ignore_errors=True)
    try:
        for kind in features:
            (new / kind).mkdir(parents=True)
            (output / kind).mkdir(exist_ok=True)
        for name, (kind, rows) in shards.items():
            write_file(new / name, partial(np.save, arr=features[kind][rows].half().numpy()))
        for name, array in whole.items():
            write_file(new / name, partial(np.save, arr=array))
        for path in earlier:
            path.unlink(missing_ok=True)
        (output / LIST).write_text(json.dumps([*shards, *whole], indent=1))
        for name in (*shards, *whole):
            (new / name).rename(output / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _earlier(output: Path, names: Iterable[str]) -> list[Path]:
    """The files of an earlier dump there; SourceError where others stand in the way of the names or
    lie among the shards."""
    there = {output / name for name in names if (output / name).exists()}
    for kind in ("img_emb", "text_emb"):
        if (output / kind).is_dir():
            there.update(list_files(output / kind, ".npy", f"{kind}_"))
    earlier = [output / name for name in _listed(output / LIST)]
    for path in sorted(there.difference(earlier), key=natural_key):
        raise SourceError(f"{path}: is there already, and not of an earlier dump")
    return earlier


def _listed(path: Path) -> list[str]:
    """The names in the list of an earlier dump; none where there is no list."""
    if not path.exists():
        return []
    try:
        names = json.loads(path.read_text())
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(re.fullmatch(_NAME, str(name)) for name in names):
        raise SourceError(f"{path}: is there already, and not of an earlier dump")
    return names


def captions(glyphs: Glyphs, kept_words: float, seed: int) -> list[str]:
    """The text of each image: some of the words of its character's name."""
    rng = np.random.default_rng(seed)
    texts = []
    for label in glyphs.labels.tolist():
        words = glyphs.captions[label].split()
        kept = rng.random(len(words)) < kept_words
        kept[rng.integers(len(words))] |= not kept.any()
        texts.append(" ".join(word for word, keep in zip(words, kept, strict=True) if keep))
    return texts


def name_features(texts: list[str], dim: int, seed: int = 0) -> Tensor:
    """fp32 [n, dim]: `NGrams` fitted on the texts themselves."""
    ngrams = NGrams(dim, seed)
    ngrams.fit(texts)
    return ngrams.encode(texts)
