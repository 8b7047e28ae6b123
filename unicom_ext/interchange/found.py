"""What was found in files of another trainer, ready to be written as a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unicom_ext.checkpoint import pieces
from unicom_ext.checkpoint.pieces import Pieces

# By which a checkpoint has its parts, as those of `unicom-ext train` do.
ENCODER, LOSS, MAIN = "encoder", "loss", "main"
PROTOTYPES = f"modules.{LOSS}.weight"


def of_encoder(name: str) -> str:
    """The name in a checkpoint of a tensor of the encoder."""
    return f"modules.{ENCODER}.{name}"


@dataclass(frozen=True)
class Found:
    """A checkpoint of this package that is still in the files of another trainer.

    description: what is in it, by a word for each thing.
    notes: what the user should know besides, a sentence each.
    tensors, classes, optimizers, extra: as in the checkpoint; tensors are read when it is written.
    """

    description: Mapping[str, str]
    notes: list[str]
    tensors: Mapping[str, Tensor | Pieces]
    classes: Mapping[str, Any]
    optimizers: Mapping[str, Any]
    extra: Mapping[str, Any]

    def write(self, output: str | os.PathLike[str]) -> None:
        """Write the checkpoint.

        Args:
            output: a directory, which must not exist; it appears when it is whole.

        At most 64 MiB of each tensor of prototypes are in memory at a time.

        Raises CheckpointError, OSError: it cannot be written; nothing is left then.
        """
        pieces.write(
            Path(output),
            self.tensors,
            classes=self.classes,
            optimizers=self.optimizers,
            extra=self.extra,
        )
