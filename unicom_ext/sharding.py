"""Which rank owns which classes, and what a step sends.

Public path of `unicom_ext.distributed` and `unicom_ext.loss.sharded`.
"""

from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.shard import ClassShard, class_range
from unicom_ext.loss.sharded.volume import Volume, communication_volume

__all__ = ["ClassShard", "Volume", "agree", "class_range", "communication_volume"]
