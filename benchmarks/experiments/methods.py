"""What is compared: a part of the prototypes and dimensions in each step, and the rivals of it.

Every method trains the same encoder on the same batches for as many steps with the same optimizer.
Each has three candidates, of which its results on the validation classes choose one:

    partial     margin softmax over a share r1 of the classes and r2 of the dimensions, those of
                GRID; (1, 1) is full margin softmax. Tuned: margin m2 and scale
    matryoshka  the sum of full margin softmaxes over the first 8, 16, ... dimensions, each with its
                own prototypes (Kusupati et al., NeurIPS 2022). Tuned: margin m2 and scale
    softmax     full softmax over cosines without a margin. Tuned: the scale
    filter      full margin softmax without negatives whose cosine is above a threshold. Tuned: the
                threshold, which is what it adds; the rest is what full margin softmax has chosen
    small scale partial with smaller scales: an afterthought, as softmax without a margin did best
                with its smallest scale. Of joint labels alone. Tuned: margin m2 and scale

The principal components of full margin softmax cost no training: they are evaluated with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unicom_ext.data.images.imageset import NO_CLASS
from unicom_ext.loss.module import PartialMarginSoftmax
from unicom_ext.margins import ArcFace

SIZE = 128  # of an embedding
DIMS = (8, 16, 32, 64, 128)
RATES = (1.0, 0.3, 0.1, 0.03), (1.0, 0.75, 0.5, 0.25)  # r1 and r2 of the grid


# What is tuned, as many candidates for each method: margin and scale, the scale alone, the filter.
def _margins(*pairs: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {f"m2 {m2:g}, s {scale:g}": {"m2": m2, "scale": scale} for m2, scale in pairs}


_MARGINS = _margins((0.15, 16.0), (0.3, 16.0), (0.3, 32.0))
CANDIDATES: dict[str, dict[str, dict[str, float]]] = {
    "partial": _MARGINS,
    "matryoshka": _MARGINS,
    "softmax": {f"s {scale:g}": {"m2": 0.0, "scale": scale} for scale in (8.0, 16.0, 32.0)},
    "filter": {f"above {c:g}": {"interclass_filter": c} for c in (0.3, 0.4, 0.6)},
    "small scale": _margins((0.15, 4.0), (0.15, 8.0), (0.3, 8.0)),
}


@dataclass(frozen=True)
class Method:
    """name: one of CANDIDATES."""

    name: str
    sample_rate: float = 1.0
    feature_rate: float = 1.0

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(CANDIDATES[self.name])

    @property
    def title(self) -> str:
        rates = f"r1 = {self.sample_rate:g}, r2 = {self.feature_rate:g}"
        if self.name == "partial":
            return f"full, {rates}" if self == FULL else rates
        if self.name == "small scale":
            return f"small scale, {rates}"
        return {"softmax": "softmax without margin", "filter": "interclass filter"}.get(
            self.name, self.name
        )

    def settings(self, candidate: str, of_full: str | None) -> dict[str, Any]:
        """Margin, scale and filter of the loss with this candidate. The filter is put on what full
        softmax has chosen."""
        chosen = CANDIDATES["partial"][of_full] if of_full else {}
        return {"interclass_filter": None, **chosen, **CANDIDATES[self.name][candidate]}


FULL = Method("partial")
RIVALS = [Method(name) for name in ("matryoshka", "softmax", "filter")]
SMALL_SCALE = [Method("small scale"), Method("small scale", 0.3, 0.5)]
GRID = [Method("partial", r1, r2) for r1 in RATES[0] for r2 in RATES[1]]
METHODS = [*GRID, *RIVALS, *SMALL_SCALE]
QUICK = [FULL, *(Method("partial", r1, r2) for r1, r2 in ((1, 0.5), (0.3, 1), (0.3, 0.5))), *RIVALS]


class Heads(nn.Module):
    """The loss of a method, embeddings [B, SIZE] and labels [B] -> scalar: one margin softmax, or
    for Matryoshka the sum of one for each of DIMS."""

    def __init__(
        self, method: Method, settings: dict[str, Any], num_classes: int, seed: int
    ) -> None:
        super().__init__()
        self.dims = DIMS if method.name == "matryoshka" else (SIZE,)
        self.heads = nn.ModuleList(
            PartialMarginSoftmax(
                dim,
                num_classes,
                margin=ArcFace(settings["m2"]),
                scale=settings["scale"],
                interclass_filter=settings["interclass_filter"],
                sample_rate=method.sample_rate,
                feature_rate=method.feature_rate,
                ignore_index=NO_CLASS,
                seed=seed,
            )
            for dim in self.dims
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        parts = zip(self.heads, self.dims, strict=True)
        return torch.stack([head(embeddings[:, :dim], labels) for head, dim in parts]).sum()
