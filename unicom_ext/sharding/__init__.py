"""Prototypes sharded over the ranks of a process group.

`torch.distributed` is the engine. A step costs one gather of the ranks' embeddings and labels, one
sum of two numbers per sample between the shards of the classes, and in backward one sum of the
embedding gradients that leaves each rank its own rows; `communication_volume` counts the bytes.

Every rank makes the same calls in the same order, so a rank that fails must not leave the others
waiting: see `failures`.

Modules, each on those before it: `shard` (class ranges, collectives, global tensors), `volume`,
`failures` (every rank raises), `batch` (the batch of all ranks), `operators` (a step), `loss` (what
`unicom_ext.loss` and `unicom_ext.functional` call).
"""

from unicom_ext.sharding.failures import agree
from unicom_ext.sharding.shard import ClassShard, class_range
from unicom_ext.sharding.volume import Volume, communication_volume

__all__ = ["ClassShard", "Volume", "agree", "class_range", "communication_volume"]
