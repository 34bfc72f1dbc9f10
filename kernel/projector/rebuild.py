"""Rebuilding projections by replay: new generations are filled beside the live ones, then take their place at once.

Any number of projections are built in one pass over the log. The path is the same for a projection that is new, one
whose version was raised, and one that is simply built again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import DBAPIError

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog, LogReader, Stored
from kernel.projector.cut_over import PAUSE_S, LockWait, is_locked, take_over
from kernel.projector.parking import ParkingLog, stored_commit
from kernel.projector.unknown import find_unknown
from projections import generations
from projections.build import Build
from projections.checkpoints import Move, Position
from projections.contention import AT_ONCE, is_contention, outlast_contention
from projections.database import open_database, reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced, HandlerFailed, SchemaError
from projections.fold import Plan
from projections.heads import mark_keepers
from projections.parked import Letter
from projections.tables import stream
from projections.unit_of_work import Batch, Write, Writer

logger = logging.getLogger("eskernel.projector")

T = TypeVar("T")
Commits = list[tuple[int, list[Envelope]]]
Groups = dict[tuple[str, str], Commits]
WINDOW = 40_000
"""Commits folded before they are written: most rows of a window are written once for many events."""
WINDOW_BYTES = 64_000_000
"""Bytes of commits that are folded before they are written."""
READ = 8_000
LEFT = 1_000
"""Commits that may be left to fold at the cut-over, while queries wait."""


@dataclass(frozen=True, slots=True)
class RebuildProgress:
    """How far a rebuild is.

    Attributes:
        done, total: commits of the log.
        events: events folded so far.
        seconds: since the beginning.
    """

    done: int
    total: int
    events: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did.

    Attributes:
        generation: number of the new generation.
        sequence: stream sequence up to which it was folded at the cut-over.
        parked: aggregates that wait behind dead letters in it.
    """

    projection: str
    version: int
    generation: int
    events: int
    sequence: int
    seconds: float
    parked: int


class Rebuild:
    """One rebuild of some projections of an app, beside the service that may run meanwhile.

    Example:
        >>> async with await Client.connect(app) as client:
        ...     await Rebuild(app, client.log, "postgresql://user@host/name", [app.projection("Balances")]).run()

    Args:
        log: the app's log, such as `Client.log`.
        database: URL of the projection database, or an engine that the kernel has opened.
        projections: the projections to build, of `App.projections`.
        progress: called after each window that was folded.
        pace: how fast the log may be read; as fast as it goes without one.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        database: Engine | str,
        projections: Sequence[DeclaredProjection],
        progress: Callable[[RebuildProgress], None] = lambda _: None,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or unpaced()
        self._app, self._log, self._projections, self._progress = app, log, projections, progress
        self._engine = open_database(database) if isinstance(database, str) else database
        self._opened = isinstance(database, str)
        self._plan = Plan(list(app.types.values()), projections, self._engine.dialect, app.transient)
        self._wanted = {declared.aggregate for declared in projections}
        self._parkings = ParkingLog("while building", projections)
        self._pool = ThreadPoolExecutor(1, "eskernel-rebuild")
        self._events = 0
        self._done = 0
        self._at = 0
        self._folded = 0
        self._began = time.perf_counter()

    async def run(self) -> list[Rebuilt]:
        """Build, catch up, cut over: all of the projections in the same transaction.

        Raises:
            DeclarationError: an aggregate's class seems to have been renamed; the copy would be empty.
            LogError, sqlalchemy.exc.DBAPIError: nothing has changed for anybody; the unfinished copy is removed by
                the next rebuild.
        """
        started = time.perf_counter()
        try:
            await find_unknown(self._app, self._log)
            made = await self._build_generations(started)
        except Fenced:
            names = ", ".join(declared.name for declared in self._projections)
            raise SchemaError(f"another rebuild of {names} took over; this one has changed nothing") from None
        finally:
            self._parkings.sum_up(at_once=True)
            self._pool.shutdown()
            if self._opened:
                self._engine.dispose()
        seconds = time.perf_counter() - started
        return [
            Rebuilt(
                generation.name,
                generation.projection.version,
                generation.number,
                self._events,
                self._at,
                seconds,
                self._parked(index),
            )
            for index, generation in enumerate(made)
        ]

    def _parked(self, index: int) -> int:
        return sum(index in waiting and not waiting[index].waits for waiting in self._plan.parked.values())

    async def _build_generations(self, started: float) -> list[generations.Generation]:
        info = await self._log.info()
        made = await self._in(partial(outlast_contention, partial(self._prepare, info.partitions)))
        self._writer = Writer(self._engine, self._plan, made, epoch=0)
        self._build = Build(self._plan, self._writer)
        self._position = Position([dict.fromkeys(range(info.partitions), 0)] * len(made))
        reader = await self._log.read(0)
        # what a replay makes is freed when it is done with; looking for cycles in it takes a fifth of the time
        collecting = gc.isenabled()
        gc.disable()
        try:
            behind = info.last
            while behind:
                await self._fill(reader, info.commits, info.last, started)
                before, info = behind, await self._log.info()
                # a slowed rebuild has much to catch up with: while it gains on the log, before the cut-over
                gap = info.last - self._at
                behind = gap if LEFT < gap < before else 0
            await self._cut_over(reader, made)
        finally:
            if collecting:
                gc.enable()
            await reader.close()
        return made

    def _prepare(self, partitions: int) -> list[generations.Generation]:
        with self._engine.begin() as connection:
            # rebuilds that begin at the same moment do this one after the other
            connection.execute(select(stream.c.app).with_for_update())
            generations.adopt(connection, self._app.projections)
            for declared in self._projections:
                for number in generations.numbers(connection, declared.name, "building", lock=True):
                    generations.drop(connection, declared, number)
            made = [generations.create(connection, declared, range(partitions)) for declared in self._projections]
            for generation in made:
                generations.check_replaceable(connection, generation)
            mark_keepers(connection, self._app.projections, made)
            return made

    async def _fill(self, reader: LogReader, total: int, last: int, started: float) -> None:
        """Replay up to where the log ended at the start, writing one window while the next is folded."""
        writing: asyncio.Future[list[HandlerFailed]] | None = None
        written: Groups = {}
        try:
            while self._at < last:
                window = await self._window(reader, last, self._pace)
                if not window:
                    continue
                groups = await self._group(window)
                if self._build.missing(groups):
                    await self._conclude(writing, written)
                    writing = None
                write = await self._fold(groups, window)
                parked = await self._conclude(writing, written)
                writing = None
                if parked and self._build.missing(groups):
                    # some were folded from records that are not in the database
                    self._build.forget(groups)
                    write = await self._fold(groups, window)
                self._writer.park_suspects(write)
                self._build.trim()
                written, writing = groups, asyncio.ensure_future(self._in(partial(self._writer.commit, write)))
                self._advance(write, window)
                self._done += len(window)
                self._progress(
                    RebuildProgress(self._done, max(total, self._done), self._events, time.perf_counter() - started)
                )
        finally:
            await self._conclude(writing, written)

    async def _conclude(self, writing: asyncio.Future[list[HandlerFailed]] | None, written: Groups) -> bool:
        """Wait for a write, and park what it could not write. Return whether there was any."""
        failures = await writing if writing is not None else []
        self._park(failures, written)
        return bool(failures)

    def _park(self, failures: Sequence[HandlerFailed], groups: Groups) -> None:
        """Park aggregates that could not be written, and forget their records."""
        self._parkings.write(failures, groups.items)
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
            size += sum(len(commit.payload) for commit in batch.commits)
            # what the pace gives in a second is written each second: it would take too long to fill a window
            if window and (not batch.commits or room < READ):
                break
        return window

    async def _group(self, window: list[Stored]) -> Groups:
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

    def _new_group(self, subject: str, groups: Groups) -> Commits | None:
        """Return the list for a subject's commits, or None if no projection here wants them."""
        try:
            address = self._log.subjects.parse(subject)
        except InvalidId:
            return None
        return groups.setdefault((address.aggregate, address.id), []) if address.aggregate in self._wanted else None

    async def _fold(self, groups: Groups, window: list[Stored], connection: Connection | None = None) -> Write:
        """Fold a window and make it ready to be written.

        Args:
            connection: read stored rows on this connection.
        """
        if missing := self._build.missing(groups):
            await self._in(partial(self._build.load, missing, connection))
        folded = self._build.fold(groups, sum(len(commit.payload) for commit in window))
        self._parkings.write(folded.failures, groups.items)
        self._folded = folded.count
        moves: list[Move] = self._position.quiet_moves(self._writer.generations, window[-1].sequence)
        batch: Batch = [(key, commits, frozenset()) for key, commits in groups.items()]
        return self._writer.freeze(folded, moves, partial(self._letter, window), batch)

    def _advance(self, write: Write, window: list[Stored]) -> None:
        """Count a window as folded, which is written or being written."""
        self._position.advance(write.moves, self._writer.generations)
        self._events += self._folded
        self._at = window[-1].sequence

    def _letter(self, window: list[Stored], letter: Letter) -> tuple[int, bytes]:
        return stored_commit(letter, window, self._log.subjects)

    async def _cut_over(self, reader: LogReader, made: list[generations.Generation]) -> None:
        """In one transaction: stop the live generations, show ours instead, and fold what they had beyond ours."""
        connection: Connection = await self._in(self._engine.connect)
        try:
            furthest = await self._take_over(connection, reader, made)
            while self._at < furthest:
                # the live projections stand still meanwhile: nothing may slow this
                window = await self._window(reader, furthest, unpaced())
                if not window:
                    continue
                groups = await self._group(window)
                write = await self._fold(groups, window, connection)
                self._park(await self._in(partial(self._writer.attempt, connection, write)), groups)
                self._advance(write, window)
            await self._in(connection.commit)
        finally:
            await self._in(connection.close)

    async def _take_over(self, connection: Connection, reader: LogReader, made: list[generations.Generation]) -> int:
        """Begin the cut-over's transaction, as often as it takes to have its locks. Return `take_over`'s result."""
        waiting, deadlocks = LockWait(made), 0
        while True:
            try:
                return await self._in(partial(take_over, connection, made))
            except DBAPIError as error:
                await self._in(connection.rollback)
                if not is_locked(error):
                    raise
                deadlocks += is_contention(error)
                if is_contention(error) and deadlocks <= AT_ONCE:
                    continue
            await self._in(partial(waiting.note, connection))
            await asyncio.sleep(PAUSE_S)
            # the live projections have gone on: what they folded is folded before they are stopped again
            info = await self._log.info()
            if info.last > self._at:
                await self._fill(reader, info.commits, info.last, self._began)

    async def _in(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def clean_up(engine: Engine, declared: DeclaredProjection, keep: int = 1) -> list[int]:
    """Drop retired generations but the newest `keep`; return the numbers of those dropped.

    A generation on which others have built is kept, with a warning.
    """
    dropped: list[int] = []
    with reads(engine).connect() as connection:
        retired: list[int] = generations.numbers(connection, declared.name, "retired")
    for number in retired[: max(0, len(retired) - keep)]:
        try:
            with engine.begin() as connection:
                generations.drop(connection, declared, number)
        except SchemaError as error:
            logger.warning("generation %d of %s is kept: %s", number, declared.name, error)
        except DBAPIError as error:
            if not is_locked(error):
                raise
            logger.warning("generation %d of %s is kept until the next start: it is in use", number, declared.name)
        else:
            dropped.append(number)
    return dropped


async def build_missing(
    app: App,
    log: EventLog,
    engine: Engine,
    progress: Callable[[RebuildProgress], None] = lambda _: None,
    pace: Pace | None = None,
) -> list[Rebuilt]:
    """Build every projection that has no live generation of its declared version."""

    def find_missing() -> list[DeclaredProjection]:
        with reads(engine).connect() as connection:
            return [declared for declared in app.projections if not generations.is_built(connection, declared)]

    missing = await asyncio.to_thread(find_missing)
    return await Rebuild(app, log, engine, missing, progress, pace).run() if missing else []
