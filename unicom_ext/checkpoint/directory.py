"""A checkpoint on disk: reading and writing it, and the commands that need no model."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from unicom_ext.checkpoint.names import SavedNames, plain_name
from unicom_ext.utils.files import CheckpointError, natural_key, write_file

FORMAT = "unicom_ext checkpoint"
VERSION = 1  # raise it when the content changes
ABOUT = "about"  # the tensor of plain values


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint ``step-N`` in a directory with the largest N.

    Args:
        directory: in which checkpoints lie; need not exist.

    Returns:
        Its path; None if there is none.
    """
    found = [
        path
        for path in Path(directory).glob("step-*")
        if re.fullmatch("[0-9]+", path.name[5:]) and path.is_dir()
    ]
    return max(found, key=natural_key, default=None)


def read_about(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a checkpoint: its losses' sizes, optimizers' settings, and `extra`.

    Args:
        directory: what `save` wrote.

    Returns:
        What JSON can hold; `extra` is under ``"extra"``.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    return read(Path(directory))[1]


def show(directory: str | os.PathLike[str]) -> None:
    """Print what is in a checkpoint: each tensor with its dtype and shape, and the plain values.

    Args:
        directory: what `save` wrote.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    metadata, about = read(Path(directory))
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if key != ABOUT:
            parts = len(entry.chunks)
            written = f" in {parts} parts" if parts > 1 else ""
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            print(f"{key}  {dtype} {list(entry.size)}{written}")
    print(json.dumps(about, indent=1, ensure_ascii=False))


def merge(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """A checkpoint as one file for `torch.load`: a dict of tensors by name.

    Names are without those of wrappers such as torch.compile, also where an older version has saved
    them.

    Args:
        directory: what `save` wrote.
        file: to write; one that is there is replaced when the new one is whole.

    Raises:
        CheckpointError: the checkpoint is not there, or not whole.
        OSError: writing failed.
    """
    save_file(Path(file), _tensors(Path(directory)))


def read_module(directory: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    """The state dict of one of the modules that were saved, without names of wrappers.

    Raises:
        CheckpointError: it is not there.
    """
    return of_module(directory, _tensors(Path(directory), f"modules.{name}."), name)


def saved_names(directory: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors in a checkpoint."""
    return list(read(Path(directory))[0].state_dict_metadata)


def of_module(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The state dict of a module out of the tensors of a checkpoint, `path` in messages."""
    prefix = f"modules.{name}."
    found = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    if not found:
        raise CheckpointError(f"{path}: there is no module {name!r} in it")
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _tensors(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin so, by their names without those of wrappers."""
    metadata, _ = read(directory)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix)
    }
    names = SavedNames(state)
    plain = {plain_name(key): names.find(plain_name(key)) for key in state}
    read_tensors(state, checkpoint_id=directory, no_dist=True)
    return {name: state[key] for name, key in plain.items() if key is not None}


def split(file: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """The inverse of `merge`: a directory that any number of ranks can load.

    Args:
        file: what `merge` wrote.
        directory: must not exist.

    Raises:
        CheckpointError: the file is no merged checkpoint, or the directory is there already.
        OSError: writing failed.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory}: is there already")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        about = json.loads(bytes(state[ABOUT].tolist()))
    except Exception as error:
        raise CheckpointError(f"{file}: is not a merged checkpoint: {_reason(error)}") from error
    _check_format(file, about)
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_tensors(state, checkpoint_id=temporary, no_dist=True)
    os.rename(temporary, directory)


def read(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Metadata and plain values."""
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory}: there is no checkpoint")
    try:
        metadata = _Reader(directory).read_metadata()
        _check_files(directory, metadata)
        entry = metadata.state_dict_metadata[ABOUT]
        text = {ABOUT: torch.empty(entry.size, dtype=torch.uint8)}
        read_tensors(text, checkpoint_id=directory, no_dist=True)
        about = json.loads(bytes(text[ABOUT].tolist()))
    except CheckpointError:
        raise
    except Exception as error:  # whatever the reader's parts raise
        raise CheckpointError(f"{directory}: cannot be read: {_reason(error)}") from error
    _check_format(directory, about)
    return metadata, about


def write_tensors(state: Mapping[str, Any], **where: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        try:
            dcp.save(dict(state), **where)
        except CheckpointException as error:  # which is no Exception
            path, reason = where["checkpoint_id"], _reason_of(error)
            cause = _system_error(reason)
            text = (cause and cause.strerror) or str(cause or reason)
            raise CheckpointError(f"{path}: cannot be written: {text}") from error


def _reason_of(error: CheckpointException) -> BaseException:
    """Why a rank has failed. Raises KeyboardInterrupt and the like, which are no failures."""
    reason = next(iter(error.failures.values()))[0]
    if not isinstance(reason, Exception):
        raise reason from None
    return reason


def save_file(path: Path, content: object) -> None:
    """One file of `torch.save`, whole or not at all. Raises OSError: it cannot be written."""

    def write(handle: IO[bytes]) -> None:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            raise _system_error(error) or error from None

    write_file(path, write)


def _system_error(error: BaseException) -> OSError | None:
    """What is behind an error of torch's writer: where a disk is full it fails a second time, and
    says that alone."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def read_tensors(state: dict[str, Tensor], **where: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        directory = where.pop("checkpoint_id")
        try:
            dcp.load(state, storage_reader=_Reader(directory), **where)
        except CheckpointException as error:  # which is no Exception
            reason = _reason(_reason_of(error))
            raise CheckpointError(f"{directory}: cannot be read: {reason}") from None


class _Reader(FileSystemReader):
    """torch's, but for what it says of a checkpoint, a pickle, which could call anything."""

    def read_metadata(self, *args: Any, **keywords: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Takes what torch's checkpoints consist of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if "." not in name and module in _MODULES:
            found = super().find_class(module, name)
        is_record = isinstance(found, type) and found.__module__ == _RECORDS
        if not is_record and not isinstance(found, torch.dtype) and f"{module}.{name}" not in _ELSE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return found


_RECORDS = "torch.distributed.checkpoint.metadata"
_ELSE = {
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.Size",
    "torch.device",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
}
_MODULES = {_RECORDS, *(name.rpartition(".")[0] for name in _ELSE)}


def _check_files(directory: Path, metadata: Any) -> None:
    """Raises CheckpointError where a file is missing or cut off, before anything is read."""
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is not there")
        if (size := path.stat().st_size) < end:
            raise CheckpointError(f"{path}: is truncated: {size} bytes of {end}")


def _check_format(path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a {FORMAT}")
    if about["version"] != VERSION:
        raise CheckpointError(
            f"{path}: has version {about['version']} of the format, this program reads version "
            f"{VERSION}"
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
