"""Live projection: reads the log, has actors fold, writes rows and checkpoint together.

While one batch is being written by the database's thread, the next is read, decoded and folded. Whatever goes wrong
(a fence, a handler, an odd log) ends in the same place: forget the folded rows and start again from the checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from sqlalchemy import Engine

from kernel.actors.mailbox import DropRows, Fold, Turn
from kernel.actors.residents import Resident, Residents
from kernel.actors.system import Actors
from kernel.app import App
from kernel.errors import LogError
from kernel.governance.pace import IDLE_S, Pace, unpaced
from kernel.log.base import CommitBatch, EventLog, LogReader, Stored
from kernel.log.subjects import Address, Subjects
from kernel.projector.committer import AWAY, Committer
from kernel.projector.grouping import Group, Sorter, batch_of
from kernel.projector.parking import say_parked
from kernel.projector.progress import Hand, ReadProgress
from kernel.projector.reading import read_batch
from kernel.settings import Settings
from kernel.telemetry.metrics import (
    BATCH_EVENTS,
    ERRORS,
    EVENTS,
    FENCED,
    FOLD_SECONDS,
    LOG_EVENTS,
    PARKINGS,
    POSITION,
    ROWS,
)
from kernel.telemetry.tracing import NO_TRACING, Tracer
from projections.checkpoints import Claim, Move, Position, claim
from projections.database import is_infrastructure, reads
from projections.errors import Fenced, HandlerFailed
from projections.fold import Folded, Letter
from projections.unit_of_work import Write, Writer

logger = logging.getLogger("eskernel.projector")
T = TypeVar("T")

SLICE = 400
"""Aggregates folded before the event loop gets a turn."""
NO_PARTITIONS = "waiting for partitions"


@dataclass(slots=True)
class _Pending:
    """A write under way, and what it will have moved."""

    task: asyncio.Future[None]
    residents: list[Resident]
    groups: list[Group]
    events: int
    position: int
    hand: Hand


class Projector:
    """Keeps the live projections of an app up to date.

    It works on the partitions that it was given with `own`, and reads the whole log for them: passing over what is
    another worker's costs less than a filter does on the server.

    Args:
        holds: says whether a partition is still ours, as far as can be known without asking.
        verify: called when the fence was met: makes sure of what is still ours, and calls `own` if that has changed.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        subjects: Subjects,
        engine: Engine,
        actors: Actors,
        residents: Residents,
        holds: Callable[[int], bool],
        verify: Callable[[], Coroutine[Any, Any, None]],
        settings: Settings | None = None,
        pace: Pace | None = None,
        tracing: Tracer = NO_TRACING,
    ) -> None:
        settings = settings or Settings()
        self._pace = pace or unpaced()
        self._app, self._log, self._subjects, self._engine = app, log, subjects, engine
        self._actors, self._residents, self._verify = actors, residents, verify
        self._holds, self._tracing = holds, tracing
        letters = settings.dead_letters
        self._retry_after = letters.retry_after if letters.retries else 0.0
        self._max = settings.batch
        self._plan = app.plan()
        self._position: Position
        self._writer: Writer
        self._sorter: Sorter
        self._pending: _Pending | None = None
        self._read_pool = ThreadPoolExecutor(1, "eskernel-read")
        self._stopping = False
        self._wanted: frozenset[int] = frozenset()
        self._owned: frozenset[int] = frozenset()
        # set while the session at work is to end: for a stop, or for other partitions
        self._interrupted = asyncio.Event()
        self.committer = Committer(settings.consumer.backoff, self._interrupted, self._say)
        self._idle = asyncio.Event()
        self._idle.set()
        self._batch: list[Stored] = []
        # found when a batch was written, and not yet in the dead letters
        self._failures: list[HandlerFailed] = []
        self._garbage: list[dict[str, Any]] = []
        self._read_to = 0
        self.progress = ReadProgress(subjects.partitions)
        self.position = 0
        self.state = "starting"

    def own(self, partitions: frozenset[int]) -> None:
        """From now on, work on these partitions; what is under way for others is written or given up first."""
        if partitions != self._wanted:
            if not self._wanted:
                self.state = "starting"
            self._wanted = partitions
            self._interrupted.set()

    async def let_go(self) -> None:
        """Wait until nothing is under way for partitions that were taken away with `own`."""
        while self._owned - self._wanted:
            self._idle.clear()
            await self._idle.wait()

    async def run(self) -> None:
        """Project until `stop`; come back from every failure that time can mend."""
        failures = 0
        while not self._stopping:
            self._interrupted.clear()
            # to claim what may be another's by now would stop it for a moment
            self._owned = frozenset(filter(self._holds, self._wanted))
            self._idle.set()
            if not self._owned:
                self.state = NO_PARTITIONS
                await self._interrupted.wait()
                continue
            began_at = self.position
            try:
                await self._claim()
                await self._session()
            except HandlerFailed as error:
                logger.info("projection goes on from its checkpoints: %s", error)
            except Fenced as error:
                logger.info("projection goes on from its checkpoints (a rebuild, or another worker): %s", error)
                FENCED.inc()
                await self._verify()
            except LogError as error:
                logger.warning("projection waits for the log: %s", error)
                self.state = f"waiting for the log: {error}"
            except Exception as error:
                if is_infrastructure(error):
                    logger.warning("projection waits for the database: %s", str(error).splitlines()[0])
                    self.state = AWAY
                else:
                    logger.exception("projection failed; it will be tried again")
                    self.state = f"failing: {type(error).__name__}: {error}"
            finally:
                await self._abandon()
            if not self._interrupted.is_set():
                failures = failures + 1 if self.position == began_at else 1
                await self.committer.rest(failures)
        self._owned = frozenset()
        self._idle.set()

    async def _claim(self) -> None:
        """Take our partitions of the live generations as they are now, fencing whoever had them."""
        app, partitions = self._app, self._owned
        claimed: Claim = await self._in(
            self._read_pool, lambda: claim(self._engine, app.name, app.projections, partitions)
        )
        self._position = claimed.position
        self._writer = Writer(self._engine, self._plan, claimed.generations, claimed.epoch, self._retry_after)
        self._sorter = Sorter(
            self._subjects, app.types, partitions, self._position, len(app.projections), self._quarantine
        )

        def load_parked() -> None:
            with reads(self._engine).connect() as connection:
                self._writer.load_parked(connection)

        await self._in(self._read_pool, load_parked)
        for failure in self._failures:
            self._plan.park(failure)
        self.progress.begin(self._position, partitions)

    async def _session(self) -> None:
        reader = await self._log.read(self._position.lowest, live=True)
        try:
            self._read_to = self._position.lowest
            last_quiet = time.monotonic()
            while not self._interrupted.is_set():
                batch = await self._next(reader)
                if batch.commits:
                    await self._project(batch)
                    reader.acknowledge(self.position)
                    # what arrived meanwhile is the next batch: under load batches grow by themselves
                    await asyncio.sleep(0)
                if not batch.commits or time.monotonic() - last_quiet > IDLE_S:
                    await self._settle()
                    await self._advance_quiet()
                    reader.acknowledge(self.position)
                    self.state = "running"
                    last_quiet = time.monotonic()
            await self._settle()
            await self._advance_quiet()
        finally:
            await reader.close()

    async def _next(self, reader: LogReader) -> CommitBatch:
        """Wait for commits, but not past an interruption; meanwhile conclude the write under way."""
        reading = asyncio.ensure_future(read_batch(reader, self._max, self._pace))
        stopping = asyncio.ensure_future(self._interrupted.wait())
        try:
            while not reading.done() and not stopping.done():
                waiting: set[asyncio.Future[Any]] = {reading, stopping}
                if self._pending is not None:
                    waiting.add(self._pending.task)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._pending is not None and self._pending.task.done():
                    await self._settle()
                    reader.acknowledge(self.position)
            return reading.result() if reading.done() else CommitBatch([], 0)
        finally:
            stopping.cancel()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})

    async def _project(self, batch: CommitBatch) -> None:
        """Fold one batch and hand it to the database, behind the one being written."""
        arrived = time.perf_counter()
        LOG_EVENTS.inc(len(batch.commits))
        groups = await self._sorter.sort(batch.commits)
        self._pace.spend(sum(len(group.commits) for group in groups))
        self._batch = batch.commits
        hand = self.progress.read(groups, batch)
        moves = self._position.moves(self._writer.generations, batch.commits[-1].sequence)
        if not groups and not moves and not self._garbage:
            self._read_to = batch.commits[-1].sequence
            self.progress.written(hand)
            return
        began = time.time_ns()
        residents = self._residents.wake([group.address for group in groups])
        for resident in residents:
            resident.busy += 1  # from here until it is written
        try:
            folded, write = await self._fold_or_park(groups, residents, moves)
            FOLD_SECONDS.observe(time.perf_counter() - arrived)
            for index, count in folded.written().items():
                ROWS.labels(projection=self._name(index)).inc(count)
            write.letters += self._garbage
            self._garbage = []
            await self._settle()
        except BaseException:
            for resident in residents:
                resident.busy -= 1
            raise
        self._position.advance(moves, self._writer.generations)
        self._read_to = batch.commits[-1].sequence
        writing = self.committer.write(self._writer, write)
        task = asyncio.ensure_future(self._tracing.projecting(writing, groups, began))
        self._pending = _Pending(task, residents, groups, folded.count, self._read_to, hand)

    async def _fold_or_park(
        self, groups: list[Group], residents: list[Resident], moves: list[Move]
    ) -> tuple[Folded, Write]:
        """Fold the batch; when a handler fails, park its aggregate and fold all of it again from stored rows."""
        while True:
            turn = await self._fold(groups, residents)
            failure = turn.failure
            if failure is None:
                try:
                    return turn.folded, self._writer.freeze(turn.folded, moves, self._letter)
                except HandlerFailed as refused:
                    failure = self._writer.blame(refused, batch_of(groups))
            self._say_parked(failure, groups)
            await self._settle()
            self._plan.park(failure)
            self._drop_rows(residents)

    async def _fold(self, groups: list[Group], residents: list[Resident]) -> Turn:
        """Have the actors fold their commits; give the loop a turn between slices."""
        turn = Turn(self._plan, Folded(self._plan))
        asleep = [resident.address for resident in residents if not resident.has_rows]
        stored = await self._load_rows(asleep)
        for start in range(0, len(groups), SLICE):
            messages = []
            for group, resident in zip(groups[start : start + SLICE], residents[start : start + SLICE], strict=True):
                rows = kept = None
                if not resident.has_rows:
                    rows, kept = stored[group.address.subject]
                    resident.has_rows = True
                messages.append((resident.actor, Fold(group.address, turn, group.commits, rows, group.skip, kept)))
            self._actors.send(messages)
            if start:
                await asyncio.sleep(0)
        return turn

    async def _load_rows(self, addresses: list[Address]) -> dict[str, tuple[list[Any], int | None]]:
        """Load the stored rows of aggregates that wake up, one SELECT for all of them and each projection.

        Where there are none, the sequence of the last event is kept beside them.
        """
        by_aggregate: dict[str, dict[str, str]] = {}
        for address in addresses:
            by_aggregate.setdefault(address.aggregate, {})[address.id] = address.subject

        def load() -> dict[str, tuple[list[Any], int | None]]:
            found: dict[str, tuple[list[Any], int | None]] = {}
            with reads(self._engine).connect() as connection:
                for aggregate, subjects in by_aggregate.items():
                    rows = self._writer.load_rows(connection, aggregate, list(subjects))
                    kept = self._writer.load_kept(connection, aggregate, rows)
                    found.update((subjects[one], (records, kept.get(one))) for one, records in rows.items())
            return found

        return await self._in(self._read_pool, load)

    def _drop_rows(self, residents: list[Resident]) -> None:
        drop = DropRows()
        self._actors.send([(resident.actor, drop) for resident in residents])
        for resident in residents:
            resident.has_rows = False

    def _letter(self, letter: Letter) -> tuple[int, bytes]:
        partition = self._subjects.address(*letter.aggregate).partition
        place = bisect_left(self._batch, letter.stream_sequence, key=attrgetter("sequence"))
        return partition, self._batch[place].payload

    def _quarantine(self, sequence: int, subject: str, partition: int, payload: bytes, why: str) -> None:
        """Keep bytes that are no commit of this app; they concern no projection in particular."""
        logger.error("quarantined stream sequence %d (%s): %s", sequence, subject, why)
        self._garbage.append(self._writer.garbage(sequence, subject, partition, payload, why))

    def _say(self, state: str) -> None:
        self.state = state

    async def _settle(self) -> None:
        """Wait for the write under way."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            await pending.task
        except HandlerFailed as failure:
            self._say_parked(failure, pending.groups)
            self._failures.append(self._writer.blame(failure, batch_of(pending.groups)))
            raise
        finally:
            for resident in pending.residents:
                resident.busy -= 1
        self._failures.clear()
        self.position = pending.position
        self.progress.written(pending.hand)
        EVENTS.inc(pending.events)
        BATCH_EVENTS.observe(pending.events)
        POSITION.set(self.position)

    async def _advance_quiet(self) -> None:
        """Move up the checkpoints of partitions without news, so that the next start need not read that far back."""
        moves = self._position.quiet_moves(self._writer.generations, self._read_to)
        if moves:
            write = Write(moves)
            self._position.advance(moves, self._writer.generations)
            await self.committer.write(self._writer, write)
        self.position = max(self.position, self._read_to)

    async def _abandon(self) -> None:
        """End a session: wait for the write under way, whatever became of it, and forget folded rows."""
        try:
            await self._settle()
        except Exception as error:
            logger.info("the write under way ended with: %s", str(error).splitlines()[0])
        self._garbage = []
        self._drop_rows(self._residents.all())

    def _name(self, index: int) -> str:
        return self._app.projections[index].name if index >= 0 else "every projection"

    def _say_parked(self, failure: HandlerFailed, groups: list[Group]) -> None:
        say_parked("for", failure, self._app.projections, batch_of(groups))
        PARKINGS.labels(reason=failure.kind).inc()
        ERRORS.labels(kind="handler").inc()

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def stop(self) -> None:
        """Finish the batch under way and stop."""
        self._stopping = True
        self._interrupted.set()

    def close(self) -> None:
        """Let go of the threads."""
        self.committer.close()
        self._read_pool.shutdown(wait=False, cancel_futures=True)
