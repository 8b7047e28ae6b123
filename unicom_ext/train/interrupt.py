"""A run that is asked to stop ends after its step, saved."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself after `step` of `steps` steps."""

    def __init__(self, step: int, steps: int, path: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}; saved in {path}")
        self.step, self.steps, self.path = step, steps, path


class StopRequest:
    """Within the block the first SIGINT or SIGTERM sets `requested`; a second one does as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
