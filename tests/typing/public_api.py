"""What users write, as a strict type checker sees it. Never run: `make lint` checks it.

A comment that silences an error stands where there has to be one: the checker complains of those
that silence nothing.
"""

from __future__ import annotations

from typing import Any, assert_type

import torch
import torch.distributed as dist
from torch import Tensor, nn

import unicom_ext
from unicom_ext import (
    ArcFace,
    CombinedMargin,
    CosFace,
    Metrics,
    NearestClasses,
    PartialMarginSoftmax,
    Selection,
    SphereFace,
    checkpoint,
    gradients,
    optim,
    partial_margin_softmax,
    reference,
    retrieval,
    sampling,
    sharding,
)
from unicom_ext.cluster import ClusterConfig, cluster
from unicom_ext.compat import PartialFC_V2
from unicom_ext.encoders import text
from unicom_ext.encoders.registry import ImageEncoder, create
from unicom_ext.encoders.settings import EncoderSettings
from unicom_ext.margins import AdaFace, ClassSizeMargin, ElasticArcFace, ElasticCosFace, MagFace
from unicom_ext.optim import RowAdamW, RowSGD
from unicom_ext.subcenters import SubCenters


def margins() -> list[CombinedMargin]:
    ArcFace("0.3")  # type: ignore[arg-type]
    return [
        ArcFace(0.3),
        CosFace(m3=torch.ones(4)),
        SphereFace(1.35),
        CombinedMargin(1.0, m2=0.3, m3=0.1),
    ]


def adaptive_margins(x: Tensor, labels: Tensor) -> Tensor:
    margins: list[nn.Module] = [
        AdaFace(m=0.4, h=0.333, t_alpha=0.01),
        ElasticArcFace(0.5, std=0.05, seed=1),
        ElasticCosFace(),
        ClassSizeMargin(torch.ones(10, dtype=torch.int64), exponent=0.25),
        ClassSizeMargin.from_labels(labels, 10),
    ]
    margins.append(MagFace(u_m="0.8"))  # type: ignore[arg-type]
    loss_fn = PartialMarginSoftmax(512, 10)
    loss: Tensor = loss_fn(x, labels, margin=margins[0](x, labels))
    return loss + MagFace().regularizer(x, labels)


def the_module(encoder: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    loss_fn = PartialMarginSoftmax(
        512,
        10_000,
        margin=ArcFace(0.3),
        scale=64.0,
        sample_rate=0.1,
        feature_rate=0.5,
        interclass_filter=0.8,
        label_smoothing=0.0,
        num_centers=3,
        margin_grad="exact",
        precision="bf16",
        sparse_grad=True,
        seed=1,
        dtype=torch.float32,
        device="cpu",
    )
    assert_type(loss_fn.num_sampled, int)
    assert_type(loss_fn.scale, float)
    assert_type(loss_fn.weight, nn.Parameter)
    assert_type(loss_fn.topk(images, 5), NearestClasses)
    assert_type(loss_fn.logits(images, class_index=labels), Tensor)
    assert_type(loss_fn.last_metrics, Metrics | None)
    assert_type(loss_fn.last_selection, Selection | None)
    assert_type(loss_fn.forward(images, labels, step=3, margin=ArcFace(0.2)), Tensor)
    assert_type(loss_fn.forward(images, labels, scale=torch.tensor(30.0)), Tensor)
    if (metrics := loss_fn.last_metrics) is not None:
        assert_type(metrics.top1, Tensor)
    if loss_fn.shard is not None:
        assert_type(loss_fn.shard.start, int)
    PartialMarginSoftmax(512, 10_000, sampel_rate=0.1)  # type: ignore[call-arg]
    PartialMarginSoftmax(512, 10_000, margin=0.3)  # type: ignore[arg-type]
    PartialMarginSoftmax(512, 10_000, precision="fp8")  # type: ignore[arg-type]
    assert_type(
        PartialMarginSoftmax.from_centroids("centroids.npy", scale=32.0), PartialMarginSoftmax
    )
    loss: Tensor = loss_fn(encoder(images), labels)
    return loss


def the_function(embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> Metrics:
    loss = partial_margin_softmax(embeddings, labels, prototypes, margin=CosFace(), scale=64.0)
    assert_type(loss, Tensor)
    loss, metrics = partial_margin_softmax(
        embeddings, labels, prototypes, margin=CosFace(), scale=64.0, return_metrics=True
    )
    assert_type(metrics, Metrics)
    plain, _ = reference.partial_margin_softmax(
        embeddings, labels, prototypes, margin=CosFace(), scale=64.0, return_metrics=True
    )
    assert_type(plain, Tensor)
    partial_margin_softmax(embeddings, labels, prototypes, margin=CosFace())  # type: ignore[call-overload]
    return metrics


def optimizers(encoder: nn.Module, loss_fn: PartialMarginSoftmax) -> None:
    groups: list[dict[str, Any]] = [
        {"params": encoder.parameters()},
        {"params": loss_fn.parameters(), "lr": 0.01},
    ]
    rows = RowAdamW(
        groups,
        betas=(0.9, 0.99),
        moment_dtype=torch.bfloat16,
    )
    rows.update_in_backward(loss_fn)
    rows.step()
    rows.catch_up()
    RowSGD(loss_fn.parameters(), lr=0.1, momentum=0.9, exact=True).zero_grad()
    assert_type(optim.clip_grad_norm_(encoder.parameters(), 5.0), Tensor)
    torch.optim.lr_scheduler.StepLR(rows, 10)


def cleaning(loss_fn: PartialMarginSoftmax, x: Tensor, labels: Tensor) -> PartialMarginSoftmax:
    centers = SubCenters(loss_fn)
    assert_type(centers.add(x, labels), Tensor)
    assert_type(centers.is_clean(x, labels, max_angle=1.2), Tensor)
    assert_type(centers.counts, Tensor)
    SubCenters(nn.Linear(2, 2))  # type: ignore[arg-type]
    return centers.to_single_center()


def several_ranks(encoder: nn.Module, group: dist.ProcessGroup) -> dict[str, Any]:
    loss_fn = PartialMarginSoftmax(512, 10_000, process_group=group, uneven_batches=False)
    assert_type(gradients.clip_grad_norm_(encoder.parameters(), loss_fn, max_norm=5.0), Tensor)
    checkpoint.save("a", modules={"encoder": encoder, "loss": loss_fn}, extra={"epoch": 3})
    assert_type(sharding.communication_volume(256, 512, 8).total, int)
    assert_type(sharding.class_range(10_000, 8, 1), tuple[int, int])
    return checkpoint.load("a", modules={"loss": loss_fn}, class_map=torch.arange(10_000))


def the_rest(embeddings: Tensor, labels: Tensor) -> None:
    assert_type(sampling.select_classes(100, 0.1, labels, seed=0, step=0), Tensor)
    assert_type(sampling.select_features(512, 0.5, seed=0, step=0), Tensor)
    sampling.select_features(512, 0.5, seed=0, step=0, feature_selection="nested")
    sampling.select_features(512, 0.5, seed=0, step=0, feature_selection="first")  # type: ignore[arg-type]
    for result in retrieval.evaluate(embeddings, labels, dims=[64, 512], ks=[1, 5]):
        assert_type(result.recall, dict[int, float])
        assert_type(result.intervals, dict[str, tuple[float, float]] | None)
    retrieval.evaluate(embeddings, labels, bootstrap=1000, codes="int8", index="exact")
    assert_type(retrieval.encode(embeddings, "binary"), Tensor)
    parts = embeddings, labels, embeddings, labels
    assert_type(retrieval.knn_accuracy(*parts, k=(1, 20)), dict[int, float])
    assert_type(retrieval.linear_probe(*parts, l2=1e-4).accuracy, float)
    cosine, index = retrieval.topk(embeddings, k=5)
    assert_type((cosine, index), tuple[Tensor, Tensor])
    assert_type(cluster(ClusterConfig(clusters=10), "features", "clusters"), dict[str, Any])
    assert_type(PartialFC_V2(ArcFace(0.5), 512, 100, fp16=False)(embeddings, labels), Any)
    with unicom_ext.cpu_capability("avx2"):
        unicom_ext.set_cpu_capability("portable")
    assert_type(unicom_ext.__version__, str)
    unicom_ext.PartialMarginSoftMax  # type: ignore[attr-defined]  # noqa: B018


def encoders() -> None:
    made = create(EncoderSettings(encoder="small", image_size=64), embedding_size=16)
    assert_type(made, ImageEncoder)
    assert_type(made.module, nn.Module)
    assert_type(text.create("ngrams").encode(["a caption"]), Tensor)
