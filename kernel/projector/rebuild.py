"""Building generations by replay: they are filled beside the live ones, verified, and take their place at once.

Any number of projections are built in one pass over the log. The path is the same for a projection that is new, one
whose version was raised, one that is simply built again, a build that goes on after a crash, and a generation that
readers saw before and are to see again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import DBAPIError

from kernel.app import App
from kernel.governance.pace import Pace, unpaced
from kernel.log.base import EventLog, LogReader
from kernel.projector.cut_over import PAUSE_S, LockWait, is_locked, take_over
from kernel.projector.parking import ParkingLog
from kernel.projector.replay import RebuildProgress, Replay, reading
from kernel.projector.unknown import find_unknown
from kernel.projector.verification import Verification
from kernel.settings import DeadLetters
from projections import generations
from projections.adoption import adopt
from projections.comparison import TableComparison
from projections.contention import AT_ONCE, is_contention, outlast_contention
from projections.database import open_database, reads
from projections.declaration import DeclaredProjection
from projections.errors import Fenced, NotReproducible, SchemaError, TooManyFailures
from projections.exclusions import load_parked, load_skipped
from projections.fold import Plan
from projections.following import code_of, newest_retired, set_ready, take, unfinished
from projections.heads import mark_keepers
from projections.tables import stream
from projections.unit_of_work import Writer

logger = logging.getLogger("eskernel.projector")

T = TypeVar("T")
_REPRODUCE = (
    "Nothing has changed for readers. A handler may use nothing but the event, its Meta and the row: no clock, no "
    "random numbers, no order of a set. Mend it; or set deployment.verify to false to show the tables as they are"
)
LEFT = 1_000
"""Commits that may be left to fold at the cut-over, while queries wait."""


@dataclass(frozen=True, slots=True)
class Course:
    """How generations are built.

    Attributes:
        existing: numbers of generations to go on with, by projection: unfinished ones, or ones that were kept up to
            date. All of them, or none. None: new ones are made.
        verify: fold the log a second time, and compare, before readers see the result.
        show: have readers see the result. Otherwise it is ready, and another course shows it later.
        finished: the existing ones were complete and checked before.
        contested: another process that takes over is no error of the program: `Fenced` says so.
    """

    existing: Mapping[str, int] | None = None
    verify: bool = False
    show: bool = True
    finished: bool = False
    contested: bool = False


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
        limits: at how many aggregates a projection may fail and still be shown; by default as in the settings.
        course: how; by default from the beginning, without a second fold.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        database: Engine | str,
        projections: Sequence[DeclaredProjection],
        progress: Callable[[RebuildProgress], None] = lambda _: None,
        pace: Pace | None = None,
        limits: DeadLetters | None = None,
        course: Course | None = None,
    ) -> None:
        self._pace, self._limits, self._course = pace or unpaced(), limits or DeadLetters(), course or Course()
        self._app, self._log, self._projections, self._progress = app, log, projections, progress
        self._engine = open_database(database) if isinstance(database, str) else database
        self._opened = isinstance(database, str)
        self._plan = Plan(list(app.types.values()), projections, self._engine.dialect, app.transient)
        self._parkings = ParkingLog("while building", projections)
        self._pool = ThreadPoolExecutor(1, "eskernel-rebuild")

    async def run(self) -> list[Rebuilt]:
        """Build, catch up, verify, cut over: all of the projections in the same transaction.

        Raises:
            TooManyFailures: the program fails at so many aggregates that live projection would pause.
            NotReproducible: a second fold of the same log came to other rows.
            DeclarationError: an aggregate's class seems to have been renamed; the copy would be empty.
            Fenced: a generation that was to be gone on with, or is contested, belongs to somebody else now.
            LogError, sqlalchemy.exc.DBAPIError: nothing has changed for anybody. The unfinished copy is removed by the
                next rebuild, or gone on with.
        """
        started = time.perf_counter()
        try:
            if not self._course.finished:
                await find_unknown(self._app, self._log)
            replay = await self._build_generations(started)
        except Fenced:
            if self._course.existing is not None or self._course.contested:
                raise
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
                replay.events,
                replay.at,
                seconds,
                self._parked(index),
            )
            for index, generation in enumerate(replay.writer.generations)
        ]

    def _parked(self, index: int) -> int:
        return sum(index in waiting and not waiting[index].waits for waiting in self._plan.parked.values())

    async def _check_failures(self) -> None:
        for index, declared in enumerate(self._projections):
            failed = {
                key: found[index].error
                for key, found in self._plan.parked.items()
                if index in found and not found[index].waits and not found[index].transient
            }
            if len(failed) < self._limits.pause_minimum:
                continue
            counted = await self._log.count_commits(self._app.types)
            # those without a beginning fail, and may not be in the log
            known = sum(counted[name].aggregates for name in declared.aggregates if name in counted)
            most = max(known, len(failed))
            if len(failed) > self._limits.pause_above * most:
                (aggregate, aggregate_id), why = next(iter(failed.items()))
                raise TooManyFailures(
                    f"{declared.name} fails at {len(failed)} of {most} aggregates, such as {aggregate} "
                    f"{aggregate_id}: {why}. "
                    "Nothing has changed for readers. Mend the program; or, if it is right, set "
                    "dead_letters.pause_above to 1 while it is built"
                )

    async def _build_generations(self, started: float) -> Replay:
        info = await self._log.info()
        made, epoch, start = await self._in(partial(outlast_contention, partial(self._prepare, info.partitions)))
        writer = Writer(self._engine, self._plan, made, epoch=epoch, alone=True)
        total = info.commits
        # what was folded before counts as done
        before = min(start.values(), default=0)

        def report(replay: Replay, phase: str) -> None:
            done = before + replay.commits
            seconds = time.perf_counter() - started
            self._progress(RebuildProgress(done, max(total, done), replay.events, seconds, phase))

        replay = Replay(
            self._log,
            writer,
            info.partitions,
            self._pool,
            self._pace,
            self._parkings.write,
            partial(report, phase="building"),
            start,
        )
        async with reading(self._log, replay.at) as reader:
            behind = info.last - replay.at
            while behind > 0:
                await replay.fill(reader, info.last)
                last, info = behind, await self._log.info()
                total = info.commits
                # a slowed rebuild has much to catch up with: while it gains on the log, before the cut-over
                gap = info.last - replay.at
                behind = gap if LEFT < gap < last else 0
            if not self._course.finished:
                await self._check_failures()
            if self._course.verify and replay.at and not self._course.finished:
                await self._verify(made, started)
                await replay.fill(reader, (await self._log.info()).last)
            if self._course.show:
                await self._cut_over(replay, reader)
            else:
                await self._in(partial(set_ready, self._engine, made))
        return replay

    async def _verify(self, made: Sequence[generations.Generation], started: float) -> None:
        """Fold the log a second time, and compare.

        Raises:
            NotReproducible: it came to other rows.
        """

        def show(progress: RebuildProgress) -> None:
            seconds = time.perf_counter() - started
            self._progress(replace(progress, seconds=seconds, phase="verifying"))

        numbers = {generation.name: generation.number for generation in made}
        verification = Verification(
            self._app, self._log, self._engine, self._projections, show, self._pace, unshown=numbers
        )
        for found in await verification.run():
            for table in found.tables:
                if table.differing:
                    raise NotReproducible(_different(found.projection, table))
            if found.parked:
                first = found.parked[0]
                raise NotReproducible(
                    f"{found.projection}: {first.aggregate} {first.aggregate_id} failed at event {first.sequence} in "
                    f"the second of two folds of the same log only: {first.error}. {_REPRODUCE}"
                )

    def _prepare(self, partitions: int) -> tuple[list[generations.Generation], int, dict[int, int]]:
        """Make the generations, or take those that are to be gone on with; return their epoch and where they stand."""
        with self._engine.begin() as connection:
            # rebuilds that begin at the same moment do this one after the other
            connection.execute(select(stream.c.app).with_for_update())
            adopt(connection, self._app.projections)
            load_skipped(connection, self._plan)
            if self._course.existing is not None:
                made = [
                    generations.generation(declared, self._course.existing[declared.name])
                    for declared in self._projections
                ]
                epoch, start = take(connection, self._app.name, made)
                load_parked(connection, self._plan, made)
                return made, epoch, start
            for declared in self._projections:
                for number in unfinished(connection, declared):
                    generations.drop_generation(connection, declared.name, number)
            types = list(self._app.types.values())
            made = [
                generations.create(
                    connection, declared, range(partitions), code_of(declared, types, self._engine.dialect)
                )
                for declared in self._projections
            ]
            for generation in made:
                generations.check_replaceable(connection, generation)
            mark_keepers(connection, self._app.projections, made, new=True)
            return made, 0, dict.fromkeys(range(partitions), 0)

    async def _cut_over(self, replay: Replay, reader: LogReader) -> None:
        """In one transaction: stop the live generations, show ours instead, and fold what they had beyond ours."""
        connection: Connection = await self._in(self._engine.connect)
        try:
            furthest = await self._take_over(connection, replay, reader)
            # the live projections stand still meanwhile: nothing may slow this
            await replay.fill_within(connection, reader, furthest)
            await self._in(connection.commit)
        finally:
            await self._in(connection.close)

    async def _take_over(self, connection: Connection, replay: Replay, reader: LogReader) -> int:
        """Begin the cut-over's transaction, as often as it takes to have its locks. Return `take_over`'s result."""
        made = replay.writer.generations
        waiting, deadlocks = LockWait(made), 0
        while True:
            try:
                return await self._in(partial(take_over, connection, made, replay.writer.epoch))
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
            if info.last > replay.at:
                await replay.fill(reader, info.last)

    async def _in(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _different(name: str, table: TableComparison) -> str:
    (first, *_) = table.examples
    key = ", ".join(f"{column} {value!r}" for column, value in first.key.items())
    return (
        f"two folds of the same log came to different rows of {name}: {table.differing} of {table.view} differ, such "
        f"as the one with {key or 'no key'} ({', '.join(table.columns) or 'it is there only once'}). {_REPRODUCE}"
    )


def clean_up(
    engine: Engine, declared: DeclaredProjection, keep: int = 1, among: Sequence[int] | None = None
) -> list[int]:
    """Drop retired generations but the newest `keep`; return the numbers of those dropped.

    A generation on which others have built is kept, with a warning. So is the newest one of each version that readers
    do not see: programs that declare it may be running, and it is where a rollback leads to.

    Args:
        among: these instead, whatever their versions are.
    """
    dropped: list[int] = []
    if among is None:
        with reads(engine).connect() as connection:
            retired: list[int] = generations.numbers(connection, declared.name, "retired")
            spared = newest_retired(connection, declared.name)
        among = [number for number in retired[: max(0, len(retired) - keep)] if number not in spared]
    for number in among:
        try:
            with engine.begin() as connection:
                adopt(connection, [declared])
                generations.drop_generation(connection, declared.name, number)
        except SchemaError as error:
            logger.warning("generation %d of %s is kept: %s", number, declared.name, error)
        except DBAPIError as error:
            if not is_locked(error):
                raise
            logger.warning("generation %d of %s is kept until the next start: it is in use", number, declared.name)
        else:
            dropped.append(number)
    return dropped
