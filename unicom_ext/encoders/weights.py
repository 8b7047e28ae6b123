"""Weights of encoders from files, whoever has written them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unicom_ext import checkpoint
from unicom_ext.checkpoint.directory import ABOUT, of_module, read_module, saved_names
from unicom_ext.encoders.packages import package
from unicom_ext.encoders.vit import VisionTransformer, released_as
from unicom_ext.utils.files import CheckpointError

# What a run calls the module in its checkpoints. Where its weights are averaged, these count.
ENCODER, AVERAGED = "encoder", "averaged"
_COUNTER = "n_averaged"  # how many steps the average is of, beside its weights
BODY, HEAD = "body.", "head."  # beginnings of names in an encoder `WithHead`
_WRAPPED_IN = "state_dict", "model"  # keys under which trainers put a state dict
_WRAPPERS = "module.", "_orig_mod.", "model."  # beginnings of all names, of those around a model

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Saved:
    """The tensors of an encoder in a file, without names of wrappers."""

    path: str
    tensors: dict[str, Tensor]

    @property
    def has_head(self) -> bool:
        """Whether it is of an encoder `WithHead`."""
        head = {f"{HEAD}0.weight", f"{HEAD}1.running_mean"}
        return head <= self.tensors.keys() and all(
            name.startswith((BODY, HEAD)) for name in self.tensors
        )

    @cached_property
    def body(self) -> dict[str, Tensor]:
        """The tensors without those of a head, as the encoder itself calls them."""
        if not self.has_head:
            return self.tensors
        return {
            name.removeprefix(BODY): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(BODY)
        }

    def with_body(self, body: Mapping[str, Tensor]) -> Saved:
        if not self.has_head:
            return replace(self, tensors=dict(body))
        head = {n: tensor for n, tensor in self.tensors.items() if n.startswith(HEAD)}
        return replace(self, tensors={**{BODY + n: t for n, t in body.items()}, **head})


def read(path: str) -> Saved:
    """The tensors in a file of torch.save or safetensors, or in a checkpoint of this package.

    What may be around a state dict is taken off: the dict of a trainer that has it under
    "state_dict" or "model", and the names of wrappers such as DistributedDataParallel.

    Args:
        path: a .pt, .pth or .safetensors file; a directory of `unicom_ext.checkpoint`, the file
            that its `merge` has made of one, or a directory with checkpoints step-N, of which the
            last is taken. Of a run with `ema` it is the average.

    Raises CheckpointError: it cannot be read or holds anything else; ConfigError: reading it needs
    a package that is not installed.
    """
    where = file_of(path)
    if where.is_dir():
        tensors: Any = read_module(where, _counting(saved_names(where)))
    elif not where.exists():
        raise CheckpointError(f"{path}: is not there")
    elif where.suffix == ".safetensors":
        tensors = _read_safetensors(where)
    else:
        tensors = read_torch(
            where, "tensors alone, as torch.save(encoder.state_dict(), ...) writes them"
        )
    if isinstance(tensors, dict) and ABOUT in tensors:
        tensors = of_module(where, tensors, _counting(tensors))
    if isinstance(tensors, dict):
        tensors.pop(_COUNTER, None)
    for key in _WRAPPED_IN:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: holds a {type(value).__name__} under {name!r}, must hold tensors by name"
            )
    return Saved(str(where), without_wrappers(tensors))


def file_of(path: str) -> Path:
    """Where the weights lie that a path names: the last checkpoint where it is a directory of some,
    else the path itself."""
    where = Path(path)
    if where.is_dir() and not (where / ".metadata").exists():
        return checkpoint.latest(where) or where
    return where


def load(module: nn.Module, saved: Saved, encoder: str) -> None:
    """Put the tensors into the module, in its own types.

    Raises CheckpointError, and changes nothing, unless they are those of the module by name and
    shape. `encoder` is its name for the message.
    """
    own = module.state_dict()
    real_names = dict(zip(without_wrappers(own), own, strict=True))
    wanted = without_wrappers(own)
    faults = [_fault(name, saved.tensors.get(name), value) for name, value in wanted.items()]
    faults += [f"{name} is not part of it" for name in saved.tensors if name not in wanted]
    faults = [fault for fault in faults if fault]
    if faults:
        total = len(wanted.keys() | saved.tensors.keys())
        raise CheckpointError(
            f"{saved.path}: does not fit {encoder}: {faults[0]}; {len(faults)} of {total} tensors "
            f"differ{_explanation(module, saved)}"
        )
    module.load_state_dict({real_names[name]: value for name, value in saved.tensors.items()})


def _counting(names: Iterable[str]) -> str:
    """Which module of a run's checkpoint is its encoder, by the names of the tensors in it."""
    averaged = any(name.startswith(f"modules.{AVERAGED}.") for name in names)
    return AVERAGED if averaged else ENCODER


def _fault(name: str, there: Tensor | None, here: Tensor) -> str:
    if there is None:
        return f"{name} is missing"
    if there.shape != here.shape:
        return f"{name} is {list(there.shape)}, must be {list(here.shape)}"
    return ""


def _explanation(module: nn.Module, saved: Saved) -> str:
    if released := released_as(saved.body):
        return f". The shapes are those of {released}"
    patch = "patch_embed.proj.weight"
    body = getattr(module, "body", module)
    if isinstance(body, VisionTransformer) and patch in saved.body:
        there, here = saved.body.get("pos_embed"), body.pos_embed
        same_patch = saved.body[patch].shape == body.patch_embed.proj.weight.shape
        if same_patch and there is not None and there.shape != here.shape:
            return ". Its tokens are flattened, so that weights serve one image_size alone"
    return ""


def without_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """In the same order, without beginnings of all names that are wrappers'."""
    tensors = dict(tensors)
    for prefix in _WRAPPERS * 2:  # one may be around another
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> Any:
    safetensors = package("safetensors.torch", "safetensors", path.name)
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the library's own type, or what the system says
        raise _unreadable(path, error) from None


def read_torch(path: Path, must_hold: str) -> Any:
    """What torch.save has written, in memory that is the file's, without running code.

    Args:
        must_hold: the end of the message where it holds something else.

    Raises CheckpointError: it cannot be read, or reading it could run code.
    """

    def load(**how: Any) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, **how)

    try:
        try:
            return load(mmap=True)
        except RuntimeError:  # files of old versions of torch cannot be mapped
            return load()
    except (OSError, RuntimeError) as error:  # the latter of archives that are spoilt
        if _is_cut_off(path):
            raise CheckpointError(f"{path}: cannot be read: it is cut off") from None
        raise _unreadable(path, error) from None
    except Exception as error:  # whatever reading anything else as a pickle raises
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(f"{path}: is no file that torch.save has written") from None
        raise CheckpointError(
            f"{path}: holds {named[1]}, and reading that could run code; must hold {must_hold}"
        ) from None


def _is_cut_off(path: Path) -> bool:
    """Whether it begins as an archive, but does not end with an archive's table of contents."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)
    except OSError:
        return False


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().partition("\n")[0]
    return CheckpointError(f"{path}: cannot be read: {reason or type(error).__name__}")
