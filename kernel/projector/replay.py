"""Replays the log into generations that nothing else writes: one window is written while the next one is folded."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog, LogReader, Stored, size_of
from kernel.projector.parking import Batch as Parkings
from kernel.projector.parking import stored_commit
from projections.build import Build
from projections.checkpoints import Move, Position
from projections.errors import HandlerFailed, SchemaError
from projections.keyed import Router, Routing, RowsWait
from projections.parked import Letter, Parked
from projections.unit_of_work import Batch, Write, Writer

T = TypeVar("T")
Commits = list[tuple[int, Sequence[Envelope]]]
Groups = dict[tuple[str, str], Commits]
WINDOW = 40_000
"""Commits folded before they are written: most rows of a window are written once for many events."""
WINDOW_BYTES = 64_000_000
"""Bytes of commits that are folded before they are written."""
READ = 8_000


@dataclass(frozen=True, slots=True)
class RebuildProgress:
    """How far a rebuild is, or another pass over the log.

    Attributes:
        done, total: commits of the log.
        events: events folded so far.
        seconds: since the beginning.
        phase: what is done, for people.
    """

    done: int
    total: int
    events: int
    seconds: float
    phase: str = "building"


@asynccontextmanager
async def reading(log: EventLog, after: int = 0) -> AsyncIterator[LogReader]:
    """Yield a reader of the log behind a stream sequence for a replay; meanwhile no garbage is collected."""
    reader = await log.read(after)
    # what a replay makes is freed when it is done with; looking for cycles in it takes a fifth of the time
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield reader
    finally:
        if collecting:
            gc.enable()
        await reader.close()


@dataclass
class Replay:
    """One pass over the log, which folds it into the generations of a writer.

    Args:
        partitions: number of the log's partitions.
        pool: a thread for the database.
        pace: how fast the log may be read.
        parked: told of the aggregates that failed, and of the commits among which their events are.
        progress: called after each window that was folded.
        start: how far the generations have folded each partition already: stream sequence; None: nothing yet.
        connection: on which everything is read and written; None: each window has a transaction of its own.

    Attributes:
        at: stream sequence up to which everything is folded.
        commits, events: read and folded so far.
    """

    log: EventLog
    writer: Writer
    partitions: int
    pool: ThreadPoolExecutor
    pace: Pace
    parked: Callable[[Sequence[HandlerFailed], Parkings], None]
    progress: Callable[[Replay], None]
    start: Mapping[int, int] | None = None
    connection: Connection | None = None
    at: int = field(init=False, default=0)
    commits: int = field(init=False, default=0)
    events: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._plan = self.writer.plan
        start = self.start or dict.fromkeys(range(self.partitions), 0)
        self._behind, self._ahead = start, max(start.values(), default=0)
        self.at = min(start.values(), default=0)
        self._build = Build(self._plan, self.writer, empty=not self._ahead)
        self._wanted = {name for declared in self._plan.projections for name in declared.aggregates}
        self._position = Position([dict(start)] * len(self._plan.projections))
        self._units = {unit for declared in self._plan.projections for unit in declared.units}
        self._left_out: list[tuple[HandlerFailed, Letter]] = []
        self._folded = 0

    async def fill(self, reader: LogReader, last: int, until: Mapping[int, int] | None = None) -> None:
        """Fold up to a place of the log.

        Args:
            last: stream sequence.
            until: for each partition, the stream sequence up to which its commits are folded; None: all are.
        """
        writing: asyncio.Future[list[HandlerFailed]] | None = None
        written: Groups = {}
        try:
            while self.at < last:
                window = await self._window(reader, last, self.pace)
                if not window:
                    continue
                groups = await self._group(window, until)
                if self._build.missing(groups):
                    await self._conclude(writing, written)
                    writing = None
                write = await self._fold(groups, window, self.connection)
                parked = await self._conclude(writing, written)
                writing = None
                if parked and self._build.missing(groups):
                    # some were folded from records that are not in the database
                    self._build.forget(groups)
                    write = await self._fold(groups, window, self.connection)
                self.writer.park_suspects(write)
                self._build.trim()
                written, writing = groups, asyncio.ensure_future(self.run(partial(self._commit, write)))
                self._advance(write, window)
                self.progress(self)
        finally:
            await self._conclude(writing, written)

    async def fill_within(self, connection: Connection, reader: LogReader, last: int) -> None:
        """Fold up to a place of the log as fast as it goes, in a transaction that the caller commits."""
        while self.at < last:
            window = await self._window(reader, last, unpaced())
            if not window:
                continue
            groups = await self._group(window, None)
            write = await self._fold(groups, window, connection)
            self._park(await self.run(partial(self.writer.attempt, connection, write)), groups)
            self._advance(write, window)

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function in the thread for the database."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    def _commit(self, write: Write) -> list[HandlerFailed]:
        if self.connection is None:
            return self.writer.commit(write)
        failures = self.writer.attempt(self.connection, write)
        self.connection.commit()
        return failures

    async def _conclude(self, writing: asyncio.Future[list[HandlerFailed]] | None, written: Groups) -> bool:
        """Wait for a write, and park what it could not write. Return whether there was any."""
        failures = await writing if writing is not None else []
        self._park(failures, written)
        return bool(failures)

    def _park(self, failures: Sequence[HandlerFailed], groups: Groups) -> None:
        """Park aggregates that could not be written, and forget their records."""
        self.parked(failures, groups.items)
        for failure in failures:
            self._plan.park(failure)
        if failures:
            self._build.forget(failure.aggregate for failure in failures)

    async def _window(self, reader: LogReader, last: int, pace: Pace) -> list[Stored]:
        window: list[Stored] = []
        size = 0
        while len(window) < WINDOW and size < WINDOW_BYTES and (not window or window[-1].sequence < last):
            if not (room := await pace.room(min(READ, WINDOW - len(window)))):
                continue
            batch = await reader.next(room, timeout=1.0)
            pace.spend(len(batch.commits))
            window += batch.commits
            size += size_of(batch.commits)
            # what the pace gives in a second is written each second: it would take too long to fill a window
            if window and (not batch.commits or room < READ):
                break
        self._build.note_read(size)
        return window

    async def _group(self, window: list[Stored], until: Mapping[int, int] | None) -> Groups:
        own = window
        if window[0].sequence <= self._ahead:
            own = [stored for stored in own if stored.sequence > self._end(stored.subject, self._behind)]
        if until is not None and own and own[-1].sequence > min(until.values()):
            own = [stored for stored in own if stored.sequence <= self._end(stored.subject, until)]
        groups = await self._sort(own)
        if not self._plan.routers:
            return groups
        sources = groups if own is window else await self._sort(window)
        found = {key: commits for key, commits in groups.items() if key[0] in self._units}
        self._left_out = []
        for router in self._plan.routers:
            found |= await self._route(router, sources, window[0].sequence <= self._ahead, until)
        return found

    async def _route(self, router: Router, sources: Groups, again: bool, until: Mapping[int, int] | None) -> Groups:
        """Return the rows with keys of their own that commits belong to.

        Args:
            again: some of the commits were folded before.

        Raises:
            SchemaError: only a newer program can tell.
        """
        partition = self.log.subjects.partition

        def wanted(aggregate: str, aggregate_id: str, sequence: int) -> bool:
            own = partition(aggregate, aggregate_id)
            return self._behind.get(own, 0) < sequence and (until is None or sequence <= until.get(own, 0))

        bounded = again or until is not None
        rows = partial(wanted, router.name) if bounded else None
        routing, done = Routing(router, self._plan.parked.skipped, 0, rows), 0
        try:
            for key, commits in sources.items():
                if key[0] in router.aggregates:
                    routing.add(key, commits)
                    done += len(commits)
                if done > READ:
                    done = 0
                    await asyncio.sleep(0)
        except RowsWait as wait:
            raise SchemaError(f"{router.name} can only be built by a newer program: {wait}") from wait
        for failure, letter in routing.left_out:
            if not bounded or wanted(*letter.aggregate, letter.stream_sequence):
                self._left_out.append((failure, letter))
                self._plan.parked.add(letter.aggregate, router.index, Parked(letter.sequence, letter.error))
        return {(router.name, key): list(commits) for key, commits in routing.rows()}

    async def _sort(self, window: list[Stored]) -> Groups:
        by_subject: dict[str, Commits | None] = {}
        groups: Groups = {}
        for number, (sequence, subject, payload) in enumerate(window):
            if number % 4_000 == 3_999:
                await asyncio.sleep(0)
            try:
                commits = by_subject[subject]
            except KeyError:
                commits = by_subject[subject] = self._new_group(subject, groups)
            if commits is None:
                continue
            try:
                commits.append((sequence, decode(payload)))
            except InvalidMessage:
                continue  # the live projection has put it into quarantine
        return {key: commits for key, commits in groups.items() if commits}

    def _end(self, subject: str, until: Mapping[int, int]) -> int:
        try:
            return until.get(self.log.subjects.parse(subject).partition, 0)
        except InvalidId:
            return 0

    def _new_group(self, subject: str, groups: Groups) -> Commits | None:
        """Return the list for a subject's commits, or None if no projection here wants them."""
        try:
            address = self.log.subjects.parse(subject)
        except InvalidId:
            return None
        return groups.setdefault((address.aggregate, address.id), []) if address.aggregate in self._wanted else None

    async def _fold(self, groups: Groups, window: list[Stored], connection: Connection | None) -> Write:
        """Fold a window and make it ready to be written.

        Args:
            connection: read stored rows on this connection.
        """
        if missing := self._build.missing(groups):
            await self.run(partial(self._build.load, missing, connection))
        folded = self._build.fold(groups)
        for failure, letter in self._left_out:
            folded.failures.append(failure)
            folded.letters.append(letter)
        self.parked(folded.failures, groups.items)
        self._folded = folded.count
        moves: list[Move] = self._position.quiet_moves(self.writer.generations, window[-1].sequence)
        batch: Batch = [(key, commits, frozenset()) for key, commits in groups.items()]
        return self.writer.freeze(folded, moves, partial(self._letter, window), batch)

    def _advance(self, write: Write, window: list[Stored]) -> None:
        """Count a window as folded, which is written or being written."""
        self._position.advance(write.moves, self.writer.generations)
        self.events += self._folded
        self.commits += len(window)
        self.at = window[-1].sequence

    def _letter(self, window: list[Stored], letter: Letter) -> tuple[int, bytes]:
        return stored_commit(letter, window, self.log.subjects)
