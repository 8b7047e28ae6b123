"""How a run says that it was stopped, and not broken."""

from __future__ import annotations

from pathlib import Path


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself after `step` of `steps` steps."""

    def __init__(self, step: int, steps: int, path: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}; saved in {path}")
        self.step, self.steps, self.path = step, steps, path
