"""The pace of readers: live projection and rebuilds read no faster than their lanes get tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kernel.governance.rates import TokenBucket
from kernel.telemetry.metrics import THROTTLED

IDLE_S = 1.0
"""Longest time for which a read waits for commits or for tokens."""


class Pace:
    """One reader's access to the tokens of its lane.

    Attributes:
        done: number of commits that the reader has spent tokens for.

    Args:
        lane: the lane's name, for the metrics.
        worth: a read waits for the tokens of this many seconds, because reading single commits would be expensive.
    """

    def __init__(
        self, bucket: TokenBucket, lane: str, worth: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.bucket, self.done = bucket, 0
        self._worth, self._clock = worth, clock
        self._throttled = THROTTLED.labels(lane=lane)

    async def room(self, most: int) -> int:
        """Return the number of commits that may be read now, at most `most`; 0 if no token comes within a second."""
        bucket = self.bucket
        if bucket.rate is None:
            return most
        enough = max(1.0, min(most, bucket.burst, bucket.rate * self._worth))
        if (wait := bucket.wait(enough, self._clock())) > 0:
            wait = min(wait, IDLE_S)
            self._throttled.inc(wait)
            await asyncio.sleep(wait)
        return int(min(most, bucket.available(self._clock())))

    def spend(self, commits: int) -> None:
        """Spend the tokens for the commits that were read."""
        self.done += commits
        self.bucket.spend(commits)


def unpaced() -> Pace:
    """Return the pace of a reader without a limit."""
    return Pace(TokenBucket(), "none", 1.0)
