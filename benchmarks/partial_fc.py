"""PartialFC v2 with UNICOM's feature selection in eager PyTorch, on one process: the peer to beat.

Written for this benchmark after the published descriptions (PartialFC, arXiv:2203.15565; UNICOM,
arXiv:2304.05884) and after what the released programs do at each step. Nothing is copied from them.

The same work as the released programs, tensor for tensor:

- classes: unique positives, one random number per class, positives set to 2, topk, sort, and
  searchsorted for the labels; only the positives where they exceed the quota;
- ``weight[class_index]``, then ``index_select`` of the columns of both matrices;
- normalise both, one linear layer, clamp to [-1, 1];
- margin by arccos and cos in place without autograd (straight-through), times the scale;
- softmax cross entropy as a custom autograd function that overwrites the logits by probabilities
  (max, subtract, exp, sum, divide, gather the target, at least 1e-30, log) and keeps them; its
  backward makes a dense one-hot matrix, subtracts it through an index of the rows with a label,
  divides by B and multiplies by the upstream gradient;
- autograd turns the rest into a dense C x d gradient.

What differs, all of it in the peer's favour or without effect on its time:

- one process: no process group, no gathering of embeddings and labels (the released programs copy
  the embeddings two more times here), no collectives in the cross entropy;
- round(rate * C) classes instead of int(rate * C), so that both sides of the comparison do the
  same work; the selected dimensions are sorted;
- arccos and cos are taken of the target column alone. The released programs take them of the whole
  B x |S| matrix: ``whole_matrix=True`` does so too;
- the caller's labels are not overwritten, and any batch size goes;
- both selections can be given, for tests.

`CompiledPartialFC` is the same loss in the form that suits `torch.compile` best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartialFC(nn.Module):
    """Mean softmax cross entropy with an additive angular margin on sampled classes.

    Args:
        embedding_size: d.
        num_classes: C.
        margin: added to the target's angle, in radians.
        scale: s, the inverse temperature.
        sample_rate: share of the classes, in (0, 1].
        feature_rate: share of the dimensions, in (0, 1].
        whole_matrix: take arccos and cos of all logits, as the released programs do.
        linear_dtype: normalise and multiply under autocast to this, and go on in float32, as the
            released programs do with `fp16`.

    Attributes:
        weight: Parameter [C, d], the prototypes.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: float = 0.3,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        feature_rate: float = 1.0,
        whole_matrix: bool = False,
        linear_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.scale = scale
        self.num_sampled = max(1, int(sample_rate * num_classes + 0.5))
        self.num_features = int(feature_rate * embedding_size + 0.5)
        self.whole_matrix = whole_matrix
        self.linear_dtype = linear_dtype
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes, embedding_size)))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        class_index: Tensor | None = None,
        feature_index: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, d] with labels [B] int64 in [0, C).

        class_index, feature_index: sorted unique int64, instead of random ones; class_index must
            hold every label.
        """
        labels = labels.view(-1, 1)
        if class_index is None and self.num_sampled < len(self.weight):
            class_index = self.sample_classes(labels)
        if class_index is not None:
            labels = torch.searchsorted(class_index, labels)
        if feature_index is None and self.num_features < self.weight.shape[1]:
            feature_index = self.sample_features()
        return self._loss(embeddings, labels, class_index, feature_index)

    @torch.no_grad()
    def sample_classes(self, labels: Tensor) -> Tensor:
        """Sorted ids of the classes of one step, [|S|] int64."""
        positives = torch.unique(labels, sorted=True)
        if len(positives) > self.num_sampled:
            return positives
        priority = torch.rand(len(self.weight), device=self.weight.device)
        priority[positives] = 2.0
        return priority.topk(self.num_sampled).indices.sort().values

    @torch.no_grad()
    def sample_features(self) -> Tensor:
        """Sorted dimensions of one step, [d'] int64."""
        order = torch.rand(self.weight.shape[1], device=self.weight.device).argsort()
        return order[: self.num_features].sort().values

    def _loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        class_index: Tensor | None,
        feature_index: Tensor | None,
    ) -> Tensor:
        cosines = self._cosines(embeddings, self.weight, class_index, feature_index)
        return _CrossEntropy.apply(self._add_margin(cosines, labels), labels)

    def _cosines(
        self,
        embeddings: Tensor,
        weight: Tensor,
        class_index: Tensor | None,
        feature_index: Tensor | None,
    ) -> Tensor:
        """Cosines [B, |S|] of embeddings [B, d] and the sampled rows, on the sampled columns."""
        if class_index is not None:
            weight = weight[class_index]
        if feature_index is not None:
            weight = weight.index_select(1, feature_index)
            embeddings = embeddings.index_select(1, feature_index)
        if self.linear_dtype is None:
            return F.linear(F.normalize(embeddings), F.normalize(weight)).clamp(-1, 1)
        with torch.autocast(embeddings.device.type, self.linear_dtype):
            cosines = F.linear(F.normalize(embeddings), F.normalize(weight))
        return cosines.float().clamp(-1, 1)

    def _add_margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, |S|] from cosines, which are overwritten; labels [B, 1] of columns."""
        with torch.no_grad():
            rows = torch.where(labels >= 0)[0]
            columns = labels[rows].view(-1)
            target = logits[rows, columns].arccos_().add_(self.margin)
            if self.whole_matrix:
                logits.arccos_()
                logits[rows, columns] = target
                logits.cos_()
            else:
                logits[rows, columns] = target.cos_()
        return logits * self.scale


class CompiledPartialFC(PartialFC):
    """`PartialFC` with everything after the selections compiled as one graph.

    `torch.compile` of `PartialFC` itself breaks the graph seven times (sizes that depend on data)
    and then fails inside the compiler of torch 2.13. So the selections stay eager, and what could
    not be compiled is written differently: no index of the rows with a label (on one process all
    have one), nothing in place.
    """

    def __init__(self, *args, mode: str | None = None, **options) -> None:
        super().__init__(*args, **options)
        self._loss_of_rows = torch.compile(self._loss_of_rows, fullgraph=True, mode=mode)

    def _loss(self, embeddings, labels, class_index, feature_index):
        return self._loss_of_rows(embeddings, self.weight, labels, class_index, feature_index)

    def _loss_of_rows(self, embeddings, weight, labels, class_index, feature_index):
        cosines = self._cosines(embeddings, weight, class_index, feature_index)
        target = cosines.detach().gather(1, labels)
        change = torch.cos(torch.arccos(target) + self.margin) - target
        return _PureCrossEntropy.apply(self.scale * cosines.scatter_add(1, labels, change), labels)


class _CrossEntropy(torch.autograd.Function):
    """Mean softmax cross entropy that keeps probabilities in the place of its logits [B, |S|]."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.max(dim=1, keepdim=True).values)
        logits.exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        rows = torch.where(labels >= 0)[0]
        likelihood = logits.new_zeros(len(logits), 1)
        likelihood[rows] = logits[rows].gather(1, labels[rows])
        ctx.save_for_backward(logits, labels, rows)
        return -likelihood.clamp_min_(1e-30).log_().mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        probabilities, labels, rows = ctx.saved_tensors
        one_hot = probabilities.new_zeros(len(rows), probabilities.shape[1])
        one_hot.scatter_(1, labels[rows], 1)
        # In place, as published: a second backward through the same graph would be wrong.
        probabilities[rows] -= one_hot
        probabilities.div_(len(probabilities))
        return probabilities * grad_loss, None


class _PureCrossEntropy(torch.autograd.Function):
    """`_CrossEntropy` without writing in place, every row having a label."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        unnormalised = (logits - logits.amax(dim=1, keepdim=True)).exp()
        probabilities = unnormalised / unnormalised.sum(dim=1, keepdim=True)
        ctx.save_for_backward(probabilities, labels)
        return -probabilities.gather(1, labels).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities).scatter(1, labels, 1.0)
        return (probabilities - one_hot) / len(probabilities) * grad_loss, None
