"""The norm of gradients of which each rank holds a part.

Public path of `unicom_ext.optim.gradients`.
"""

from unicom_ext.optim.gradients import clip_grad_norm_, global_grad_norm

__all__ = ["clip_grad_norm_", "global_grad_norm"]
