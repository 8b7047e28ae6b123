"""SIGINT and SIGTERM end a run after its step, saved."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopRequest:
    """Within the block the first SIGINT or SIGTERM sets `requested`; a second one does as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
