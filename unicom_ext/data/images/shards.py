"""Tar shards of WebDataset and img2dataset, read at random without being unpacked.

    DIR/00000.tar, DIR/00001.tar, ...    or one of them, or DIR/train/00000.tar, DIR/test/00000.tar
        KEY.jpg    the image
        KEY.txt    its caption; else what "caption" of KEY.json is
        KEY.cls    its class; else what "label" of KEY.json is
        KEY.json

Where each image lies in its tar is found once, by going through the headers, and kept in the cache
for as long as the tar has the same size and time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from unicom_ext.data.images.collection import PART_NAMES, Collection, check_parts, shown
from unicom_ext.data.images.pictures import SUFFIXES, PictureError, as_text, decode
from unicom_ext.data.images.table import class_of
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.files import cache_root, list_files, write_cached

if TYPE_CHECKING:
    from PIL import Image

FORMAT = 1  # raise it when anything here changes the index
_NO_TEXT, _TEXT, _JSON = range(3)  # what holds a caption


@dataclass(frozen=True, eq=False)
class _Index:
    """Of the images in a tar, in their order there.

    names          text [n]
    classes        text [n], "" for none
    images, texts  int64 [n, 2]: where they begin in the tar, and how many bytes they have
    kinds          int8 [n], of the texts
    """

    names: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    texts: np.ndarray
    kinds: np.ndarray


class ShardPictures:
    """Images in tar files.

    A tar is opened for each read, which costs little beside decoding and leaves nothing behind that
    a worker process could inherit.
    """

    def __init__(self, root: Path, tars: Sequence[Path], indices: Sequence[_Index]) -> None:
        self._root, self._tars = root, tars
        self._first = np.cumsum([0, *(len(index.names) for index in indices)])
        self._index = _Index(
            *(
                np.concatenate([getattr(index, field.name) for index in indices])
                for field in fields(_Index)
            )
        )
        self.has_captions = bool((self._index.kinds != _NO_TEXT).any())

    def __len__(self) -> int:
        return len(self._index.names)

    def name(self, number: int) -> str:
        tar = os.path.relpath(self._tar(number), self._root)
        return f"{tar}/{self._index.names[number]}"

    def read(self, number: int) -> Image.Image:
        data = self._bytes(number, self._index.images[number])
        return decode(io.BytesIO(data), self._where(number))

    def caption(self, number: int) -> str:
        kind = self._index.kinds[number]
        if kind == _NO_TEXT:
            return ""
        data = self._bytes(number, self._index.texts[number])
        if kind == _JSON:
            try:
                return str(json.loads(data)["caption"]).strip()
            except (ValueError, LookupError, TypeError):
                raise PictureError(f"{self._where(number)}: its caption has changed") from None
        return as_text(data, self._where(number))

    def digest(self, rows: np.ndarray, into: Any) -> None:
        for row in rows.tolist():
            text = f"{self.name(row)}\0{self._index.images[row, 1]}\n"
            into.update(text.encode(errors="surrogateescape"))

    def _tar(self, number: int) -> Path:
        return self._tars[int(np.searchsorted(self._first, number, side="right")) - 1]

    def _where(self, number: int) -> str:
        return f"{self._tar(number)}: {self._index.names[number]}"

    def _bytes(self, number: int, span: np.ndarray) -> bytes:
        offset, size = span.tolist()
        try:
            with open(self._tar(number), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise PictureError(f"{self._where(number)}: {error.strerror or error}") from None
        if len(data) < size:
            raise PictureError(f"{self._where(number)}: the tar has been cut off")
        return data


def find_shards(path: Path) -> dict[str, list[Path]]:
    """The tars in a folder, by "", or else in its parts, by their names; none where there are none.

    Raises SourceError where some are in parts, and others are not.
    """
    if not path.is_dir():
        return {"": [path]}
    folders = {"": path} | {
        one.name: one for one in path.iterdir() if one.name.lower() in PART_NAMES
    }
    listed = {name: list_files(one, ".tar") for name, one in folders.items() if one.is_dir()}
    found = {name: tars for name, tars in sorted(listed.items()) if tars}
    if "" in found and len(found) > 1:
        raise SourceError(f"{path}: has .tar files beside those in {shown(list(found)[1:])}")
    return found


def read_shards(path: Path) -> Collection:
    """One tar, all in a folder, or all in its parts. Raises SourceError."""
    found = find_shards(path)
    if not found:
        raise SourceError(f"{path}: has no .tar files")
    check_parts(str(path), [name for name in found if name])
    cached = {tar: _cached(tar) for tars in found.values() for tar in tars}
    new = [tar for tar, index in cached.items() if index is None]
    screen = Console(stderr=True)
    for tar in track(new, "Indexing shards", console=screen, transient=True, disable=not new):
        cached[tar] = _indexed(tar)
    indices = {tar: index for tar, index in cached.items() if index is not None}
    pictures = ShardPictures(
        path if path.is_dir() else path.parent, [*indices], [*indices.values()]
    )
    if not len(pictures):
        raise SourceError(f"{path}: has no images, which are {', '.join(SUFFIXES)}")
    classes = [name or None for index in indices.values() for name in index.classes.tolist()]
    if "" in found:
        return Collection(pictures, classes)
    rows, first = {}, 0
    for name, tars in found.items():
        size = sum(len(indices[tar].names) for tar in tars)
        rows[PART_NAMES[name.lower()]] = np.arange(first, first + size)
        first += size
    return Collection(pictures, classes, rows)


def _cache_file(tar: Path) -> Path:
    name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    return cache_root() / "shards" / f"{name}.npz"


def _state(tar: Path) -> np.ndarray:
    status = os.stat(tar)
    return np.array([FORMAT, status.st_size, status.st_mtime_ns])


def _cached(tar: Path) -> _Index | None:
    """None where there is none, or the tar has changed."""
    try:
        with np.load(_cache_file(tar), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if np.array_equal(arrays.pop("state"), _state(tar)):
            return _Index(**arrays)
    except (OSError, EOFError, LookupError, TypeError, ValueError,
            zipfile.BadZipFile, zlib.error):  # fmt: skip
        pass
    return None


def _indexed(tar: Path) -> _Index:
    """The index, which is cached."""
    try:
        state = _state(tar)
        index = _scanned(tar)
    except OSError as error:
        raise SourceError(f"{tar}: cannot be read: {error.strerror or error}") from None
    arrays = {field.name: getattr(index, field.name) for field in fields(_Index)}
    path = _cache_file(tar)
    try:
        write_cached(path, lambda file: np.savez(file, state=state, **arrays))
    except OSError as error:
        warnings.warn(f"the index of {tar} was not cached in {path}: {error}", stacklevel=2)
    return index


def _scanned(tar: Path) -> _Index:
    """Where everything lies, as the headers of a tar say."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(tar, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                for member in archive:
                    folder, name = os.path.split(member.name)
                    if name.startswith(".") or not member.isfile() or member.issparse():
                        continue
                    # The key ends at the first dot: a.seg.png is another part of a than a.png.
                    stem, _, ending = name.partition(".")
                    parts = samples.setdefault(os.path.join(folder, stem), {})
                    if "." + ending in parts:
                        raise SourceError(f"{tar}: has {member.name} twice")
                    parts["." + ending] = member.offset_data, member.size
                end = archive.offset
        except tarfile.TarError as error:
            what = "is cut off" if samples else "is not a tar file, or is cut off"
            raise SourceError(f"{tar}: {what}: {error}") from None
        # Where a header is spoilt or missing, tarfile stops without a word.
        if os.pread(file.fileno(), 512, end) != bytes(512):
            raise SourceError(f"{tar}: is cut off or spoilt at byte {end} of {size}")
        rows = [_sample(tar, file.fileno(), key, parts) for key, parts in samples.items()]
    found = [row for row in rows if row is not None]
    names, classes, images, texts, kinds = zip(*found, strict=True) if found else ((),) * 5
    return _Index(
        np.array(names, np.str_),
        np.array(classes, np.str_),
        np.array(images, np.int64).reshape(-1, 2),
        np.array(texts, np.int64).reshape(-1, 2),
        np.array(kinds, np.int8),
    )


Span = tuple[int, int]


def _sample(
    tar: Path, file: int, key: str, parts: dict[str, Span]
) -> tuple[str, str, Span, Span, int] | None:
    """A row of the index; None where there is no image."""
    images = [ending for ending in parts if ending.lower() in SUFFIXES]
    if not images:
        return None
    if len(images) > 1:
        raise SourceError(f"{tar}: {key} has two images: {' and '.join(images[:2])}")
    facts = {}
    if ".json" in parts:
        try:
            facts = json.loads(_member(file, parts[".json"]))
        except ValueError as error:
            raise SourceError(f"{tar}: {key}.json: is not JSON: {error}") from None
        if not isinstance(facts, dict):
            raise SourceError(f"{tar}: {key}.json: must be an object, {{...}}")
    of_class = class_of(f"{tar}: {key}.json: label", facts.get("label"))
    if ".cls" in parts:
        try:
            said = class_of(f"{tar}: {key}.cls", _member(file, parts[".cls"]).decode())
        except UnicodeDecodeError:
            raise SourceError(f"{tar}: {key}.cls: is not text in UTF-8") from None
        if "label" in facts and said != of_class:
            raise SourceError(
                f"{tar}: {key} has the class {said} in .cls, and the label {of_class} in .json"
            )
        of_class = said
    text, kind = (0, 0), _NO_TEXT
    if ".txt" in parts:
        text, kind = parts[".txt"], _TEXT
    elif facts.get("caption"):
        text, kind = parts[".json"], _JSON
    return f"{key}{images[0]}", of_class or "", parts[images[0]], text, kind


def _member(file: int, span: Span) -> bytes:
    offset, size = span
    return os.pread(file, size, offset)
