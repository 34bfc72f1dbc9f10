"""How late the event loop runs what it was told to."""

from __future__ import annotations

import asyncio

TICK_S = 0.05


class LoopLag:
    """Ticks, and remembers the most that a tick came late."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        self._due = loop.time() + TICK_S
        self._handle = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self._worst = max(self._worst, asyncio.get_running_loop().time() - self._due)
        self.start()

    def worst(self) -> float:
        """Return the most seconds that a tick was late since the last call, one that is overdue now included."""
        worst, self._worst = max(self._worst, self.overdue), 0.0
        return worst

    @property
    def overdue(self) -> float:
        """Seconds that a tick is late at the moment."""
        return max(0.0, asyncio.get_running_loop().time() - self._due) if self._handle is not None else 0.0

    def stop(self) -> None:
        """End."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
