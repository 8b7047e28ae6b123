"""The selections of a step alone, without a loss.

Public path of `unicom_ext.loss.sampling`.
"""

from unicom_ext.loss.sampling import (
    num_sampled_classes,
    num_selected_features,
    select_classes,
    select_features,
)

__all__ = ["num_sampled_classes", "num_selected_features", "select_classes", "select_features"]
