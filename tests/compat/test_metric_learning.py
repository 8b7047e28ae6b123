"""`unicom_ext.compat.metric_learning` against PyTorch Metric Learning's own losses."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from support.problems import relative_error
from torch import nn

from unicom_ext import ArcFace, CombinedMargin, PartialMarginSoftmax

pml = pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import (  # noqa: E402
    distances,
    losses,
    miners,
    reducers,
    regularizers,
    trainers,
)
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper  # noqa: E402

from unicom_ext.compat.metric_learning import (  # noqa: E402
    ArcFaceLoss,
    CosFaceLoss,
    PartialMarginLoss,
)

C, D, B = 13, 5, 12
PAIRS = (torch.tensor([0, 0, 3]), torch.tensor([1, 2, 0]))


def batch(seed=0):
    """Labels of few classes, so that there are pairs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator, requires_grad=True)
    return x, torch.randint(4, (B,), generator=generator)


def twins(name="ArcFaceLoss", **keywords):
    """Our loss and the library's, with the same prototypes."""
    ours = {"ArcFaceLoss": ArcFaceLoss, "CosFaceLoss": CosFaceLoss}[name](C, D, **keywords)
    theirs = getattr(losses, name)(C, D, **copy.deepcopy(keywords))
    theirs.W.data = ours.head.weight.detach().T.clone()
    return ours, theirs


def agree(ours, theirs, *arguments):
    x = arguments[0]
    mine, right = ours(*arguments), theirs(*arguments)
    grad_x, grad_w = torch.autograd.grad(mine, (x, ours.head.weight))
    right_x, right_w = torch.autograd.grad(right, (x, theirs.W))
    assert relative_error(mine.detach(), right.detach()) < 2e-6
    assert relative_error(grad_x, right_x) < 2e-6
    assert relative_error(grad_w, right_w.T) < 2e-6


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"margin": 17.0, "scale": 10},
        {"reducer": reducers.SumReducer()},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"reducer": reducers.ThresholdReducer(low=30, high=70)},
        {"reducer": reducers.ClassWeightedReducer(torch.linspace(0.5, 2, C))},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
        {"weight_regularizer": regularizers.LpRegularizer(), "weight_reg_weight": 0.3},
        {"distance": distances.CosineSimilarity()},
    ],
    ids=lambda keywords: "-".join(keywords) or "defaults",
)
def test_arcface_is_the_librarys(keywords):
    ours, theirs = twins(**keywords)
    x, labels = batch()
    with torch.no_grad():  # an angle beyond pi minus the margin
        x[0] = 0.3 * x[0] - ours.head.weight[labels[0]]
    agree(ours, theirs, x, labels)
    agree(ours, theirs, x, labels, (*PAIRS, torch.tensor([3, 4, 5])))
    assert relative_error(ours.get_logits(x), theirs.get_logits(x).detach()) < 2e-6


@pytest.mark.parametrize("keywords", [{}, {"margin": 0.2, "scale": 30}])
def test_cosface_is_the_librarys(keywords):
    ours, theirs = twins("CosFaceLoss", **keywords)
    agree(ours, theirs, *batch())


@pytest.mark.parametrize(
    "indices",
    [
        None,
        (*PAIRS, torch.tensor([5, 5, 7])),
        (*PAIRS, torch.tensor([5, 5]), torch.tensor([8, 9])),
        (torch.tensor([], dtype=torch.int64),) * 3,
    ],
    ids=["none", "triplets", "pairs", "nothing found"],
)
def test_what_a_miner_found_weights_the_samples(indices):
    x, labels = batch()
    ours, theirs = twins(reducer=reducers.DoNothingReducer())
    mine, right = ours(x, labels, indices)["loss"], theirs(x, labels, indices)["loss"]
    assert relative_error(mine["losses"].detach(), right["losses"].detach()) < 2e-6
    assert torch.equal(mine["indices"], right["indices"])
    assert mine["reduction_type"] == right["reduction_type"]


def test_several_losses_with_a_miner():
    """As one loss of a sum, with one miner."""
    ours, theirs = twins()
    x, labels = batch()
    results = []
    for loss_fn, weight in ((ours, ours.head.weight), (theirs, theirs.W)):
        both = losses.MultipleLosses(
            [loss_fn, losses.TripletMarginLoss()],
            miners=[miners.MultiSimilarityMiner(), None],
            weights=[1, 0.5],
        )
        loss = both(x, labels)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0], weight))
    assert relative_error(results[0][0], results[1][0]) < 2e-6
    assert relative_error(results[0][1], results[1][1]) < 2e-6


def trained(loss_fn):
    torch.manual_seed(1)
    network = nn.Linear(3, D)
    dataset = torch.utils.data.TensorDataset(torch.randn(24, 3), torch.arange(24) % 6)
    optimizers = {
        "trunk_optimizer": torch.optim.SGD(network.parameters(), lr=0.01),
        "metric_loss_optimizer": torch.optim.SGD(loss_fn.parameters(), lr=0.01),
    }
    torch.manual_seed(2)  # of the order
    trainers.MetricLossOnly(
        models={"trunk": network},
        optimizers=optimizers,
        batch_size=8,
        loss_funcs={"metric_loss": loss_fn},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        dataset=dataset,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(num_epochs=3)
    return network.weight.detach()


def test_a_trainer_of_the_library_trains_the_same():
    ours, theirs = twins()
    before = ours.head.weight.detach().clone()
    assert relative_error(trained(ours), trained(theirs)) < 1e-4
    assert relative_error(ours.head.weight.detach(), theirs.W.detach().T) < 1e-4
    assert not torch.equal(ours.head.weight, before)
    assert int(ours.head.step) == 9


def test_prototypes_begin_as_long_as_the_librarys():
    """Their length decides how far a step of an optimizer turns them."""
    ours, theirs = ArcFaceLoss(500, 64), losses.ArcFaceLoss(500, 64)
    assert float(ours.head.weight.std()) == pytest.approx(float(theirs.W.std()), rel=0.02)
    assert torch.equal(ours.head.weight, ArcFaceLoss(500, 64).head.weight)

    def fill(tensor):
        tensor.copy_(torch.arange(C * D).view(D, C))

    given = ArcFaceLoss(C, D, weight_init_func=fill)
    assert torch.equal(given.head.weight, torch.arange(C * D).view(D, C).T.float())


def test_sampling_is_that_of_the_loss_of_this_package():
    keywords = {"sample_rate": 0.4, "feature_rate": 0.6, "seed": 5}
    loss_fn = PartialMarginLoss(C, D, CombinedMargin(1.0, 0.2, 0.1), 30, **keywords)
    plain = PartialMarginSoftmax(
        D,
        C,
        margin=CombinedMargin(1.0, 0.2, 0.1),
        scale=30,
        margin_grad="exact",
        beyond_pi="linear",
        **keywords,
    )
    plain.weight.data = loss_fn.head.weight.detach().clone()
    for seed in range(2):
        x, labels = batch(seed)
        assert relative_error(loss_fn(x, labels).detach(), plain(x, labels).detach()) < 1e-6
        assert torch.equal(
            loss_fn.head.last_selection.class_index, plain.last_selection.class_index
        )
    loss_fn.eval()
    loss_fn(x, labels)
    assert len(loss_fn.head.last_selection.class_index) == C


def test_ignored_samples_are_left_out():
    x, labels = batch()
    some = labels.clone()
    some[::3] = -100
    kept = some != -100
    loss_fn = ArcFaceLoss(C, D, reducer=reducers.ClassWeightedReducer(torch.linspace(0.5, 2, C)))
    got, right = loss_fn(x, some), loss_fn(x[kept], labels[kept])
    assert relative_error(got.detach(), right.detach()) < 1e-6
    nothing = loss_fn(x, torch.full_like(labels, -100))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, x)[0].any()


def test_statistics_are_the_librarys():
    ours, theirs = twins(collect_stats=True)
    x, labels = batch()
    ours(x, labels), theirs(x, labels)
    assert ours.avg_angle == pytest.approx(float(theirs.avg_angle), rel=1e-5)
    assert (ours.num_classes, ours.scale) == (C, 64)
    ours.head.scale = 32
    assert ours.scale == 32


def test_other_integers_are_labels_and_copies_are_the_same():
    x, labels = batch()
    loss_fn = ArcFaceLoss(C, D)
    right = loss_fn(x, labels)
    assert torch.equal(loss_fn(x, labels.to(torch.uint8)), right)
    for again in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(again(x, labels), right)
    other = ArcFaceLoss(C, D, seed=9)
    other.load_state_dict(loss_fn.state_dict())
    assert torch.equal(other(x, labels), right)
    assert set(loss_fn.state_dict()) == {"head.weight", "head.step", "head._extra_state"}


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"reduction": "sum"}, TypeError, "reduction must be left to a reducer, got 'sum': "),
        ({"distance": distances.LpDistance()}, ValueError, "distance must be CosineSimilarity"),
        (
            {"distance": distances.CosineSimilarity(power=2)},
            ValueError,
            r"distance must be CosineSimilarity\(\) of power 1",
        ),
        ({"reducr": None}, TypeError, "unexpected keyword argument 'reducr'"),
        ({"margin": "0.5"}, TypeError, "margin must be a number of degrees, got '0.5'"),
        ({"sample_rate": 2}, ValueError, r"sample_rate must be in \[0, 1\], got 2"),
    ],
)
def test_what_cannot_be_honoured_is_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        ArcFaceLoss(C, D, **keywords)


def test_bad_batches_are_refused_and_nothing_has_changed():
    x, labels = batch()
    loss_fn = ArcFaceLoss(C, D, sample_rate=0.5)
    for arguments, error, message in (
        ((x, labels, None, x.detach()), ValueError, "ref_emb is not supported"),
        ((x, labels > 3), TypeError, "labels must be an int32 or int64 tensor"),
        ((x, labels + 1j), TypeError, "labels must be an int32 or int64 tensor"),
        ((x, labels, None, None, labels + 0), ValueError, "ref_labels is not supported"),
        ((x, labels[:, None]), ValueError, r"labels must have shape \[B\], got \[12, 1\]"),
        ((x, labels[1:]), ValueError, r"labels must have shape \[12\]"),
        ((x, labels + C), ValueError, r"labels must be in \[0, 13\)"),
        ((x, labels.float()), TypeError, "labels must be an int32 or int64 tensor"),
        ((x, None), TypeError, "labels must be an int32 or int64 tensor"),
    ):
        with pytest.raises(error, match=message):
            loss_fn(*arguments)
    assert int(loss_fn.head.step) == 0
    assert torch.isfinite(loss_fn(x, labels, None, x, labels))  # which the library takes, too


def test_a_margin_in_radians_is_noticed():
    with pytest.warns(UserWarning, match="margin is in degrees here, and 0.5 is less than one"):
        ArcFaceLoss(C, D, margin=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ArcFaceLoss(C, D, margin=0).head.margin == ArcFace(0)


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    for name in [name for name in sys.modules if name.startswith("pytorch_metric_learning.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "unicom_ext.compat.metric_learning")
    with pytest.raises(ImportError, match=r"pip install 'pytorch-metric-learning>=2\.9'"):
        import unicom_ext.compat.metric_learning  # noqa: F401


# ---- several ranks ----


def of_rank(group):
    """The loss of each rank, and its gradients as DistributedDataParallel would average them."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    loss_fn = ArcFaceLoss(C, D, sample_rate=0.5, seed=3, process_group=group)
    x, labels = batch()
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    own = x.detach()[part].requires_grad_()
    loss = loss_fn(own, labels[part])
    loss.backward()
    return loss.item(), own.grad / world_size, loss_fn.head.weight.grad.to_dense()


def test_ranks_share_the_classes(ranks):
    (loss, grad_x, grad_w), *_ = ranks.run(1, of_rank)
    results = ranks.run(2, of_rank)
    assert sum(theirs for theirs, *_ in results) / 2 == pytest.approx(loss, rel=1e-5)
    assert relative_error(torch.cat([x for _, x, _ in results]), grad_x) < 1e-5
    assert relative_error(torch.cat([w for *_, w in results]), grad_w) < 1e-5


def nothing_to_learn(group):
    """On rank 0 no loss is large enough for the reducer, and every label is ignored then."""
    rank = dist.get_rank(group)
    high = 1e9 if rank == 0 else 0.0
    loss_fn = ArcFaceLoss(C, D, reducer=reducers.ThresholdReducer(low=high), process_group=group)
    x, labels = batch(rank)
    loss_fn(x, labels).backward()
    grad = loss_fn.head.weight.grad
    assert x.grad.any() == (rank == 1)
    loss_fn(x, labels if rank else torch.full_like(labels, -100)).backward()
    return bool(torch.isfinite(grad).all())


def test_a_rank_may_have_nothing_to_learn_from(ranks):
    assert ranks.run(2, nothing_to_learn) == [True, True]


def refused(group):
    loss_fn, found = ArcFaceLoss(C, D, process_group=group), []
    x, labels = batch()
    for wrong in (
        lambda: loss_fn(x, labels[1:] if dist.get_rank(group) else labels),
        lambda: DistributedLossWrapper(loss_fn),
        lambda: ArcFaceLoss(C, D, process_group=group, weight_init_func=nn.init.zeros_),
        lambda: loss_fn(x, labels[:, None] if dist.get_rank(group) else labels),
        lambda: loss_fn(x, labels, None, x + 0 if dist.get_rank(group) else None),
        lambda: loss_fn(x, labels, (torch.tensor([B]),) * 3 if dist.get_rank(group) else None),
    ):
        with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as caught:
            wrong()
        found.append(str(caught.value))
    return found


def test_what_ranks_are_refused(ranks):
    first, second = ranks.run(2, refused)
    assert first[0].startswith("rank 1 of the process group raised ValueError: labels must have")
    assert second[0].startswith("labels must have shape [12]")
    for of_rank in (first, second):
        assert "must not be in a DistributedLossWrapper" in of_rank[1]
        assert "weight_init_func must be None with process_group" in of_rank[2]
        assert "labels must have shape [B], got [12, 1]" in of_rank[3]
        assert "ref_emb is not supported" in of_rank[4]
        assert "index 12 is out of bounds" in of_rank[5]


def test_their_wrapper_takes_a_loss_of_one_process():
    wrapped = DistributedLossWrapper(ArcFaceLoss(C, D))
    with pytest.warns(UserWarning, match="non-distributed"):
        assert torch.isfinite(wrapped(*batch()))
