"""The loss behind the names and arguments of other libraries, so that their trainers stay.

`PartialFC_V2` is the head of PartialFC and UNICOM trainers. `unicom_ext.compat.metric_learning` has
losses for PyTorch Metric Learning; it is imported by name, because it needs that package.
"""

from unicom_ext.compat.partial_fc import PartialFC_V2

__all__ = ["PartialFC_V2"]
