"""How much may be asked of a server at once: less while its answers are slow."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LEAST, MOST = 64, 4_096
"""Bounds of the window."""
SLOW_S = 0.1
"""An answer that takes longer makes the window smaller."""
SHRINK = 0.7


class Window:
    """Lets so much of work pass at once, in order of arrival, and adapts to the time that it takes.

    A unit is about the cost of one message. A server that is slow is asked less at once, so that what it does for
    others, and other requests on the same connection, do not wait behind a heap of questions.

    Attributes:
        size: units that may be under way at present.
    """

    def __init__(self) -> None:
        self.size = float(MOST // 4)
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._shrunk = -math.inf

    @asynccontextmanager
    async def room(self, cost: int) -> AsyncIterator[None]:
        """Wait until there is room for work of this cost, and give it back afterwards."""
        if self._waiting or not self._fits(cost):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((cost, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(cost)
                else:
                    self._waiting.remove((cost, turn))
                raise
        else:
            self._used += cost
        begun = time.monotonic()
        try:
            yield
        finally:
            self._adapt(cost, begun, time.monotonic())
            self._give_back(cost)

    def _fits(self, cost: int) -> bool:
        return not self._used or self._used + cost <= self.size

    def _give_back(self, cost: int) -> None:
        self._used -= cost
        while self._waiting and self._fits(self._waiting[0][0]):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._used += wanted
                turn.set_result(None)

    def _adapt(self, cost: int, begun: float, now: float) -> None:
        if now - begun <= SLOW_S:
            self.size = min(MOST, self.size + cost / 16)
        elif begun > self._shrunk:  # what was asked before the last step tells nothing new
            self.size = max(LEAST, self.size * SHRINK)
            self._shrunk = now
