"""One rank's part of the classes: its range, and global tensors of all ranks' parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def class_range(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """First class of a rank and the one after its last: chunks of ceil(C / world_size) classes.

    These are the chunks of `torch.distributed.tensor.Shard`. The last ranks may own fewer classes
    than the others, or none.
    """
    chunk = -(-num_classes // world_size)
    start = min(rank * chunk, num_classes)
    return start, min(start + chunk, num_classes)


class ClassShard(Ranks):
    """One rank's part of the classes, and the group it shares them with.

    group: the process group, group_name: by which operators find it.
    rank, world_size: this process in it and its size.
    num_classes: C, of all ranks.  start, stop: this rank owns the classes in [start, stop).
    """

    group: dist.ProcessGroup

    def __init__(self, group: dist.ProcessGroup, num_classes: int) -> None:
        self.group = group
        self.check_alive()
        super().__init__(group)
        self.group_name: str = group.group_name
        self.num_classes = num_classes
        self.start, self.stop = class_range(num_classes, self.world_size, self.rank)
        self._meshes: dict[str, DeviceMesh] = {}

    @classmethod
    def named(cls, group_name: str, num_classes: int) -> ClassShard:
        resolve: Any = torch._C._distributed_c10d._resolve_process_group
        return cls(resolve(group_name), num_classes)

    def __len__(self) -> int:
        return self.stop - self.start

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassShard:
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
