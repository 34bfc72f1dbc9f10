"""Rebuilding a projection by replay: a new generation is filled beside the live one, then takes its place at once.

The path is the same for a projection that is new, one whose version was raised, and one that is simply built again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.app import App
from kernel.log.base import EventLog, LogReader, Stored
from kernel.subjects import Subjects
from projections import generations
from projections.build import Build
from projections.checkpoints import Move, Position
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import UNKNOWN, HandlerFailed
from projections.fold import Letter, Plan
from projections.unit_of_work import Write, Writer

logger = logging.getLogger("eskernel")
T = TypeVar("T")
Groups = dict[tuple[str, str], list[tuple[int, list[Envelope]]]]
WINDOW = 40_000
"""Commits folded before they are written: most rows of a window are written once for many events."""
READ = 8_000


@dataclass(frozen=True, slots=True)
class Progress:
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
    """One rebuild of one projection.

    Args:
        progress: told after every window.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        engine: Engine,
        projection: DeclaredProjection,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._app, self._log, self._engine, self._declared, self._progress = app, log, engine, projection, progress
        self._plan = Plan(list(app.types.values()), [projection])
        self._pool = ThreadPoolExecutor(1, "eskernel-rebuild")
        self._events = 0
        self._done = 0
        self._at = 0

    async def run(self) -> Rebuilt:
        """Build, catch up, cut over.

        Raises:
            LogError, sqlalchemy.exc.DBAPIError: nothing has changed for anybody; the unfinished copy is removed by
                the next rebuild.
        """
        started = time.perf_counter()
        try:
            while True:
                try:
                    made = await self._attempt(started)
                except HandlerFailed as failure:
                    # noticed too late to fold the window again: begin anew, with the aggregate parked
                    logger.error("parked for %s: %s", self._declared.name, failure)
                    self._plan.park(_placed(failure, self._written))
                else:
                    break
        finally:
            self._pool.shutdown()
        return Rebuilt(
            self._declared.name,
            self._declared.version,
            made.number,
            self._events,
            self._at,
            time.perf_counter() - started,
            len(self._plan.parked),
        )

    async def _attempt(self, started: float) -> generations.Generation:
        info = await self._log.info()
        self._subjects = Subjects(self._app.name, info.partitions)
        self._events = self._done = self._at = 0
        self._written: Groups = {}
        made: generations.Generation = await self._in(partial(self._prepare, info.partitions))
        self._writer = Writer(self._engine, self._plan, [made], epoch=0)
        self._build = Build(self._plan, self._writer)
        self._position = Position([dict.fromkeys(range(info.partitions), 0)])
        reader = await self._log.read(0)
        try:
            await self._fill(reader, info.commits, info.last, started)
            await self._cut_over(reader, made)
        finally:
            await reader.close()
        return made

    def _prepare(self, partitions: int) -> generations.Generation:
        with self._engine.begin() as connection:
            for number in generations.numbers(connection, self._declared.name, "building"):
                generations.drop(connection, self._declared, number)
            return generations.create(connection, self._declared, range(partitions))

    async def _fill(self, reader: LogReader, total: int, last: int, started: float) -> None:
        """Replay up to where the log ended at the start, writing one window while the next is folded."""
        writing: asyncio.Future[None] | None = None
        try:
            while self._at < last:
                window = await self._window(reader, last)
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
                    Progress(self._done, max(total, self._done), self._events, time.perf_counter() - started)
                )
        finally:
            if writing is not None:
                await writing

    async def _window(self, reader: LogReader, last: int) -> list[Stored]:
        window: list[Stored] = []
        while len(window) < WINDOW and (not window or window[-1].sequence < last):
            batch = await reader.next(READ, timeout=1.0)
            window += batch.commits
            if not batch.commits and window:
                break
        return window

    async def _group(self, window: list[Stored]) -> Groups:
        groups: Groups = {}
        parse, wanted = self._subjects.parse, self._declared.aggregate
        for number, (sequence, subject, payload) in enumerate(window):
            if number % 2_000 == 1_999:
                await asyncio.sleep(0)
            try:
                address = parse(subject)
                if address.aggregate != wanted:
                    continue
                envelopes = decode(payload)
            except (InvalidId, InvalidMessage):
                continue  # the live projection has put it into quarantine
            key = (wanted, address.id)
            known = groups.get(key)
            if known is None:
                groups[key] = [(sequence, envelopes)]
            else:
                known.append((sequence, envelopes))
        return groups

    async def _fold_again(self, failure: HandlerFailed, groups: Groups, to: int) -> Write:
        """Park what failed, and fold the window again from stored rows."""
        while True:
            logger.error("parked for %s: %s", self._declared.name, failure)
            self._plan.park(_placed(failure, groups))
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
        payload = next(c.payload for c in self._window_commits if c.sequence == letter.stream_sequence)
        return self._subjects.address(*letter.aggregate).partition, payload

    async def _cut_over(self, reader: LogReader, made: generations.Generation) -> None:
        """In one transaction: stop the live generation, fold what it had beyond ours, and show ours instead."""
        connection: Connection = await self._in(self._engine.connect)
        try:
            transaction = await self._in(connection.begin)
            stood = await self._in(lambda: generations.retire_live(connection, made.name))
            furthest = max(stood.values(), default=0)
            while self._at < furthest:
                window = await self._window(reader, furthest)
                if not window:
                    continue
                self._window_commits = window
                groups = await self._group(window)
                await self._in(partial(self._build.load, self._build.missing(list(groups)), connection))
                self._written = groups
                write = self._ready(groups, window[-1].sequence)
                await self._in(partial(self._writer.apply, connection, write))
            await self._in(lambda: generations.show(connection, made))
            await self._in(transaction.commit)
        finally:
            await self._in(connection.close)

    async def _in(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _placed(failure: HandlerFailed, groups: Groups) -> HandlerFailed:
    """Say from which event on the aggregate waits: from its first of the window, where it isn't known better."""
    if failure.sequence == UNKNOWN:
        failure.sequence = groups[failure.aggregate][0][1][0].sequence
    return failure


def clean_up(engine: Engine, declared: DeclaredProjection, keep: int = 1) -> list[int]:
    """Drop retired generations but the newest `keep`; return the numbers of those dropped."""
    with engine.begin() as connection:
        retired: list[int] = generations.numbers(connection, declared.name, "retired")
        dropped = retired[: max(0, len(retired) - keep)]
        for number in dropped:
            generations.drop(connection, declared, number)
    return dropped


async def build_missing(
    app: App, log: EventLog, engine: Engine, progress: Callable[[str, Progress], None] = lambda _n, _p: None
) -> list[Any]:
    """Build every projection that has no live generation of its declared version."""
    built = []
    for declared in app.projections:
        with reads(engine).connect() as connection:
            live = generations.live_generation(connection, declared)
        if live is None:
            name = declared.name
            built.append(await Rebuild(app, log, engine, declared, partial(progress, name)).run())
    return built
