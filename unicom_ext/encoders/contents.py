"""What lies in the files that settings of encoders name.

Features of other weights are known as others by it, though the settings are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unicom_ext.encoders import weights
from unicom_ext.utils.files import digest_of

_FOLDER_OF = {"encoder": "hf:", "text_encoder": "sentence:"}  # settings that may name a folder


def contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what the settings name, by setting: `weights`, the folder of hf:FOLDER and
    sentence:FOLDER, and the file of the module in package.module:function (not those that it
    imports). Names of nothing that is there have none.
    """
    found = {}
    for name in ("weights", *_FOLDER_OF):
        path = _named(name, str(settings.get(name, "")))
        digest = None if path is None else digest_of(path)
        if digest is not None:
            found[name] = digest
    return found


def _named(setting: str, value: str) -> Path | None:
    if setting == "weights":
        return weights.file_of(value) if value else None
    if value.startswith(_FOLDER_OF[setting]):
        return Path(value.removeprefix(_FOLDER_OF[setting]))
    module, _, function = value.partition(":")
    if not function or module in ("timm", "open_clip", "hf"):
        return None
    return _source_of(module)


def _source_of(module: str) -> Path | None:
    """The file of a module; None where it cannot be said."""
    loaded = sys.modules.get(module)
    try:
        origin = loaded.__file__ if loaded is not None else getattr(find_spec(module), "origin", "")
    except (ImportError, AttributeError, ValueError):  # calling the function will say why
        return None
    return Path(origin) if origin else None
