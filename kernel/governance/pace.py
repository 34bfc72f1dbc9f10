"""Reading no faster than a lane's tokens come: live projection and rebuilds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kernel.governance.rates import TokenBucket
from kernel.log.base import Batch, LogReader
from kernel.settings.database import Batch as Most
from kernel.telemetry.metrics import THROTTLED

BACKLOG = 2_000
"""With more commits waiting, a batch is filled before it is folded."""
READ_TIMEOUT_S = 0.1
IDLE_S = 1.0
"""A read waits no longer than this, for commits or for tokens."""


class Pace:
    """One reader's way to the tokens of its lane.

    Attributes:
        done: commits that it has paid for, since the beginning.

    Args:
        lane: its name, for the metrics.
        worth: seconds of the rate to wait for: a read of one commit at a time would cost more than it saves.
    """

    def __init__(
        self, bucket: TokenBucket, lane: str, worth: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.bucket, self.done = bucket, 0
        self._worth, self._clock = worth, clock
        self._throttled = THROTTLED.labels(lane=lane)

    async def room(self, most: int) -> int:
        """Return how many commits may be read, at most `most`; 0 if there are no tokens within a second."""
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
        """Pay for what was read."""
        self.done += commits
        self.bucket.spend(commits)


def unpaced() -> Pace:
    """Return the pace of a reader that nobody limits."""
    return Pace(TokenBucket(), "none", 1.0)


async def read_batch(reader: LogReader, most: Most, pace: Pace) -> Batch:
    """Return what there is; of a backlog, a wide batch: a row is then written once for more events."""
    room = await pace.room(most.events)
    if not room:
        return Batch([], 0)
    batch = await reader.next(room, IDLE_S)
    size = sum(len(commit.payload) for commit in batch.commits)
    full = time.monotonic() + most.time
    while batch.pending > BACKLOG and len(batch.commits) < room and size < most.bytes:
        if time.monotonic() >= full:
            break
        more = await reader.next(room - len(batch.commits), READ_TIMEOUT_S)
        if not more.commits:
            break
        batch = Batch(batch.commits + more.commits, more.pending, batch.oldest)
        size += sum(len(commit.payload) for commit in more.commits)
    return batch
