"""A log in this process's memory: for tests, and as the simplest implementation of the protocol."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from kernel.errors import Conflict, PayloadTooLarge, Unavailable
from kernel.log.base import Appending, CommitBatch, Count, LogReader, Stored, StreamInfo
from kernel.log.subjects import Subjects


class MemoryLog:
    """Keeps commits in lists. They are lost when the process ends."""

    def __init__(self, app: str = "memory", partitions: int = 64, max_payload: int = 1_048_576) -> None:
        self.subjects = Subjects(app, partitions)
        self._max_payload = max_payload
        self._all: list[Stored] = []
        self._by_subject: dict[str, list[Stored]] = {}
        self._grown = asyncio.Event()
        self._created = datetime.now(UTC).isoformat()
        self._closed = False

    @property
    def max_payload(self) -> int:
        return self._max_payload

    def append(self, subject: str, expected: int, payload: bytes, links: bytes = b"") -> Appending:  # noqa: ARG002
        future = Appending()
        known = self._by_subject.get(subject)
        last = known[-1].sequence if known else 0
        if self._closed:
            future.set_exception(Unavailable("the log is closed"))
        elif len(payload) > self._max_payload:
            future.set_exception(PayloadTooLarge(f"{subject}: {len(payload)} bytes, at most {self._max_payload}"))
        elif last != expected:
            future.set_exception(Conflict(subject, expected, last))
        else:
            stored = Stored(len(self._all) + 1, subject, payload)
            self._all.append(stored)
            self._by_subject.setdefault(subject, []).append(stored)
            self._grown.set()
            self._grown = asyncio.Event()
            future.set_result(stored.sequence)
        return future

    async def read_subject(self, subject: str, after: int = 0, known: Sequence[Stored] = ()) -> list[Stored]:  # noqa: ARG002
        return [stored for stored in self._by_subject.get(subject, ()) if stored.sequence > after]

    async def last(self, subject: str) -> Stored | None:
        known = self._by_subject.get(subject)
        return known[-1] if known else None

    async def read(
        self,
        after: int,
        partition: int | None = None,
        *,
        live: bool = False,  # noqa: ARG002
        gentle: bool = False,  # noqa: ARG002
    ) -> LogReader:
        return _MemoryReader(self, after, partition)

    async def info(self) -> StreamInfo:
        durability = "events are in memory only and end with the process"
        count = len(self._all)
        return StreamInfo(self._created, self.subjects.partitions, min(count, 1), count, count, durability)

    async def count_commits(self, known: Collection[str]) -> dict[str, Count]:
        counted: Counter[str] = Counter()
        aggregates: Counter[str] = Counter()
        for subject, commits in self._by_subject.items():
            if aggregate := self.subjects.aggregate_of(subject, known):
                counted[aggregate] += len(commits)
                aggregates[aggregate] += 1
        return {name: Count(commits, aggregates[name]) for name, commits in counted.items()}

    async def close(self) -> None:
        self._closed = True


class _MemoryReader:
    def __init__(self, log: MemoryLog, after: int, partition: int | None) -> None:
        self._log, self._after, self._partition = log, after, partition

    async def next(self, limit: int, timeout: float | None = None) -> CommitBatch:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    grown = self._log._grown
                    found, count = self._waiting(limit)
                    if found:
                        break
                    await grown.wait()
        except TimeoutError:
            return CommitBatch([], 0)
        self._after = found[-1].sequence
        return CommitBatch(found, count - len(found))

    def _waiting(self, limit: int) -> tuple[list[Stored], int]:
        """Return the next commits, and how many there are."""
        everything = self._log._all
        start = bisect_right(everything, self._after, key=lambda stored: stored.sequence)
        if self._partition is None:
            return everything[start : start + limit], len(everything) - start
        parse = self._log.subjects.parse
        own = [stored for stored in everything[start:] if parse(stored.subject).partition == self._partition]
        return own[:limit], len(own)

    def acknowledge(self, sequence: int) -> None:
        pass

    async def close(self) -> None:
        pass
