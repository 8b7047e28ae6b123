"""Curves for TensorBoard, where they are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unicom_ext.utils.settings import ConfigError


class Curves:
    """Context manager; `add` writes a value of a step, or nothing where no directory is given.

    Args:
        directory: for the events; None for no curves.
        step: what is there of later steps, by a run that was killed, is not shown.

    Raises ConfigError where TensorBoard is wanted and not installed.
    """

    def __init__(self, directory: Path | None, step: int = 0) -> None:
        self._writer: Any = None
        if directory is not None:
            check_installed()
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(directory, purge_step=step)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)


def check_installed() -> None:
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("tensorboard: is not installed; pip install tensorboard") from None
