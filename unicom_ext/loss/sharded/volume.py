"""What a step sends: bytes counted from the sizes of its messages."""

from __future__ import annotations

from typing import NamedTuple

HEADER = 7  # numbers that ranks exchange about uneven batches


class Volume(NamedTuple):
    """Bytes that one rank sends in one step; it receives as many.

    Attributes:
        sizes: the exchange of sizes, only where batches may be uneven.
        embeddings: gathered in forward.
        labels: gathered, with per-sample margins.
        sums: summed over ranks.
        grad_embeddings: summed over ranks and scattered in backward.
    """

    sizes: int
    embeddings: int
    labels: int
    sums: int
    grad_embeddings: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self)


def communication_volume(
    batch_size: int,
    embedding_size: int,
    world_size: int,
    *,
    uneven_batches: bool = False,
    embedding_bytes: int = 4,
    grad_bytes: int = 4,
    per_sample_margins: int = 0,
    positives: int = 1,
    reduction: str = "mean",
) -> Volume:
    """Bytes that one rank sends in one training step of the loss, backward included.

    The collectives' own minimum, which ring algorithms reach: n - 1 times its part in a gather or a
    reduce-scatter, and 2 (n - 1) / n times the whole in an all-reduce. It depends neither on the
    number of classes nor on the rates. Beyond the range of a constant shift (scale above about 79)
    and with `return_metrics`, one more all-reduce of B numbers comes to `sums`. A scale with a
    gradient adds 8 bytes for each sample to what is summed and scattered in backward.

    Args:
        batch_size: b, samples of one rank.
        embedding_size: d, the dimensions of an embedding.
        world_size: n, how many ranks there are.
        uneven_batches: whether sizes are exchanged first.
        embedding_bytes: per value of the embeddings, 2 for half precision.
        grad_bytes: per value of their gradient while it is summed: 8 for float64, else 4.
        per_sample_margins: how many of m2 and m3 are per-sample tensors.
        positives: P of labels [B, P].
        reduction: of the loss; ``"none"`` gathers the upstream gradients too.

    Returns:
        The bytes by message, and their `total`.
    """
    others = world_size - 1
    all_batches = world_size * batch_size
    labels = others * batch_size * 8 * positives * (1 + per_sample_margins)
    if reduction == "none":
        labels += others * batch_size * 4
    return Volume(
        sizes=others * HEADER * 8 if uneven_batches else 0,
        embeddings=others * batch_size * embedding_size * embedding_bytes,
        labels=labels,
        sums=round(2 * others / world_size * (all_batches + 3) * 8 * (3 + positives)),
        grad_embeddings=others * batch_size * embedding_size * grad_bytes,
    )
