"""AdaFace and MagFace against the formulas of their papers, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from unicom_ext import PartialMarginSoftmax
from unicom_ext.margins import AdaFace, MagFace

SCALE = 16.0


def problem(batch=12, dim=6, classes=9, norm=30.0):
    """Embeddings of norms about `norm`, near their prototypes, some very near."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    y = torch.randint(classes, (batch,), generator=generator)
    away = torch.linspace(0.01, 1.5, batch, dtype=torch.float64)[:, None]
    noise = torch.randn(batch, dim, dtype=torch.float64, generator=generator)
    x = F.normalize(F.normalize(w[y]) + away * F.normalize(noise))
    x = x * norm * (0.3 + 1.5 * torch.rand(batch, 1, dtype=torch.float64, generator=generator))
    y[4] = -100
    return x, y, w


def head(w, **options):
    loss = PartialMarginSoftmax(
        w.shape[1], len(w), scale=SCALE, margin_grad="exact", beyond_pi="linear",
        dtype=torch.float64, **options,
    )  # fmt: skip
    with torch.no_grad():
        loss.weight.copy_(w)
    return loss


def paper_loss(x, y, w, m2, m3):
    """Cross entropy over s * (cos(clip(theta + m2, 0, pi)) - m3), with autograd's gradient."""
    kept = y != -100
    cosine = F.normalize(x[kept]) @ F.normalize(w).T
    own = F.one_hot(y[kept], len(w)).bool()
    theta = cosine[own].clamp(-1 + 1e-15, 1 - 1e-15).arccos()
    target = torch.cos((theta + m2[kept]).clamp(0, math.pi)) - m3[kept]
    logits = SCALE * cosine.masked_scatter(own, target)
    return F.cross_entropy(logits, y[kept])


def ada_by_hand(x, mean, std, m=0.4, h=0.333):
    q = (x.norm(dim=1).clamp(0.001, 100) - mean) / (std + 1e-3) * h
    q = q.clamp(-1, 1)
    return -m * q, m + m * q


def test_adaface_is_the_papers_over_several_batches():
    x, y, w = problem()
    margins, loss = AdaFace(t_alpha=0.2), head(w)
    mean, std = 20.0, 100.0
    for factor in (1.0, 3.0, 0.2):
        scaled = (factor * x).requires_grad_()
        norms = scaled.detach()[y != -100].norm(dim=1).clamp(0.001, 100)
        mean = 0.2 * norms.mean() + 0.8 * mean
        std = 0.2 * norms.std() + 0.8 * std
        m2, m3 = ada_by_hand(scaled.detach(), mean, std)
        given = margins(scaled, y)
        torch.testing.assert_close(margins.mean[0], mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(margins.std[0], std, rtol=1e-13, atol=0)
        torch.testing.assert_close(given.m2[y >= 0], m2[y >= 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(given.m3[y >= 0], m3[y >= 0], rtol=0, atol=1e-13)
        assert not given.requires_grad

        got = loss(scaled, y, margin=given)
        right = paper_loss(scaled, y, w, m2, m3)
        torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
        a, b = (torch.autograd.grad(value, scaled)[0] for value in (got, right))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_adaface_where_the_angle_becomes_negative():
    x, y, w = problem()
    margins, loss = AdaFace().eval(), head(w)
    margins.mean.fill_(10.0)
    margins.std.fill_(5.0)  # all are good: q is 1 for most
    theta = F.cosine_similarity(x, w[y.clamp(min=0)]).arccos()
    given = margins(x, y)
    assert ((theta + given.m2 < 0) & (y >= 0)).sum() >= 2
    x.requires_grad_()
    got, right = loss(x, y, margin=given), paper_loss(x, y, w, *ada_by_hand(x.detach(), 10.0, 5.0))
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(value, x)[0] for value in (got, right))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_adaface_defaults_and_its_scaler_at_the_clip():
    margins = AdaFace().eval()
    x = torch.zeros(4, 3)
    x[:, 0] = torch.tensor([0.0, 20.0, 100.0, 1e6])
    given = margins(x, torch.arange(4))
    q = 0.333 * (torch.tensor([0.001, 20, 100, 100]).double() - 20) / 100.001
    torch.testing.assert_close(given.m2, -0.4 * q, rtol=1e-7, atol=0)
    torch.testing.assert_close(given.m3, 0.4 + 0.4 * q, rtol=1e-7, atol=0)
    margins.std.fill_(1.0)
    assert margins(x, torch.arange(4)).m2.tolist() == [0.4, 0.0, -0.4, -0.4]


def test_adaface_in_eval_mode_and_without_samples_keeps_what_it_knows():
    x, y, _ = problem()
    margins = AdaFace()
    margins.eval()(x, y)
    margins.train()(x, torch.full_like(y, -100))
    assert margins(x[:0], y[:0]).m2.shape == (0,)
    assert (float(margins.mean), float(margins.std)) == (20.0, 100.0)
    margins(x[:1], y[:1])  # one sample has a mean, and no deviation
    right = 0.01 * float(x[0].norm()) + 0.99 * 20
    assert float(margins.mean) == pytest.approx(right, rel=1e-14)
    assert float(margins.std) == 100.0


def test_adaface_leaves_out_what_is_not_finite_and_what_is_ignored():
    x, y, _ = problem()
    right, margins = AdaFace(), AdaFace()
    right(x[[0, 1, 2]], y[[0, 1, 2]])
    x[3, 1], x[4, 0], x[5, 2] = math.nan, math.nan, math.inf  # of which 4 is ignored
    given = margins(x[:6], y[:6])
    assert torch.equal(margins.mean, right.mean)
    assert torch.equal(margins.std, right.std)
    assert given.m2.isnan().tolist() == [False, False, False, True, False, False]


def test_adaface_goes_on_from_its_state_dict():
    x, y, _ = problem()
    margins = AdaFace()
    margins(x, y)
    resumed = AdaFace()
    resumed.load_state_dict(margins.state_dict())
    assert set(margins.state_dict()) == {"mean", "std"}
    assert margins(2 * x, y) == resumed(2 * x, y)
    assert torch.equal(margins.mean, resumed.mean)


def test_adaface_keeps_float64_where_a_model_is_cast():
    x, y, _ = problem()
    margins, cast = AdaFace(), torch.nn.Sequential(AdaFace()).to(torch.bfloat16)[0]
    x = x.to(torch.bfloat16)
    assert margins(x, y) == cast(x, y)
    assert cast.mean.dtype == cast.std.dtype == torch.float64
    assert copy.deepcopy(cast).state_dict() == cast.state_dict()
    assert AdaFace().to("meta").mean.device.type == "meta"


@pytest.mark.parametrize("assign", [False, True])
def test_adaface_keeps_float64_where_less_was_saved(assign):
    x, y, _ = problem()
    saved = {"mean": torch.tensor([24.0]), "std": torch.tensor([96.0], dtype=torch.bfloat16)}
    margins, right = AdaFace(), AdaFace()
    margins.load_state_dict(saved, assign=assign)
    right.mean.fill_(24.0)
    right.std.fill_(96.0)
    assert margins(x, y) == right(x, y)
    assert margins.mean.dtype == margins.std.dtype == torch.float64
    assert torch.equal(margins.mean, right.mean)


def test_adaface_made_on_the_meta_device_starts_as_any_other():
    x, y, _ = problem()
    with torch.device("meta"):
        margins = AdaFace()
    margins.to_empty(device="cpu")
    for buffer in margins.buffers():
        buffer.fill_(math.nan)  # what may have been in the memory before
    margins.reset_parameters()
    assert margins(x, y) == AdaFace()(x, y)


def test_adaface_takes_several_labels_for_a_sample():
    x, y, _ = problem()
    several = torch.stack([torch.full_like(y, -100), y], dim=1)
    one, each = AdaFace(), AdaFace()
    norms = one._norms(x, y), each._norms(x, several)
    for a, b in zip(*norms, strict=True):
        assert torch.equal(a, b)
    assert one(x, y) == each(x, several)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adaface_refuses_to_be_repeated_in_backward(reentrant):
    x, y, w = problem()
    margins, loss = AdaFace(), head(w)
    x.requires_grad_()
    value = checkpoint(
        lambda x: loss(x, y, step=0, margin=margins(x, y)), x, use_reentrant=reentrant
    )
    state = copy.deepcopy(margins.state_dict())
    with pytest.raises(RuntimeError, match="AdaFace is called in backward, as activation"):
        value.backward()
    assert margins.state_dict() == state


# --- MagFace


def mag_by_hand(x):
    a = x.norm(dim=1).clamp(10, 110)
    return (0.8 - 0.45) / (110 - 10) * (a - 10) + 0.45, a / 110**2 + 1 / a


def test_magface_is_the_papers():
    x, y, w = problem()
    x[0] *= 0.1  # both bounds
    x[1] *= 20
    x.requires_grad_()
    margins, loss = MagFace(), head(w)
    m2, g = mag_by_hand(x)
    right = paper_loss(x, y, w, m2, torch.zeros(12)) + 35 * g[y != -100].mean()
    got = loss(x, y, margin=margins(x, y)) + margins.regularizer(x, y)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(value, x)[0] for value in (got, right))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    outside = torch.autograd.grad(margins.regularizer(x, y), x)[0]
    assert (outside[[0, 1, 4]] == 0).all()
    assert (outside[[2, 3]] != 0).any(dim=1).all()


def test_magface_and_the_loss_pass_gradcheck():
    x, y, w = problem()
    margins, loss = MagFace(), head(w)
    x[2:4] *= 2  # some inside, some outside the bounds

    def total(x):
        return loss(x, y, step=0, margin=margins(x, y)) + margins.regularizer(x, y)

    assert torch.autograd.gradcheck(total, x.requires_grad_())


def test_magface_of_ignored_and_zero_rows():
    x, y, w = problem()
    x[4], x[5] = math.nan, 0.0  # 4 is ignored
    x.requires_grad_()
    margins = MagFace()
    value = head(w)(x, y, margin=margins(x, y)) + margins.regularizer(x, y)
    value.backward()
    assert value.isfinite()
    assert (x.grad[[4, 5]] == 0).all()
    assert x.grad.isfinite().all()
    nothing = margins.regularizer(x, torch.full_like(y, -100))
    assert nothing.detach() == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("margins", [AdaFace(), MagFace()], ids=["AdaFace", "MagFace"])
def test_one_graph_with_the_loss(margins):
    x, y, w = problem()
    x.requires_grad_()
    loss, other = head(w), copy.deepcopy(margins)

    def step(x, margins):
        return loss(x, y, step=0, margin=margins(x, y))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, right = compiled(x, other), step(x, margins)
    torch.testing.assert_close(got, right, rtol=1e-13, atol=0)
    a, b = (torch.autograd.grad(value, x)[0] for value in (got, right))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert other.state_dict() == margins.state_dict()


# --- bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaFace(m=-0.1), ValueError, "m must be a finite number >= 0, got -0.1"),
        (lambda: AdaFace(m="0.4"), TypeError, "m must be a finite number >= 0, got str: '0.4'"),
        (lambda: AdaFace(h=0), ValueError, "h must be a finite number > 0, got 0"),
        (lambda: AdaFace(t_alpha=0), ValueError, r"t_alpha must be a number in \(0, 1\], got 0"),
        (lambda: AdaFace(t_alpha=2), ValueError, r"t_alpha must be a number in \(0, 1\], got 2"),
        (lambda: MagFace(l_a=0), ValueError, "l_a must be a finite number > 0, got 0"),
        (lambda: MagFace(u_a=10), ValueError, "u_a must be a finite number > 10, got 10"),
        (lambda: MagFace(l_m=-1), ValueError, r"l_m must be a number in \[0, 3.14159\], got -1"),
        (lambda: MagFace(u_m=0.4), ValueError, r"u_m must be a number in \[0.45, 3.14159\]"),
        (lambda: MagFace(lambda_g=math.inf), ValueError, "lambda_g must be a finite number >= 0"),
        (lambda: MagFace(lambda_g=math.nan), ValueError, "lambda_g must be .*, got nan"),
    ],
)
def test_a_bad_option_is_named(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


@pytest.mark.parametrize("margins", [AdaFace(), MagFace()], ids=["AdaFace", "MagFace"])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ([1.0], torch.arange(1), TypeError, "embeddings must be a floating point tensor, got list"),
        (torch.ones(3), torch.arange(3), ValueError,
         r"embeddings must be \[B, d\] with a row for each of the labels \[3\], got \[3\]"),
        (torch.ones(2, 3), torch.arange(3), ValueError,
         r"embeddings must be \[B, d\] with a row for each of the labels \[3\], got \[2, 3\]"),
        (torch.ones(2, 3), torch.ones(2), TypeError,
         "labels must be an int32 or int64 tensor, got a torch.float32 tensor"),
        (torch.ones(2, 3, device="meta"), torch.arange(2), ValueError,
         "embeddings must be on cpu like the labels, got meta"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_named(margins, x, y, error, message):
    state = copy.deepcopy(margins.state_dict())
    with pytest.raises(error, match=f"^{message}"):
        margins(x, y)
    assert margins.state_dict() == state
