"""Rebuilding projections by replay: new generations are filled beside the live ones, then take their place at once.

Any number of projections are built in one pass over the log. The path is the same for a projection that is new, one
whose version was raised, and one that is simply built again.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog, LogReader, Stored
from kernel.projector.parking import log_parked, stored_commit
from kernel.projector.unknown import find_unknown
from projections import generations
from projections.build import Build
from projections.checkpoints import Move, Position
from projections.database import is_infrastructure, open_database, reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced, HandlerFailed, SchemaError
from projections.fold import Letter, Plan
from projections.unit_of_work import Write, Writer

T = TypeVar("T")
Commits = list[tuple[int, list[Envelope]]]
Groups = dict[tuple[str, str], Commits]
WINDOW = 40_000
"""Commits folded before they are written: most rows of a window are written once for many events."""
READ = 8_000


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
        self._plan = Plan(list(app.types.values()), projections, app.transient)
        self._wanted = {declared.aggregate for declared in projections}
        self._pool = ThreadPoolExecutor(1, "eskernel-rebuild")
        self._events = 0
        self._done = 0
        self._at = 0

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
            while True:
                try:
                    made = await self._attempt(started)
                except Fenced:
                    names = ", ".join(declared.name for declared in self._projections)
                    raise SchemaError(f"another rebuild of {names} took over; this one has changed nothing") from None
                except HandlerFailed as failure:
                    # noticed too late to fold the window again: start from the beginning, with the aggregate parked
                    log_parked("while building", failure, self._projections, self._written.items())
                    self._plan.park(self._writer.blame(failure, list(self._written.items())))
                else:
                    break
        finally:
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

    async def _attempt(self, started: float) -> list[generations.Generation]:
        info = await self._log.info()
        self._events = self._done = self._at = 0
        self._written: Groups = {}
        made = await self._in(partial(self._prepare, info.partitions))
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
                behind = gap if WINDOW < gap < before else 0
            await self._cut_over(reader, made)
        finally:
            if collecting:
                gc.enable()
            await reader.close()
        return made

    def _prepare(self, partitions: int) -> list[generations.Generation]:
        with self._engine.begin() as connection:
            for declared in self._projections:
                for number in generations.numbers(connection, declared.name, "building"):
                    generations.drop(connection, declared, number)
            return [generations.create(connection, declared, range(partitions)) for declared in self._projections]

    async def _fill(self, reader: LogReader, total: int, last: int, started: float) -> None:
        """Replay up to where the log ended at the start, writing one window while the next is folded."""
        writing: asyncio.Future[None] | None = None
        try:
            while self._at < last:
                window = await self._window(reader, last, self._pace)
                if not window:
                    continue
                self._window_commits = window
                groups = await self._group(window)
                if missing := self._build.missing(list(groups)):
                    if writing is not None:
                        await writing
                    await self._in(partial(self._build.load, missing))
                try:
                    write = self._ready(groups, window[-1].sequence)
                except HandlerFailed as failure:
                    if writing is not None:
                        await writing
                    write = await self._fold_again(failure, groups, window[-1].sequence)
                if writing is not None:
                    await writing
                self._build.trim()
                self._written = groups
                writing = asyncio.ensure_future(self._in(partial(self._writer.commit, write)))
                self._done += len(window)
                self._progress(
                    RebuildProgress(self._done, max(total, self._done), self._events, time.perf_counter() - started)
                )
        finally:
            if writing is not None:
                await writing

    async def _window(self, reader: LogReader, last: int, pace: Pace) -> list[Stored]:
        window: list[Stored] = []
        while len(window) < WINDOW and (not window or window[-1].sequence < last):
            if not (room := await pace.room(min(READ, WINDOW - len(window)))):
                continue
            batch = await reader.next(room, timeout=1.0)
            pace.spend(len(batch.commits))
            window += batch.commits
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

    async def _fold_again(self, failure: HandlerFailed, groups: Groups, to: int) -> Write:
        """Park what failed, and fold the window again from stored rows."""
        while True:
            log_parked("while building", failure, self._projections, groups.items())
            self._plan.park(self._writer.blame(failure, list(groups.items())))
            self._build.forget()
            await self._in(partial(self._build.load, self._build.missing(list(groups))))
            try:
                return self._ready(groups, to)
            except HandlerFailed as another:
                failure = another

    def _ready(self, groups: Groups, to: int) -> Write:
        """Fold a window and make it ready to be written."""
        folded = self._build.fold(groups)
        made = self._writer.generations
        moves: list[Move] = self._position.quiet_moves(made, to)
        write = self._writer.freeze(folded, moves, self._letter)
        self._position.advance(moves, made)
        self._events += folded.count
        self._at = to
        return write

    def _letter(self, letter: Letter) -> tuple[int, bytes]:
        return stored_commit(letter, self._window_commits, self._log.subjects)

    async def _cut_over(self, reader: LogReader, made: list[generations.Generation]) -> None:
        """In one transaction: stop the live generations, fold what they had beyond ours, and show ours instead."""
        connection: Connection = await self._in(self._engine.connect)
        write: Write | None = None
        try:
            transaction = await self._in(connection.begin)
            if self._engine.dialect.name == "postgresql":
                # views are replaced at the end of a long work: readers get more time to finish
                await self._in(partial(connection.exec_driver_sql, "SET LOCAL lock_timeout = '60s'"))
            furthest = 0
            for generation in made:
                stood = await self._in(partial(generations.retire_live, connection, generation.name))
                furthest = max(furthest, *stood.values()) if stood else furthest
            while self._at < furthest:
                # the live projections stand still meanwhile: nothing may slow this
                window = await self._window(reader, furthest, unpaced())
                if not window:
                    continue
                self._window_commits = window
                groups = await self._group(window)
                await self._in(partial(self._build.load, self._build.missing(list(groups)), connection))
                self._written = groups
                write = self._ready(groups, window[-1].sequence)
                await self._in(partial(self._writer.apply, connection, write))
            for generation in made:
                await self._in(partial(generations.show, connection, generation))
            await self._in(transaction.commit)
        except DBAPIError as error:
            await self._in(connection.close)
            if write is not None and not is_infrastructure(error):
                await self._in(partial(self._writer.find_refused, write, error))
            raise
        finally:
            await self._in(connection.close)

    async def _in(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def clean_up(engine: Engine, declared: DeclaredProjection, keep: int = 1) -> list[int]:
    """Drop retired generations but the newest `keep`; return the numbers of those dropped."""
    with engine.begin() as connection:
        retired: list[int] = generations.numbers(connection, declared.name, "retired")
        dropped = retired[: max(0, len(retired) - keep)]
        for number in dropped:
            generations.drop(connection, declared, number)
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
            return [
                declared for declared in app.projections if generations.live_generation(connection, declared) is None
            ]

    missing = await asyncio.to_thread(find_missing)
    return await Rebuild(app, log, engine, missing, progress, pace).run() if missing else []
