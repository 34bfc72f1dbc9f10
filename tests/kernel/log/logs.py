"""What the tests of event logs share: filling a log, and reading it."""

from __future__ import annotations

import asyncio

from kernel.log import JetStreamLog, MemoryLog, Stored
from kernel.log.base import LogReader

Log = MemoryLog | JetStreamLog
PARTITIONS = 8


def subject_of(log: Log, id: str = "1", aggregate: str = "Thing") -> str:
    return log.subjects.address(aggregate, id).subject


async def fill(log: Log, count: int, ids: int = 10) -> list[Stored]:
    """Append `count` commits, spread over `ids` subjects, and return them in stream order."""
    subjects = [subject_of(log, str(number)) for number in range(ids)]
    last = dict.fromkeys(subjects, 0)
    made = []
    for start in range(0, count, ids):
        some = subjects[: count - start]
        payloads = [b"%d" % (start + place) for place in range(len(some))]
        futures = [log.append(subject, last[subject], payload) for subject, payload in zip(some, payloads, strict=True)]
        for subject, payload, sequence in zip(some, payloads, await asyncio.gather(*futures), strict=True):
            last[subject] = sequence
            made.append(Stored(sequence, subject, payload))
    return sorted(made)


async def drain(reader: LogReader, count: int, limit: int = 1000) -> list[Stored]:
    """Read until there are `count` commits; fail if none come for a long time."""
    found: list[Stored] = []
    while len(found) < count:
        batch = await reader.next(limit, timeout=20)
        assert batch.commits, f"{len(found)} of {count} commits, then nothing"
        found += batch.commits
    return found
