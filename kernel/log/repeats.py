"""Log lines that would be the same again and again: the first is written, and then one in a while, with a count."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 60.0
MOST = 100
"""Causes that are remembered; beyond it the oldest is forgotten."""


class Repeats:
    """Decides which of repeated log lines are written.

    Args:
        every: seconds between two lines of the same cause.
    """

    def __init__(self, every: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._seen: dict[str, tuple[float, int]] = {}

    def due(self, cause: str) -> str | None:
        """Return what is to be added to the line, which is mostly nothing, or None if it is not to be written."""
        now = self._clock()
        last, left_out = self._seen.pop(cause, (-self._every, 0))
        if now - last < self._every:
            self._seen[cause] = last, left_out + 1
            return None
        if len(self._seen) >= MOST:
            del self._seen[next(iter(self._seen))]
        self._seen[cause] = now, 0
        return f" ({left_out} times more in the last {now - last:.0f} s)" if left_out else ""
