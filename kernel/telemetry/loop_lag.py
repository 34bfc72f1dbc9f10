"""How late the event loop runs what it was told to."""

from __future__ import annotations

import asyncio

TICK_S = 0.05


class LoopLag:
    """Ticks, and remembers the most that a tick came late, for each of those who ask."""

    def __init__(self) -> None:
        self._worst: dict[str, float] = {}
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        self._due = loop.time() + TICK_S
        self._handle = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late = asyncio.get_running_loop().time() - self._due
        for who, worst in self._worst.items():
            if late > worst:
                self._worst[who] = late
        self.start()

    def worst(self, who: str) -> float:
        """Return the most seconds that a tick was late since the same asked last, one that is overdue now included."""
        overdue = max(0.0, asyncio.get_running_loop().time() - self._due) if self._handle is not None else 0.0
        worst, self._worst[who] = max(self._worst.get(who, 0.0), overdue), 0.0
        return worst

    def stop(self) -> None:
        """End."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
