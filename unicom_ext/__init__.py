"""Partial margin softmax for PyTorch: train embeddings on very many classes.

`PartialMarginSoftmax` draws a part of the classes and of the feature dimensions at each step, and
computes margin softmax cross entropy on them in one operator that never stores the logits. See
UNICOM (arXiv:2304.05884) and PartialFC (arXiv:2203.15565).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from unicom_ext.utils.versions import VERSION

if TYPE_CHECKING:
    # isort: off
    from unicom_ext import (
        checkpoint as checkpoint,
        cluster as cluster,
        compat as compat,
        data as data,
        functional as functional,
        gradients as gradients,
        interchange as interchange,
        loss as loss,
        margins as margins,
        optim as optim,
        reference as reference,
        retrieval as retrieval,
        sampling as sampling,
        sharding as sharding,
        subcenters as subcenters,
    )

    # isort: on
    from unicom_ext.loss.functional import partial_margin_softmax
    from unicom_ext.loss.margins import ArcFace, CombinedMargin, CosFace, SphereFace
    from unicom_ext.loss.module import PartialMarginSoftmax
    from unicom_ext.loss.results import Metrics, NearestClasses, Selection
    from unicom_ext.ops.cpu import cpu_capability, set_cpu_capability

__version__ = VERSION

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "Metrics",
    "NearestClasses",
    "PartialMarginSoftmax",
    "Selection",
    "SphereFace",
    "cpu_capability",
    "partial_margin_softmax",
    "set_cpu_capability",
]

# Loaded at first use: the command line then starts without torch, and `unicom-ext doctor` can say
# what is wrong with compiled modules that do not load.
_HOME = {
    "ArcFace": "loss.margins",
    "CombinedMargin": "loss.margins",
    "CosFace": "loss.margins",
    "Metrics": "loss.results",
    "NearestClasses": "loss.results",
    "PartialMarginSoftmax": "loss.module",
    "Selection": "loss.results",
    "SphereFace": "loss.margins",
    "cpu_capability": "ops.cpu",
    "partial_margin_softmax": "loss.functional",
    "set_cpu_capability": "ops.cpu",
}
_SUBMODULES = (
    "checkpoint",
    "cluster",
    "compat",
    "data",
    "functional",
    "gradients",
    "interchange",
    "loss",
    "margins",
    "optim",
    "reference",
    "retrieval",
    "sampling",
    "sharding",
    "subcenters",
)


def _load(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to which it would say that every name is there
    __getattr__ = _load
