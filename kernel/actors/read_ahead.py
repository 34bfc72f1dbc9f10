"""What is read in one go after a take-over, so that cold aggregates need not be asked for one by one.

A worker that starts, or takes over from a dead one, has nothing in memory, and commands for many aggregates come at
once. To read the end of the log in order costs far less than to look for each aggregate's last commits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, NamedTuple

from aggregates import InvalidId
from kernel.errors import LogError
from kernel.log.base import EventLog, LogReader, Stored
from kernel.log.snapshots import SnapshotStore

logger = logging.getLogger("eskernel.actors")
COMMITS, SNAPSHOTS = 50_000, 100_000
"""So many of the latest are read."""
MOST_BYTES = 64 << 20
"""More is not kept, of each of the two."""
LEAST = 1_000
"""Commits in a log that is worth it."""
SHARE = 8
"""A take-over of less than one of so many partitions is not worth it."""
SLICE = 1_000
KEPT_S = 120.0
"""What has not been used after so many seconds is dropped."""


class Ahead(NamedTuple):
    """What is known of an aggregate without asking.

    Attributes:
        snapshot: its snapshot, undecoded, or nothing.
        commits: all of its commits that come after a stream sequence, which is the same for all aggregates.
    """

    snapshot: bytes | None
    commits: list[Stored]


NOTHING = Ahead(None, [])


class ReadAhead:
    """Reads the latest snapshots and the end of the log after a take-over.

    What it knows of an aggregate is given once, to its first load: after that only the aggregate's actor is up to date.
    Whether it is still all that there is has to be compared with the log's leader: a worker that was believed dead may
    have appended since.

    Args:
        store: of the snapshots; None: there are none.
    """

    def __init__(self, log: EventLog, store: SnapshotStore | None) -> None:
        self._log, self._store = log, store
        self._reading: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._partitions: frozenset[int] = frozenset()
        self._snapshots: dict[str, bytes] = {}
        self._commits: dict[str, list[Stored]] = {}
        self._loaded: set[str] = set()
        self._ready = False

    def begin(self, partitions: frozenset[int]) -> None:
        """Read ahead for partitions that were taken, and those taken before, in the background, unless they are few."""
        if len(partitions) * SHARE >= self._log.subjects.partitions:
            self.close()
            self._partitions |= partitions
            self._reading = self._spawn(self._read())

    def forget(self, partitions: Collection[int]) -> None:
        """Forget what belongs to partitions that may be another worker's."""
        self._partitions -= frozenset(partitions)
        for known in (self._snapshots, self._commits):
            for subject in [subject for subject in known if not self._is_ours(subject)]:
                del known[subject]

    def close(self) -> None:
        """Read no further, and forget everything but which partitions are ours."""
        if self._reading is not None:
            self._reading.cancel()
        self._drop()

    async def stop(self) -> None:
        """Read no further, and wait until the server has no consumer of ours."""
        self.close()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def take(self, subject: str) -> Ahead:
        """Return what is known of an aggregate that is being loaded, and forget it."""
        if self._reading is None:
            return NOTHING
        if not self._ready:
            self._loaded.add(subject)
            return NOTHING
        return Ahead(self._snapshots.pop(subject, None), self._commits.pop(subject, []))

    def _drop(self) -> None:
        self._reading, self._ready = None, False
        self._snapshots, self._commits, self._loaded = {}, {}, set()

    async def _read(self) -> None:
        try:
            info = await self._log.info()
            if info.commits >= LEAST:
                await self._read_snapshots()
                await self._read_commits(info.last)
                for subject in self._loaded:
                    self._snapshots.pop(subject, None)
                    self._commits.pop(subject, None)
                self._loaded.clear()
                self._ready = True
                await asyncio.sleep(KEPT_S)
        except LogError as error:
            logger.info("nothing is read ahead: %s", error)
        except Exception:
            logger.exception("reading ahead failed; aggregates are loaded one by one")
        if self._reading is asyncio.current_task():
            self._drop()

    async def _read_snapshots(self) -> None:
        try:
            reader = await self._store.read_latest(SNAPSHOTS) if self._store is not None else None
            if reader is not None:
                await self._collect_snapshots(reader)
        except LogError as error:
            logger.info("snapshots are not read ahead: %s", error)

    async def _collect_snapshots(self, reader: LogReader) -> None:
        left = MOST_BYTES
        try:
            while left > 0 and (batch := await reader.next(SLICE, 1.0)).commits:
                for stored in batch.commits:
                    subject = self._log.subjects.of_snapshot(stored.subject)
                    if self._is_ours(subject):
                        self._snapshots[subject] = stored.payload
                        left -= len(stored.payload)
                if not batch.pending:
                    break
                await asyncio.sleep(0)
        finally:
            # also if this task is cancelled while it waits for that
            await asyncio.shield(self._spawn(reader.close()))

    async def _read_commits(self, last: int) -> None:
        """Read the end of the log. What is known of an aggregate must reach up to `last`."""
        reader = await self._log.read(max(0, last - COMMITS), gentle=True)
        try:
            kept = await self._collect(reader, last)
        finally:
            # also if this task is cancelled while it waits for that
            await asyncio.shield(self._spawn(reader.close()))
        if not kept:
            self._commits = {}

    async def _collect(self, reader: LogReader, last: int) -> bool:
        left, at = MOST_BYTES, 0
        while at < last:
            batch = await reader.next(SLICE, 5.0)
            if not batch.commits:
                return False
            at = batch.commits[-1].sequence
            left -= self._keep(batch.commits)
            if left < 0:
                return False
            await asyncio.sleep(0)
        return True

    def _keep(self, commits: Iterable[Stored]) -> int:
        size = 0
        for stored in commits:
            known = self._commits.get(stored.subject)
            if known is not None:
                known.append(stored)
            elif self._is_ours(stored.subject):
                self._commits[stored.subject] = [stored]
            else:
                continue
            size += len(stored.payload)
        return size

    def _is_ours(self, subject: str) -> bool:
        try:
            return self._log.subjects.parse(subject).partition in self._partitions
        except InvalidId:
            return False
