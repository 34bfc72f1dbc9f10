"""Measures the delay of the event loop."""

from __future__ import annotations

import asyncio
import time

TICK_S = 0.05


class LoopLag:
    """Schedules ticks, and keeps the longest delay of a tick for each reader."""

    def __init__(self) -> None:
        self._worst: dict[str, float] = {}
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start ticking on the running event loop."""
        loop = asyncio.get_running_loop()
        self._due = loop.time() + TICK_S
        self._handle = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late = asyncio.get_running_loop().time() - self._due
        for reader, worst in self._worst.items():
            if late > worst:
                self._worst[reader] = late
        self.start()

    @property
    def overdue(self) -> float:
        """Seconds for which a tick has been overdue, from any thread; 0 before the start and after the stop."""
        return max(0.0, time.monotonic() - self._due) if self._handle is not None else 0.0

    def worst(self, reader: str) -> float:
        """Return the longest delay in seconds since this reader's last call, including a tick that is overdue now."""
        worst, self._worst[reader] = max(self._worst.get(reader, 0.0), self.overdue), 0.0
        return worst

    def stop(self) -> None:
        """Stop ticking."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
