"""One rank's part of the classes: its range, and global tensors of all ranks' parts."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_ext.distributed.failures import RankFailed
from unicom_ext.distributed.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


PATIENCE = timedelta(minutes=2)  # how much later than others a rank may come to a meeting
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()  # so far


def class_range(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """First class of a rank and the one after its last: chunks of ceil(C / world_size) classes.

    These are the chunks of `torch.distributed.tensor.Shard`. The last ranks may own fewer classes
    than the others, or none.

    Args:
        num_classes: C, of all ranks.
        world_size: how many ranks there are.
        rank: in [0, world_size).

    Returns:
        start and stop, of which the rank owns the classes in [start, stop).
    """
    chunk = -(-num_classes // world_size)
    start = min(rank * chunk, num_classes)
    return start, min(start + chunk, num_classes)


def by_class(rows: Tensor, num_centers: int) -> Tensor:
    """Rows [n * K, ...] of the prototypes of n classes as [n, K, ...]; as they are if K is 1."""
    return rows if num_centers == 1 else rows.unflatten(0, (-1, num_centers))


def each_row(classes: Tensor, num_centers: int) -> Tensor:
    """The inverse of `by_class`."""
    return classes if num_centers == 1 else classes.flatten(0, 1)


class ClassShard(Ranks):
    """One rank's part of the classes, and the group it shares them with.

    Args:
        group: the process group.
        num_classes: C, of all ranks.
        num_centers: rows that a class has in the tensors of its prototypes.

    Attributes:
        group: the process group.
        group_name: by which operators find it.
        rank: of this process in the group.
        world_size: how many ranks there are.
        num_classes: as given.
        num_centers: as given.
        start: the first class of this rank.
        stop: the class after its last.

    Raises:
        ValueError: the group is none that this rank is in.
    """

    def __init__(self, group: dist.ProcessGroup, num_classes: int, num_centers: int = 1) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, "
                f"got {group!r}"
            )
        super().__init__(group)
        self.group_name: str = group.group_name
        self.num_classes, self.num_centers = num_classes, num_centers
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

    @property
    def group(self) -> dist.ProcessGroup:
        group = super().group
        assert group is not None
        return group

    # ---- global tensors ----

    def mesh(self, device_type: str) -> DeviceMesh:
        """The group as the one-dimensional mesh that global tensors lie on."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        return self._meshes[device_type]

    def as_global(self, rows: Tensor) -> DTensor:
        """This rank's rows as a part of the tensor of all classes.

        rows: [(stop - start) * K, ...], of a tensor [C, ...], or with K > 1 centres [C, K, ...]:
        classes, not rows, are what ranks share.

        They share memory.
        """
        from torch.distributed.tensor import DTensor, Shard

        rows = by_class(rows.detach(), self.num_centers)
        shape = torch.Size([self.num_classes, *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows,
            self.mesh(rows.device.type),
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=stride,
        )

    def own_rows(self, name: str, value: Tensor) -> Tensor:
        """This rank's rows of a tensor of all classes: what `as_global` makes, or a plain tensor.

        Raises ValueError where a `DTensor` holds other classes: one that another rank has pickled
        looks like this rank's own, but its mesh remembers where it was.
        """
        from torch.distributed.tensor import DTensor, Shard

        if isinstance(value, DTensor):
            if value.placements == (Shard(0),):
                return each_row(self._checked_rows(name, value), self.num_centers)
            value = each_row(value.full_tensor(), self.num_centers)
        return value[self.start * self.num_centers : self.stop * self.num_centers]

    def _checked_rows(self, name: str, value: DTensor) -> Tensor:
        mesh, rows = value.device_mesh, value.to_local()
        place = mesh.get_coordinate()
        start, stop = (0, 0) if place is None else class_range(len(value), mesh.size(), place[0])
        if place is None or (start, stop) != (self.start, self.stop) or len(rows) != len(self):
            raise ValueError(
                f"{name} holds the classes [{start}, {stop}) of another rank, but this rank owns "
                f"[{self.start}, {self.stop}): each rank must load what it has saved itself. Save "
                "with unicom_ext.checkpoint or torch.distributed.checkpoint, or let the loss have "
                "full_state_dict=True"
            )
        return rows

    def all_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks [C * K, ...] from this rank's; every rank calls this at once."""
        return each_row(self.as_global(rows).full_tensor(), self.num_centers)

    def meet(self, what: str) -> None:
        """Wait until every rank is here, before a message that a rank might be left alone with.

        Ranks find each other in the group's store, so that those that do not come are told apart
        from those that are late, and no other message is taken for this one.

        Raises RankFailed where some do not come within `PATIENCE`.
        """
        store, number = self.group.get_group_store(), _meetings.get(self.group, 0)
        keys = [f"unicom_ext meeting {number} {rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], "here")
        try:
            store.wait(keys, PATIENCE)
        except RuntimeError:  # stores differ in the kind
            missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            store.delete_key(keys[self.rank])
            if not missing:
                raise
            raise RankFailed(
                f"{what} sends between ranks, so every rank must call it at the same time: rank "
                f"{', '.join(missing)} did not within {PATIENCE.total_seconds():g} s"
            ) from None
        _meetings[self.group] = number + 1
