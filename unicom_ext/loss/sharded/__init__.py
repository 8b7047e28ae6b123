"""The loss with prototypes sharded over the ranks of a process group.

`torch.distributed` is the engine. A step costs one gather of the ranks' embeddings and labels, one
sum of a few numbers per sample between the shards of the classes, and in backward one sum of the
embedding gradients that leaves each rank its own rows; `volume` counts the bytes.

Every rank makes the same calls in the same order, so a rank that fails must not leave the others
waiting: see `unicom_ext.distributed.failures`.

Modules, each on those before it: `volume`, `batch` (the batch of all ranks), `call` (what the
operators take and return), `operators` (a step as two operators), `step` (what the module and the
function call).
"""
