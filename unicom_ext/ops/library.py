"""The compiled modules, and the devices that this build has operators for.

`ops` is the namespace of the operators and `engine` what takes NumPy arrays. Nothing else imports
either. Both are looked up here at each call (``library.ops.loss(...)``), so that another
namespace with the same operators can take the place of `ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]

torch.ops.load_library(_PACKAGE / "_C.so")

# A CPU build of torch beside a package that was built for CUDA leaves the latter alone.
HAS_CUDA = torch.version.cuda is not None and (_PACKAGE / "_C_cuda.so").exists()
if HAS_CUDA:
    torch.ops.load_library(_PACKAGE / "_C_cuda.so")
ops: Any = torch.ops.unicom_ext

from unicom_ext import _engine  # noqa: E402  (what is wrong with _C.so is said first)

engine = _engine


def check_device(device: torch.device, name: str = "embeddings") -> None:
    """Raises ValueError where what `name` names is on a device without operators; the message says
    what to do."""
    if device.type == "cpu" or (device.type == "cuda" and HAS_CUDA):
        return
    if device.type == "cuda":
        raise ValueError(
            f"{name} must be on the CPU, got {device}: this unicom_ext was built without CUDA. "
            "Install the CUDA toolkit that fits torch (nvcc on the PATH, or CUDA_HOME) and run "
            "pip install --no-build-isolation --force-reinstall --no-deps unicom_ext again"
        )
    raise ValueError(f"{name} must be on the CPU or a CUDA device, got {device}")


def run(operator: Callable[..., Any], *arguments: Any) -> Any:
    """operator(*arguments); raises torch.OutOfMemoryError where a device has no memory left.

    Operators cannot: the stable ABI lets errors of the allocator through as RuntimeErrors.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if type(error) is RuntimeError and str(error).startswith("CUDA out of memory"):
            raise torch.OutOfMemoryError(str(error)) from None
        raise
