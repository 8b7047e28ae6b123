"""One rank's part of the classes: its range, the collectives of its group, and global tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# torch 2.13 renamed them.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def class_range(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """First class of a rank and the one after its last: chunks of ceil(C / world_size) classes.

    These are the chunks of `torch.distributed.tensor.Shard`. The last ranks may own fewer classes
    than the others, or none.
    """
    chunk = -(-num_classes // world_size)
    start = min(rank * chunk, num_classes)
    return start, min(start + chunk, num_classes)


class ClassShard:
    """One rank's part of the classes, and the group it shares them with.

    group: the process group, group_name: by which operators find it.
    rank, world_size: this process in it and its size.
    num_classes: C, of all ranks.  start, stop: this rank owns the classes in [start, stop).
    """

    def __init__(self, group: dist.ProcessGroup, num_classes: int) -> None:
        self.group = group
        self.check_alive()
        self.group_name: str = group.group_name
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.num_classes = num_classes
        self.start, self.stop = class_range(num_classes, self.world_size, self.rank)
        self._meshes: dict[str, DeviceMesh] = {}

    @classmethod
    def named(cls, group_name: str, num_classes: int) -> ClassShard:
        return cls(torch._C._distributed_c10d._resolve_process_group(group_name), num_classes)

    def __len__(self) -> int:
        return self.stop - self.start

    def __deepcopy__(self, memo: dict) -> ClassShard:
        return self  # the copy is on the same rank of the same group

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loss with a process_group cannot be pickled: save its state_dict instead, with "
            "unicom_ext.checkpoint or torch.distributed.checkpoint"
        )

    def check_alive(self) -> None:
        """ValueError unless the group is one of this process and was not destroyed."""
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, "
                f"got {self.group!r}"
            )
        try:
            dist.get_process_group_ranks(self.group)
        except (KeyError, ValueError):
            raise ValueError("process_group was destroyed") from None

    # ---- collectives ----

    def gather(self, rows: Tensor, *, wait: bool = True) -> Tensor | tuple[Tensor, dist.Work]:
        """[n, ...] of each rank -> [world_size * n, ...], in rank order; n is the same everywhere.

        With ``wait=False`` also what must be waited for before the result is read.
        """
        result = rows.new_empty((self.world_size * len(rows), *rows.shape[1:]))
        work = all_gather(result, rows.contiguous(), group=self.group, async_op=not wait)
        return result if wait else (result, work)

    def sum_scatter(self, rows: Tensor) -> Tensor:
        """[world_size * n, ...] on each rank, summed over ranks -> this rank's [n, ...]."""
        shape = (self.world_size, len(rows) // self.world_size, *rows.shape[1:])
        if dist.get_backend(self.group) == "gloo":
            # Its reduce-scatter is an all-reduce of everything: twice the bytes of this.
            parts = torch.empty_like(rows, memory_format=torch.contiguous_format)
            dist.all_to_all_single(parts, rows.contiguous(), group=self.group)
            return parts.view(shape).sum(dim=0)
        result = rows.new_empty(shape[1:])
        reduce_scatter(result, rows.contiguous(), group=self.group)
        return result

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    # ---- global tensors ----

    def mesh(self, device_type: str) -> DeviceMesh:
        """The group as the one-dimensional mesh that global tensors lie on."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        return self._meshes[device_type]

    def as_global(self, rows: Tensor) -> DTensor:
        """This rank's rows [stop - start, ...] as a part of the tensor of all classes [C, ...].

        They share memory.
        """
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size([self.num_classes, *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows.detach(),
            self.mesh(rows.device.type),
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=stride,
        )

    def own_rows(self, value: Tensor) -> Tensor:
        """This rank's rows of a tensor of all classes: a `DTensor`, or a plain tensor."""
        from torch.distributed.tensor import DTensor, Shard

        if isinstance(value, DTensor):
            mesh = self.mesh(value.device_mesh.device_type)
            if value.device_mesh == mesh and value.placements == (Shard(0),):
                return value.to_local()
            value = value.full_tensor()
        return value[self.start : self.stop]
