"""What finds the nearest centroid: ours, or faiss. Both take centroids [k, d] on the CPU and answer

nearest(rows fp32 [n, d], guess int64 [n] or None)
    -> (index int64 [n], -1 for rows without direction; cosine fp32 [n])

where a guess of the index may save time and changes nothing else. Rows, guess and answer are on
`device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.cluster.nearest import Centroids
from unicom_ext.ops import library
from unicom_ext.utils import devices


class Nearest(Protocol):
    @property
    def device(self) -> torch.device: ...

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


Engine = Callable[[Tensor], Nearest]


class FaissCentroids:
    """faiss' exact inner product search, on its GPUs where it has any."""

    device = devices.CPU

    def __init__(self, centroids: Tensor) -> None:
        import faiss

        self._index: Any = faiss.IndexFlatIP(centroids.shape[1])
        if faiss.get_num_gpus() > 0:
            self._index = faiss.index_cpu_to_all_gpus(self._index)
        self._index.add(F.normalize(centroids).numpy())

    def nearest(self, rows: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        bad = ~((norm > 0) & norm.isfinite())[:, 0]
        units = torch.where(bad[:, None], 0.0, rows / norm)
        score, index = (torch.from_numpy(x[:, 0]) for x in self._index.search(units.numpy(), 1))
        index[bad] = -1
        score[bad] = torch.where(norm[bad, 0] == 0, 0.0, torch.nan)
        return index, score


def device_of(config: ClusterConfig) -> torch.device:
    """Where this process searches and sums; raises what `utils.devices.device_of` raises."""
    return devices.device_of(config.device, _problem_with_cuda(config))


def usable_device(config: ClusterConfig) -> torch.device:
    """`device_of`, and the CPU where that raises: for ranks that must meet to say what is wrong."""
    return devices.usable_device(config.device, _problem_with_cuda(config))


def _problem_with_cuda(config: ClusterConfig) -> str | None:
    """What no other command has."""
    if config.engine == "faiss":
        return "engine faiss chooses its GPUs itself"
    if not library.HAS_CUDA:
        return "this unicom_ext is built without CUDA"
    rank = devices.local_rank()
    if not torch.cuda.is_available() or rank >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(rank)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, needed is 8.0 or newer"
    return None


def engine_of(config: ClusterConfig, device: torch.device) -> Engine:
    """Raises ModuleNotFoundError where faiss is wanted and not there."""
    if config.engine == "faiss":
        try:
            import faiss  # noqa: F401
        except ModuleNotFoundError as error:
            message = "engine faiss needs faiss: pip install 'unicom_ext[cluster]'"
            raise ModuleNotFoundError(message, name=error.name) from None
        return FaissCentroids
    return lambda centroids: Centroids(centroids.to(device))
