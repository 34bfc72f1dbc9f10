"""Reads the log in batches, at the pace of the reader's lane."""

from __future__ import annotations

import time

from kernel.governance.pace import IDLE_S, Pace
from kernel.log.base import CommitBatch, LogReader, size_of
from kernel.settings import Batch

BACKLOG = 2_000
"""If more commits than this are waiting, a batch is filled before it is folded."""
READ_TIMEOUT_S = 0.1


async def read_batch(reader: LogReader, limits: Batch, pace: Pace) -> CommitBatch:
    """Return the next commits. With a backlog, fill the batch up to its limits: fewer rows have to be written."""
    room = await pace.room(limits.events)
    if not room:
        return CommitBatch([], 0)
    batch = await reader.next(room, IDLE_S)
    size = size_of(batch.commits)
    deadline = time.monotonic() + limits.time
    while batch.pending > BACKLOG and len(batch.commits) < room and size < limits.bytes:
        if time.monotonic() >= deadline:
            break
        more = await reader.next(room - len(batch.commits), READ_TIMEOUT_S)
        if not more.commits:
            break
        batch = CommitBatch(batch.commits + more.commits, more.pending, batch.oldest)
        size += size_of(more.commits)
    return batch
