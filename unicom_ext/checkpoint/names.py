"""Names of tensors without those of wrappers: compiled or not, in DDP or not, a model has the same.

`torch.compile(model.encoder)` and its like put a module around another one, and the name of the
inner one into the names of all that is in it. Checkpoints up to version 0.1 kept these names where
only a part of a model was wrapped, so they are looked for, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from unicom_ext.utils.files import CheckpointError

# Names that nobody gives to a part of a model: of torch.compile, FSDP and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DDP = "module"  # which a model may have for itself


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def plain_name(name: str) -> str:
    """Without what can only be a wrapper's."""
    return _without(name, _WRAPPERS)


class PlainNames:
    """Calling it with a name of something in a module gives the name without any wrapper's."""

    def __init__(self, module: nn.Module) -> None:
        wrapping = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        self._wrapped = {
            plain_name(joined(path, _DDP))
            for path, part in module.named_modules()
            if isinstance(part, wrapping)
        }

    def __call__(self, name: str) -> str:
        name = plain_name(name)
        if not self._wrapped:
            return name
        parts = name.split(".")
        return ".".join(
            part
            for i, part in enumerate(parts)
            if part != _DDP or ".".join(parts[: i + 1]) not in self._wrapped
        )


class SavedNames:
    """Finds names in a checkpoint, also those with wrappers' names in them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_name: dict[str, set[str]] = {}
        self._by_name_without_ddp: dict[str, set[str]] = {}
        for name in names:
            for key in (name, plain_name(name)):
                self._by_name.setdefault(key, set()).add(name)
            key = _without(name, _WRAPPERS | {_DDP})
            self._by_name_without_ddp.setdefault(key, set()).add(name)

    def find(self, name: str) -> str | None:
        """The name there of what has this plain name here, None if there is none.

        Raises CheckpointError: there are several.
        """
        found = self._by_name.get(name) or self._by_name_without_ddp.get(name) or set()
        if len(found) > 1:
            raise clash(name, found)
        return next(iter(found), None)


def clash(name: str, found: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{name}: is what {' and '.join(sorted(found))} are called without the names of "
        "wrappers; which of them is meant?"
    )


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)
