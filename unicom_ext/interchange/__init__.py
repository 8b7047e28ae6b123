"""Checkpoints of other trainers, read and written: `unicom-ext import` and the way back::

    found = interchange.read(sorted(Path("ms1mv3").glob("checkpoint_gpu_*.pt")))
    found.write("runs/imported")
    checkpoint.load("runs/imported", modules={"encoder": backbone, "loss": loss_fn},
                    optimizers={"main": optimizer})

What is read: InsightFace's files of each rank, of all its versions; weights of an encoder, such as
those that UNICOM has published; the prototypes of pytorch-metric-learning's losses. What is
written: InsightFace's files for any number of ranks, and prototypes as one array.
"""

from __future__ import annotations

from unicom_ext.interchange.found import Found
from unicom_ext.interchange.partial_fc import to_partial_fc
from unicom_ext.interchange.prototypes import save_prototypes
from unicom_ext.interchange.reading import read
from unicom_ext.utils.files import CheckpointError

__all__ = ["CheckpointError", "Found", "read", "save_prototypes", "to_partial_fc"]
