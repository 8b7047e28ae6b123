"""ElasticFace's margins: drawn by seed, step and place."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from unicom_ext import PartialMarginSoftmax
from unicom_ext.margins import ArcFace, CosFace, ElasticArcFace, ElasticCosFace

BOTH = pytest.mark.parametrize("make", [ElasticArcFace, ElasticCosFace])
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 9


def drawn(margins, **options):
    given = margins(X, Y, **options)
    return given.m2 if isinstance(margins, ElasticArcFace) else given.m3


@pytest.mark.parametrize(("make", "mean"), [(ElasticArcFace, 0.5), (ElasticCosFace, 0.35)])
def test_draws_from_the_papers_distribution(make, mean):
    many = torch.zeros(40_000, dtype=torch.int64)
    given = make()(torch.zeros(40_000, 1), many)
    m, other = (given.m2, given.m3) if make is ElasticArcFace else (given.m3, given.m2)
    assert other == 0.0
    assert float(m.mean()) == pytest.approx(mean, abs=4 * 0.05 / 200)
    assert float(m.std()) == pytest.approx(0.05, rel=0.02)


@BOTH
def test_each_step_seed_and_place_draws_another(make):
    margins = make(seed=3)
    first, second = drawn(margins), drawn(margins)
    assert int(margins.step) == 2
    everything = torch.cat([first, second, drawn(make(seed=4))])
    assert len(everything.unique()) == 36
    assert torch.equal(drawn(margins, step=0), first)
    assert torch.equal(drawn(margins, step=1), second)
    assert int(margins.step) == 2


@BOTH
def test_goes_on_from_its_state_dict(make):
    margins = make(seed=3)
    drawn(margins)
    resumed = make()
    resumed.load_state_dict(margins.state_dict())
    assert torch.equal(drawn(margins), drawn(resumed))
    assert {name: int(v) for name, v in resumed.state_dict().items()} == {"seed": 3, "step": 2}


@BOTH
def test_made_on_the_meta_device_starts_as_any_other(make):
    with torch.device("meta"):
        margins = make(seed=3)
    margins.to_empty(device="cpu")
    for buffer in margins.buffers():
        buffer.fill_(77)  # what may have been in the memory before
    margins.reset_parameters()
    assert torch.equal(drawn(margins), drawn(make(seed=3)))


def test_the_mean_in_eval_mode():
    assert ElasticArcFace().eval()(X, Y) == ArcFace(0.5)
    margins = ElasticCosFace(0.2).eval()
    assert margins(X, Y) == CosFace(0.2)
    assert int(margins.step) == 0
    assert ElasticArcFace(0.5, 0.0)(X, Y) == ArcFace(torch.full((12,), 0.5).double())


@BOTH
def test_the_loss_takes_them(make):
    loss, margins = PartialMarginSoftmax(6, 9, scale=8.0), make()
    given = margins(X, Y)
    value = loss(X, Y, margin=given)
    unit = torch.nn.functional.normalize
    cosine = (unit(X) @ unit(loss.weight.detach()).T).double()
    own = torch.nn.functional.one_hot(Y, 9).bool()
    target = (cosine[own].arccos() + given.m2).cos() - given.m3
    right = torch.nn.functional.cross_entropy(8 * cosine.masked_scatter(own, target), Y)
    torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=0)


@BOTH
def test_each_of_several_positives_draws_its_own(make):
    positives = torch.stack([Y, (Y + 4) % 9], dim=1)
    given = make()(X, positives)
    m = given.m2 if make is ElasticArcFace else given.m3
    assert m.shape == (12, 2)
    assert len(m.unique()) == 24
    loss = PartialMarginSoftmax(6, 9, scale=8.0, reduction="none")
    unit = torch.nn.functional.normalize
    cosine = (unit(X) @ unit(loss.weight.detach()).T).double()
    right = torch.zeros(12, dtype=torch.float64)
    for p in range(2):
        own, other = positives[:, [p]], positives[:, [1 - p]]
        m2, m3 = (m[:, [p]], 0.0) if make is ElasticArcFace else (0.0, m[:, [p]])
        target = (cosine.gather(1, own).arccos() + m2).cos() - m3
        logits = 8 * cosine.scatter(1, own, target).scatter(1, other, -math.inf)
        right += torch.nn.functional.cross_entropy(logits, own[:, 0], reduction="none") / 2
    value = loss(X, positives, margin=given)
    torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=1e-7)


@BOTH
def test_gradcheck_through_the_loss(make):
    x, margins = X.double().requires_grad_(), make()
    loss = PartialMarginSoftmax(6, 9, scale=8.0, margin_grad="exact", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, Y, margin=margins(x, Y, step=3)), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repetition_in_backward_needs_the_step(reentrant):
    margins, loss, x = ElasticArcFace(), PartialMarginSoftmax(6, 9), X.clone().requires_grad_()

    def call(x, step):
        return loss(x, Y, step=0, margin=margins(x, Y, step=step))

    with pytest.raises(RuntimeError, match="ElasticArcFace is called in backward, as activation"):
        checkpoint(call, x, None, use_reentrant=reentrant).backward()
    assert int(margins.step) == 1
    checkpoint(call, x, 7, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, torch.autograd.grad(call(x, 7), x)[0])


@pytest.mark.slow
def test_one_graph_with_the_loss():
    loss, margins, x = (
        PartialMarginSoftmax(6, 9),
        ElasticArcFace(seed=5),
        X.clone().requires_grad_(),
    )
    other = copy.deepcopy(margins)

    def call(x, margins):
        return loss(x, Y, step=0, margin=margins(x, Y))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x, other), call(x, margins))
    assert other.state_dict() == margins.state_dict()


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": -1}, ValueError, "mean must be a finite number >= 0, got -1"),
        ({"std": math.nan}, ValueError, "std must be a finite number >= 0, got nan"),
        ({"std": None}, TypeError, "std must be a finite number >= 0, got NoneType: None"),
        ({"seed": 2**63}, ValueError, "seed must be an integer that fits in int64"),
    ],
)
def test_a_bad_option_is_named(make, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make(**options)


def test_a_bad_batch_is_named():
    margins = ElasticArcFace()
    with pytest.raises(TypeError, match=r"^labels must be an int32 or int64 tensor, got list"):
        margins(X, [1, 2])
    with pytest.raises(ValueError, match=r"^labels must be on cpu like the margins, got meta"):
        margins(X, Y.to("meta"))
    with pytest.raises(TypeError, match=r"^step must be an integer that fits in int64, got 1.5"):
        margins(X, Y, step=1.5)
    assert int(margins.step) == 0
