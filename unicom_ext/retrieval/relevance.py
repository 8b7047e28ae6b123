"""Which items of a gallery are relevant to which queries: those that have the query's label."""

from __future__ import annotations

import torch
from torch import Tensor

from unicom_ext.utils.search import LAST_ROW, TieRank

WRONG = LAST_ROW + 1  # the bit of a key's low half that says that the item is not relevant


def against_the_model(query_labels: Tensor, gallery_labels: Tensor) -> TieRank:
    """Of equal scores those of items that are not relevant come first, then by id.

    query_labels [Nq], gallery_labels [Ng] or [Ng, P]; negative ones of several are none.
    """
    if gallery_labels.ndim == 1:

        def is_wrong(query: Tensor, item: Tensor) -> Tensor:
            return query_labels[query] != gallery_labels[item]

    else:
        # Pairs of label and item as one number each, which are looked for by bisection: the search
        # asks for many pairs at a time, and few items have as many labels as the longest row.
        known, number = query_labels.long().unique(return_inverse=True)
        label, item_of = entries(gallery_labels)
        found = torch.isin(label, known)
        pairs = torch.searchsorted(known, label[found]) * len(gallery_labels) + item_of[found]
        pairs = torch.cat([pairs.sort().values, pairs.new_tensor([torch.iinfo(pairs.dtype).max])])

        def is_wrong(query: Tensor, item: Tensor) -> Tensor:
            wanted = number[query] * len(gallery_labels) + item
            return pairs[torch.searchsorted(pairs, wanted)] != wanted

    def rank_of(query: Tensor, item: Tensor) -> Tensor:
        return is_wrong(query, item) * WRONG + (LAST_ROW - item)

    return TieRank(rank_of, lambda begin: WRONG + (LAST_ROW - begin))


def num_relevant(
    query_labels: Tensor,
    gallery_labels: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    exclude_self: bool,
) -> Tensor:
    """How many items of each query's label it may meet, int64 [Nq]. See `against_the_model`."""
    labels, items = entries(gallery_labels)
    count = _num_equal(query_labels, labels)
    if groups is None:
        return count - int(exclude_self)
    # As many of them as have its group too are not met; itself is one of these if it has a group.
    label, group = (
        torch.cat([a.long(), b.long()]).unique(return_inverse=True)[1]
        for a, b in ((query_labels, labels), (groups[0], groups[1][items]))
    )
    pair = label * (group.max() + 1) + group
    own = _num_equal(*pair.split([len(query_labels), len(labels)]))
    return count - torch.where(groups[0] >= 0, own, int(exclude_self))


def has_no_label(labels: Tensor) -> Tensor:
    """bool [N] of labels [N] or [N, P]."""
    return labels < 0 if labels.ndim == 1 else (labels < 0).all(1)


def entries(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(label, number of the row) int64 [m] of labels [N], or of [N, P] without those that are
    negative or stand in their row twice."""
    if labels.ndim == 1:
        return labels.long(), torch.arange(len(labels), device=labels.device)
    rows = labels.long().sort(dim=1).values
    counts = rows >= 0
    counts[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    return rows[counts], counts.nonzero()[:, 0]


def _num_equal(these: Tensor, those: Tensor) -> Tensor:
    """How often each of `these` occurs among `those`, int64."""
    ordered = those.long().sort().values
    wanted = these.long().contiguous()
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
