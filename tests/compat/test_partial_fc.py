"""`unicom_ext.compat`: trainers of PartialFC v2 and UNICOM, as they are written."""

from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from partial_fc import PartialFC
from support.problems import relative_error
from torch import nn

import unicom_ext
from unicom_ext import ArcFace, CombinedMargin, CosFace, PartialMarginSoftmax
from unicom_ext.compat import PartialFC_V2

C, D, B = 61, 8, 12


class Published(nn.Module):
    """A margin loss of the published trainers, of which numbers are read. It must not be called."""

    def __init__(self, **numbers):
        super().__init__()
        vars(self).update(numbers)


COMBINED = {"s": 32.0, "m1": 1.0, "m2": 0.5, "m3": 0.0, "interclass_filtering_threshold": 0}


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator, requires_grad=True)
    return x, torch.randint(C, (B,), generator=generator)


def test_labels_of_uint64_are_not_narrowed():
    head = PartialFC_V2(ArcFace(), 8, 20)
    labels = torch.tensor([3, 2**62], dtype=torch.uint64)
    with pytest.raises(
        TypeError, match=r"labels must be an int32 or int64 tensor, .* got a .*uint64"
    ):
        head(torch.ones(2, 8), labels)


@pytest.mark.parametrize(
    ("numbers", "margin", "scale", "threshold"),
    [
        (COMBINED, ArcFace(0.5), 32.0, None),
        ({**COMBINED, "interclass_filtering_threshold": 0.2}, ArcFace(0.5), 32.0, 0.2),
        ({**COMBINED, "m2": 0.0, "m3": 0.4}, CosFace(0.4), 32.0, None),
        ({"s": 48.0, "margin": 0.3, "easy_margin": False}, ArcFace(0.3), 48.0, None),
        ({"scale": 48.0, "margin": 0.3}, ArcFace(0.3), 48.0, None),
        ({"s": 30.0, "m": 0.35}, CosFace(0.35), 30.0, None),
    ],
)
def test_published_margin_losses_are_read(numbers, margin, scale, threshold):
    head = PartialFC_V2(Published(**numbers), D, C)
    assert (head.margin, head.scale, head.interclass_filter) == (margin, scale, threshold)


def test_a_margin_of_this_package_will_do_too():
    head = PartialFC_V2(CombinedMargin(1.0, 0.2, 0.1), D, C, scale=20.0)
    assert (head.margin, head.scale) == (CombinedMargin(1.0, 0.2, 0.1), 20.0)


def test_loss_and_gradients_are_those_of_partial_fc():
    ours, theirs = PartialFC_V2(Published(**COMBINED), D, C), PartialFC(D, C, margin=0.5, scale=32)
    ours.load_state_dict({"weight": theirs.weight.detach()}, strict=False)
    x, labels = batch()
    results = []
    for head in (ours, theirs):
        loss = head(x, labels)
        results.append((loss, *torch.autograd.grad(loss, (x, head.weight))))
    for got, right in zip(*results, strict=True):
        assert relative_error(got.detach(), right.detach()) < 1e-5


def test_selection_sizes():
    head = PartialFC_V2(Published(**COMBINED), D, 300, 0.1, True, 1, 5)
    head(*batch())
    classes, dimensions = head.last_selection
    assert 30 <= len(classes) <= 30 + B
    assert len(dimensions) == 5
    for count in range(1, 130):
        assert PartialFC_V2(ArcFace(), 129, 2, sample_num_feat=count).num_features == count


def test_positives_alone_as_a_published_configuration_has_it():
    head = PartialFC_V2(Published(**COMBINED), D, C, sample_rate=0)
    head.train()
    x, labels = batch()
    loss = head(x, labels)
    positives = labels.unique()
    assert torch.equal(head.last_selection.class_index, positives)
    theirs = PartialFC(D, len(positives), margin=0.5, scale=32)
    theirs.load_state_dict({"weight": head.weight.detach()[positives]})
    right = theirs(x, torch.searchsorted(positives, labels))
    assert relative_error(loss.detach(), right.detach()) < 1e-5


def test_the_pairs_of_a_miner_are_none_of_its_arguments():
    head = PartialFC_V2(Published(**COMBINED), D, C)
    x, labels = batch()
    pairs = (torch.arange(3),) * 4
    with pytest.raises(TypeError) as caught:
        head(x, labels, pairs)
    assert str(caught.value) == (
        "step must be an int or an int64 tensor, got a tuple. If these are the indices_tuple of a "
        "miner of pairs: this loss compares with all classes, and takes none"
    )
    assert int(head.step) == 0


def test_labels_as_trainers_have_them():
    head = PartialFC_V2(Published(**COMBINED), D, C)
    x, labels = batch()
    right = head(x, labels)
    for given in (labels[:, None], labels.to(torch.uint8), labels.short()):
        before = given.clone()
        assert torch.equal(head(x, given), right)
        assert torch.equal(given, before)
        assert given.shape == before.shape
    with pytest.raises(TypeError, match="labels must be an int32 or int64 tensor"):
        head(x, labels.float())


def test_autocast_does_not_change_the_precision():
    x, labels = batch()
    for fp16, precision in ((False, "fp32"), (True, "fp16")):
        head = PartialFC_V2(Published(**COMBINED), D, C, fp16=fp16)
        plain = PartialMarginSoftmax(D, C, margin=ArcFace(0.5), scale=32.0, precision=precision)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(x, labels), plain(x, labels))


def test_margins_that_the_published_loss_would_not_combine():
    with pytest.warns(UserWarning, match="the published loss uses m3 alone"):
        head = PartialFC_V2(Published(**{**COMBINED, "m3": 0.1}), D, C)
    assert head.margin == CombinedMargin(1.0, 0.5, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PartialFC_V2(Published(**COMBINED), D, C)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"margin_loss": lambda logits, labels: logits},
            TypeError,
            "margin_loss must be .* got <f",
        ),
        ({"margin_loss": Published(s=64.0)}, TypeError, "margin_loss must be .* m1, m2, m3"),
        ({"margin_loss": 0.5}, TypeError, "margin_loss must be .* got 0.5"),
        ({"is_normlize": 0}, ValueError, "is_normlize must be 1, got 0"),
        ({"sample_num_feat": 0}, ValueError, r"sample_num_feat must be .* in \[1, 8\], got 0"),
        ({"sample_num_feat": 9}, ValueError, r"sample_num_feat must be .* in \[1, 8\], got 9"),
        ({"sample_num_feat": 0.5}, TypeError, r"sample_num_feat must be an integer .* got 0.5"),
        ({"sample_rate": 1.5}, ValueError, r"sample_rate must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, error, message):
    arguments = {"margin_loss": Published(**COMBINED), **arguments}
    with pytest.raises(error, match=message):
        PartialFC_V2(embedding_size=D, num_classes=C, **arguments)


# ---- several ranks ----


def trained(group, steps=4):
    """Losses of a trainer, and its files: one per rank, as the published trainers write them."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    head = PartialFC_V2(Published(**COMBINED), D, C, 0.5, process_group=group, seed=3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    losses, file = [], io.BytesIO()
    for step in range(steps):
        if step == steps // 2:
            torch.save({"softmax_fc": head.state_dict(), "opt": optimizer.state_dict()}, file)
        x, labels = batch(step)
        part = slice(rank * B // world_size, (rank + 1) * B // world_size)
        optimizer.zero_grad()
        loss = head(x[part], labels[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Into a new head, from this rank's file.
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    head = PartialFC_V2(Published(**COMBINED), D, C, 0.5, process_group=group)
    head.load_state_dict(saved["softmax_fc"])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved["opt"])
    x, labels = batch(steps // 2)
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return losses, head(x[part], labels[part]).item()


def test_a_trainer_on_several_ranks(ranks):
    (losses, again), *_ = ranks.run(1, trained)
    assert again == pytest.approx(losses[2], rel=1e-6)
    for theirs, resumed in ranks.run(3, trained):
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert resumed == pytest.approx(losses[2], rel=1e-5)


def published_parts(group, parts):
    head = PartialFC_V2(Published(**COMBINED), D, C, process_group=group)
    head.load_state_dict({"weight": torch.cat(parts)}, strict=False)
    return head(*batch()).item()


def test_going_on_from_published_files(ranks):
    # Their ranks own C // n classes and one more on the first C % n ranks.
    whole = torch.randn(C, D, generator=torch.Generator().manual_seed(4))
    parts = [whole[:21], whole[21:41], whole[41:]]
    right = published_parts(None, parts)
    assert math.isfinite(right)
    for loss in ranks.run(2, published_parts, parts):
        assert loss == pytest.approx(right, rel=1e-5)


def one_rank_is_wrong(group):
    margin_loss = Published(**COMBINED) if dist.get_rank(group) else 0.5
    PartialFC_V2(margin_loss, D, C, process_group=group)


def test_every_rank_raises(ranks):
    first, second = ranks.outcomes(2, one_rank_is_wrong)
    assert isinstance(first, TypeError)
    assert "rank 0 of the process group raised TypeError: margin_loss must be" in str(second)


def test_all_ranks_share_the_classes_by_default(ranks):
    assert ranks.run(4, shares_by_default) == [(4, 16), (4, 16), (4, 16), (4, 13)]


def shares_by_default(group):
    head = PartialFC_V2(Published(**COMBINED), D, C)
    return head.shard.world_size, len(head.weight)


def test_it_is_a_part_of_the_package():
    assert unicom_ext.compat.PartialFC_V2 is PartialFC_V2
