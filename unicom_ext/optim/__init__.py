"""Optimizers that touch only the prototypes that were sampled, and dense parameters as torch's do::

    loss_fn = PartialMarginSoftmax(512, 1_000_000, sample_rate=0.1, sparse_grad=True)
    optimizer = RowAdamW([
        {"params": encoder.parameters()},
        {"params": loss_fn.parameters(), "weight_decay": 0.0},
    ])

With `sparse_grad=True` the gradient of the prototypes holds the rows of the sampled classes.
Zeroing, accumulation over micro-batches, hooks and `torch.amp.GradScaler` work as for any gradient;
to clip, use `clip_grad_norm_` of this module, because torch's own refuses sparse gradients.

On CUDA a step does not wait for the device, with one exception: an lr that is a tensor there has to
be read. The lr, the other options and the decay caught up so far are numbers of the host. A CUDA
graph that has captured a step would therefore repeat it with the numbers it had then, and weight
decay would not be caught up: capture forward and backward, and call `step` outside of the graph.
Ids of a sparse gradient that are not rows of the parameter, an error on the CPU, are passed over.
"""

from unicom_ext.optim.adamw import RowAdamW
from unicom_ext.optim.clip import clip_grad_norm_
from unicom_ext.optim.sgd import RowSGD

__all__ = ["RowAdamW", "RowSGD", "clip_grad_norm_"]
