"""How long the server takes for one commit, measured on the appends themselves."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

LEAST = 16
"""Commits of the smallest burst that is measured."""
BURSTS = 8
"""Bursts that decide."""
SLOW_COMMIT_S = 100e-6
"""A server that takes longer for each commit of a burst waits for the disk at each."""


class BurstMeter:
    """Times the acknowledgements of commits that were sent at once, while nothing else was in flight.

    Attributes:
        left: acknowledgements that the present burst waits for; 0 while nothing is measured.
        slow: whether the median of the last eight bursts says that the server waits for the disk at each commit.
    """

    def __init__(self) -> None:
        self.left = 0
        self.slow = False
        self._size = 0
        self._first = 0.0
        self._costs: deque[float] = deque(maxlen=BURSTS)

    def begin(self, commits: int) -> None:
        """Measure a burst of so many commits, if there are enough of them."""
        if commits >= LEAST:
            self.left = self._size = commits
            self._first = 0.0

    def acknowledge(self) -> None:
        """Note the acknowledgement of one commit of the burst."""
        if not self._first:
            self._first = time.perf_counter()
        self.left -= 1
        if not self.left:
            self._costs.append((time.perf_counter() - self._first) / (self._size - 1))
            self.slow = len(self._costs) == BURSTS and median(self._costs) > SLOW_COMMIT_S

    def abort(self) -> None:
        """Give up the present burst: its acknowledgements will not come."""
        self.left = 0
