"""Sub-centres with classes on several ranks: a class's prototypes are all on one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.sharded_loss import errors_of
from support.sharded_run import CLASSES, Run, assert_close, whole

from unicom_ext import ArcFace, PartialMarginSoftmax, checkpoint, functional, sharding
from unicom_ext.subcenters import SubCenters
from unicom_ext.utils.files import CheckpointError

DIM, FEW, CENTERS = 8, 70, 3
SIZES = {1: [12], 2: [7, 5], 3: [5, 0, 7], 4: [3, 4, 1, 4]}


# ---- the loss ----


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 64.0, "sampled": 40},
        {"scale": 64.0, "positives": 3, "reduction": "none", "sparse_grad": True},
        {"scale": 30.0, "positives": 3, "reduction": "none", "multi_label": "separate"},
        {"scale": 200.0, "features": 5, "interclass_filter": 0.4},
    ],
    ids=str,
)
def test_any_number_of_ranks_is_one_process(ranks, world_size, options):
    options = {**options, "num_centers": CENTERS}
    for errors in ranks.run(world_size, errors_of, SIZES[world_size], FEW, DIM, options):
        assert max(errors) < 2e-5


def test_a_rank_without_classes(ranks):
    options = {"scale": 64.0, "sparse_grad": True, "num_centers": CENTERS}
    for errors in ranks.run(3, errors_of, SIZES[3], 2, DIM, options):
        assert max(errors) < 2e-5


def trained(group, optimizer, steps=6):
    run = Run(group, optimizer=optimizer, num_centers=CENTERS)
    return run.train(steps), [t.double() for t in run.tensors()[:-1]], weight_of(run)


def weight_of(run):
    return whole(run.loss.state_dict()["weight"]).reshape(-1, 8).double()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "RowAdamW", "RowSGD, exact"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_is_that_of_one_process(ranks, world_size, optimizer):
    losses, encoder, weight = trained(None, optimizer)
    assert weight.shape == (CLASSES * CENTERS, 8)
    for got in ranks.run(world_size, trained, optimizer):
        assert got[0] == pytest.approx(losses, rel=1e-4)
        assert_close(got[1], encoder, 1e-3)
        assert_close([got[2]], [weight], 1e-3)


# ---- state ----


def saved(group, directory, optimizer):
    run = Run(group, optimizer=optimizer, num_centers=CENTERS)
    run.train(3)
    checkpoint.save(directory, **run.parts())
    return run.train(3), weight_of(run)


def loaded(group, directory, optimizer):
    run = Run(group, optimizer=optimizer, num_centers=CENTERS)
    checkpoint.load(directory, **run.parts())
    run.step = 3
    return run.train(3), weight_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "RowAdamW of bf16 moments", "RowSGD, exact"])
def test_other_numbers_of_ranks_go_on(ranks, tmp_path, optimizer):
    losses, weight = ranks.run(3, saved, tmp_path / "c", optimizer)[0]
    for world_size in (2, 4):
        for got in ranks.run(world_size, loaded, tmp_path / "c", optimizer):
            assert got[0] == pytest.approx(losses, rel=1e-4)
            assert_close([got[1]], [weight], 1e-3)
    got = loaded(None, tmp_path / "c", optimizer)
    assert got[0] == pytest.approx(losses, rel=1e-4)
    assert_close([got[1]], [weight], 1e-3)
    saved(None, tmp_path / "one", optimizer)
    for got in ranks.run(3, loaded, tmp_path / "one", optimizer):
        assert got[0] == pytest.approx(losses, rel=1e-4)


def remapped(group, directory):
    """Prototypes of a loss of other classes, whole, beside the saved ones."""
    loss_fn = PartialMarginSoftmax(8, 40, num_centers=CENTERS, seed=9, process_group=group)
    class_map = (7 * torch.arange(40) + 3) % CLASSES
    class_map[5] = -1
    fresh = whole(loss_fn.state_dict()["weight"]).reshape(40, CENTERS, 8)
    checkpoint.load(directory, modules={"loss": loss_fn}, class_map=class_map)
    return class_map, fresh, whole(loss_fn.state_dict()["weight"]).reshape(40, CENTERS, 8)


def what_merging_says(group, directory):
    loss_fn = PartialMarginSoftmax(8, 40, num_centers=CENTERS, process_group=group)
    try:
        checkpoint.load(
            directory, modules={"loss": loss_fn}, class_map=torch.arange(80).view(40, 2)
        )
    except Exception as error:
        return str(error)
    return "nothing raised"


def what_other_centers_say(group, directory):
    loss_fn = PartialMarginSoftmax(8, CLASSES, num_centers=2, process_group=group)
    before = loss_fn.weight.detach().clone()
    try:
        checkpoint.load(directory, modules={"loss": loss_fn})
    except CheckpointError as error:
        assert torch.equal(before, loss_fn.weight)
        return str(error)
    return "nothing raised"


@pytest.mark.slow
def test_classes_move_with_all_their_centers(ranks, tmp_path):
    run = Run(None, num_centers=CENTERS)
    checkpoint.save(tmp_path / "c", **run.parts())
    there = run.loss.weight.detach().view(CLASSES, CENTERS, 8)
    of_ranks = ranks.run(3, remapped, tmp_path / "c")
    for class_map, fresh, here in (remapped(None, tmp_path / "c"), *of_ranks):
        assert torch.equal(here[5], fresh[5])
        known = class_map >= 0
        assert torch.equal(here[known], there[class_map[known]])
    for message in ranks.run(2, what_merging_says, tmp_path / "c"):
        assert "class_map can merge classes only where each has one center" in message
    for message in ranks.run(2, what_other_centers_say, tmp_path / "c"):
        assert "has 3 centers of each class there, but the loss here has num_centers=2" in message


def state_dicts(group):
    """The state dict of each kind goes into another loss."""
    kinds = []
    for full in (False, True):
        one, other = (
            PartialMarginSoftmax(
                8, 10, num_centers=CENTERS, process_group=group, seed=s, full_state_dict=full
            )
            for s in (1, 2)
        )
        state = one.state_dict()
        kinds.append(list(state["weight"].shape))
        other.load_state_dict(state)
        assert torch.equal(one.weight, other.weight)
        alone = PartialMarginSoftmax(8, 10, num_centers=CENTERS, seed=1)
        assert torch.equal(one.weight, alone.weight[one.shard.start * 3 : one.shard.stop * 3])
    return kinds


def test_state_dicts_are_of_all_classes(ranks):
    for kinds in ranks.run(3, state_dicts):
        assert kinds == [[10, CENTERS, 8], [30, 8]]


# ---- inference and cleaning ----


def answers(group, sizes):
    torch.manual_seed(3)
    x, labels = torch.randn(sum(sizes), DIM), torch.randint(20, (sum(sizes),))
    labels[1] = -100
    rank = 0 if group is None else dist.get_rank(group)
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss_fn = PartialMarginSoftmax(DIM, 20, num_centers=CENTERS, process_group=group)
    found = loss_fn.topk(x[part], 6)
    ids = torch.tensor([19, 3, 3])
    logits = loss_fn.logits(x[part], ids), loss_fn.logits(x[part])
    centers = SubCenters(loss_fn)
    nearest = centers.add(x[part], labels[part])
    clean = centers.is_clean(x[part], labels[part], math.radians(80))
    single = centers.to_single_center()
    single(x[part], labels[part]).backward()
    assert single.weight.grad.shape == single.weight.shape
    assert whole(single.state_dict()["weight"]).shape == (20, DIM)
    return (found.cosine, found.class_index, *logits, nearest, clean), (
        centers.counts,
        single.weight.detach(),
    )


def test_ranks_find_what_one_process_finds(ranks):
    of_samples, of_classes = answers(None, [12])
    for world_size in (2, 3):
        got = ranks.run(world_size, answers, SIZES[world_size])
        for i, right in enumerate(of_samples):
            assert torch.equal(torch.cat([each[0][i] for each in got]), right)
        for i, right in enumerate(of_classes):
            assert torch.equal(torch.cat([each[1][i] for each in got]), right)


def what_bad_labels_say(group):
    centers = SubCenters(PartialMarginSoftmax(DIM, 20, num_centers=2, process_group=group))
    labels = torch.tensor([3, 20 if dist.get_rank(group) else 4])
    try:
        centers.add(torch.randn(2, DIM), labels)
    except Exception as error:
        return f"{error} {int(centers.counts.sum())}"
    return "nothing raised"


def test_every_rank_raises_where_ones_labels_are_bad(ranks):
    messages = ranks.run(2, what_bad_labels_say)
    assert messages[1].startswith("labels must be in [0, 20)")
    assert "rank 1" in messages[0]
    assert all(message.endswith(" 0") for message in messages)


def what_angles_say(group, angles):
    centers = SubCenters(PartialMarginSoftmax(DIM, 20, num_centers=2, process_group=group))
    try:
        centers.is_clean(torch.randn(2, DIM), torch.arange(2), angles[dist.get_rank(group)])
    except Exception as error:
        return str(error)
    return "nothing raised"


def test_every_rank_raises_where_one_has_another_angle(ranks):
    same = "max_angle must be the same on every rank, got 1.0 on rank 0, 1.5 on rank 1"
    assert ranks.run(2, what_angles_say, (1.0, 1.5)) == [same, same]
    messages = ranks.run(2, what_angles_say, (1.0, 75))
    assert messages[1] == "max_angle must be radians in (0, pi], got 75"
    assert "max_angle must be radians in (0, pi], got 75" in messages[0]


# ---- bad input ----


def what_it_says(group, centers):
    rank = dist.get_rank(group)
    try:
        PartialMarginSoftmax(DIM, FEW, num_centers=centers[rank], process_group=group)
    except Exception as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("centers", [(2, 3), (3, 1)])
def test_every_rank_raises_where_one_has_other_centers(ranks, centers):
    for message in ranks.run(2, what_it_says, centers):
        assert "num_centers" in message
    messages = ranks.run(2, what_it_says, (2, 0))
    assert messages[1] == "num_centers must be an int in [1, 16], got 0"
    assert "num_centers must be an int in [1, 16], got 0" in messages[0]


def what_wrong_rows_say(group):
    rows = 3 * len(sharding.ClassShard(group, FEW)) - (3 if dist.get_rank(group) else 0)
    try:
        functional.partial_margin_softmax(
            torch.randn(2, DIM),
            torch.arange(2),
            torch.randn(rows, DIM),
            margin=ArcFace(0.3),
            scale=8.0,
            num_centers=3,
            num_classes=FEW,
            process_group=group,
        )
    except Exception as error:
        return str(error)
    return "nothing raised"


def test_every_rank_raises_where_one_has_other_rows(ranks):
    messages = ranks.run(2, what_wrong_rows_say)
    assert messages[1].startswith("prototypes must be [105, d] on rank 1 of 2, the classes from 35")
    assert "rank 1" in messages[0]
