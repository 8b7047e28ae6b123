"""What plans for reading parts of saved tensors have in common."""

from __future__ import annotations

from typing import IO, Any

from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import ReadItem


class TensorPlanner(LoadPlanner):
    """Each rank reads what it has planned itself. A subclass says which parts of which tensors, and
    where they go."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        raise AssertionError("only tensors are asked for")
