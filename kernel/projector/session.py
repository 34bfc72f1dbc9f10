"""Projecting from one claim of the partitions until it ends: read, fold, write rows and checkpoint together.

While one batch is being written by the database's thread, the next is read, decoded and folded. Whatever goes wrong
(a fence, a handler, an odd log) ends the session. The next one begins from the checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from kernel.actors.mailbox import DropRows, Fold, Turn
from kernel.actors.residents import Resident
from kernel.governance.pace import IDLE_S
from kernel.log.base import CommitBatch, LogReader, Stored
from kernel.log.subjects import Address
from kernel.projector.context import ProjectorContext
from kernel.projector.grouping import Group, Sorter, batch_of
from kernel.projector.parking import log_resumed, stored_commit
from kernel.projector.pausing import ProjectionPaused
from kernel.projector.progress import Hand
from kernel.projector.reading import read_batch
from kernel.telemetry.metrics import (
    BATCH_EVENTS,
    ERRORS,
    EVENTS,
    FOLD_SECONDS,
    LOG_EVENTS,
    PARKINGS,
    POSITION,
    ROWS,
)
from projections import exclusions
from projections.checkpoints import ABSENT, Claim, Move, claim, is_followed, read_epochs
from projections.database import reads
from projections.errors import Fenced, HandlerFailed
from projections.fold import Folded
from projections.generations import PAUSED
from projections.keyed import RowsWait
from projections.unit_of_work import Unreadable, Write, Writer
from projections.waiting import fold_postponed

logger = logging.getLogger("eskernel.projector")
T = TypeVar("T")

SLICE = 400
"""Aggregates folded before the event loop gets a turn."""


@dataclass(slots=True)
class _UnderWay:
    """A write under way, what it will have moved, and what is to be said of it: not before it is committed."""

    task: asyncio.Future[list[HandlerFailed]]
    residents: list[Resident]
    groups: list[Group]
    events: int
    position: int
    hand: Hand
    failures: list[HandlerFailed]
    quarantined: list[tuple[int, str, str]]


class Session:
    """One claim of some partitions, and the work on them. Made by `claim`; `end` must be called.

    Args:
        writer: writes batches under the claim's epoch.
    """

    def __init__(self, context: ProjectorContext, claimed: Claim, writer: Writer) -> None:
        self._context, self._plan, self._progress = context, context.plan, context.progress
        self._claimed = claimed
        self._position = claimed.position
        self._writer = writer
        self._sorter = Sorter(
            context.log.subjects,
            context.app.types,
            claimed.position,
            len(context.app.projections),
            self._quarantine,
            context.unknown.note,
            context.plan,
        )
        self._under_way: _UnderWay | None = None
        self._batch: list[Stored] = []
        self._garbage: list[dict[str, Any]] = []
        self._quarantined: list[tuple[int, str, str]] = []
        self._read_to = claimed.position.lowest

    @classmethod
    async def claim(
        cls, context: ProjectorContext, partitions: frozenset[int], shares: Mapping[str, frozenset[int]]
    ) -> Self:
        """Claim the partitions of the generations as they are now, fencing their previous owner.

        Args:
            partitions: those of each projection.
            shares: those of some projections instead, by name.
        """
        app, letters = context.app, context.settings.dead_letters
        claimed: Claim = await context.read(
            lambda: claim(context.engine, app.name, app.projections, partitions, shares)
        )
        retry_after = letters.retry_after if letters.retries else 0.0
        writer = Writer(
            context.engine, context.plan, claimed.generations, claimed.epoch, retry_after, absent=claimed.absent
        )
        owned = claimed.position.owned

        def load_parked() -> None:
            with reads(context.engine).connect() as connection:
                exclusions.load_parked(connection, context.plan, claimed.generations)
                if context.plan.routers:
                    # an event that a person has skipped may not have been reached by all owners of rows
                    exclusions.load_skipped(connection, context.plan)

        log_resumed(await context.read(lambda: fold_postponed(writer, owned, claimed.position)))
        await context.read(load_parked)
        claimed.position.pause(context.pauses.paused)
        context.progress.begin(claimed.position, owned)
        return cls(context, claimed, writer)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to project: nothing is built yet, or a person has paused everything."""
        return not self._claimed.position.owned

    async def run(self) -> None:
        """Project until interrupted; then conclude what is under way."""
        interrupted, progress = self._context.interrupted, self._progress
        reader = await self._context.log.read(self._position.lowest, live=True)
        try:
            last_quiet = time.monotonic()
            while not interrupted.is_set():
                batch = await self._next(reader)
                if batch.commits:
                    await self._project(batch)
                    reader.acknowledge(progress.projected)
                    # what arrived meanwhile is the next batch: under load batches grow by themselves
                    await asyncio.sleep(0)
                if not batch.commits or time.monotonic() - last_quiet > IDLE_S:
                    await self._settle()
                    await self._advance_quiet()
                    reader.acknowledge(progress.projected)
                    self._context.running()
                    self._context.parkings.sum_up()
                    await self._notice_resume()
                    last_quiet = time.monotonic()
            await self._settle()
            await self._advance_quiet()
            reader.acknowledge(progress.projected)
        finally:
            await reader.close()

    async def _notice_resume(self) -> None:
        """Begin again if a paused projection has been fenced, as `eskernel projections resume` does."""
        engine, position, made = self._context.engine, self._position, self._writer.generations
        for index in sorted(self._context.pauses.paused - self._claimed.absent):
            own = position.of(index).keys()
            epochs = await self._context.read(partial(read_epochs, engine, [made[index]], own))
            if epochs - {self._writer.epoch}:
                self._context.pauses.resume()
                raise Fenced("a paused projection was resumed")
        await self.notice_resume_by_person()

    async def notice_resume_by_person(self) -> None:
        """Begin again if a projection is no longer paused that a person had paused, or has tables by now.

        Another process may have built them, as `eskernel rebuild` does.
        """
        engine, partitions = self._context.engine, range(self._context.log.subjects.partitions)
        for index in sorted(self._claimed.absent):
            made = self._writer.generations[index]
            if made.number == ABSENT:
                if await self._context.read(partial(is_followed, engine, made.projection)):
                    raise Fenced(f"{made.name} has been built meanwhile")
                continue
            if PAUSED not in await self._context.read(partial(read_epochs, engine, [made], partitions)):
                raise Fenced("a paused projection was resumed")

    async def end(self) -> None:
        """Wait for the write under way to end or fail, and forget folded rows."""
        try:
            await self._settle()
        except Exception as error:
            logger.info("the write under way ended with: %s", str(error).splitlines()[0])
        self._drop_rows(self._context.residents.all())
        self._context.parkings.sum_up(at_once=True)

    async def _next(self, reader: LogReader) -> CommitBatch:
        """Wait for commits, but not past an interruption; meanwhile conclude the write under way."""
        context = self._context
        reading = asyncio.ensure_future(read_batch(reader, context.settings.batch, context.pace))
        stopping = asyncio.ensure_future(context.interrupted.wait())
        try:
            while not reading.done() and not stopping.done():
                waiting: set[asyncio.Future[Any]] = {reading, stopping}
                if self._under_way is not None:
                    waiting.add(self._under_way.task)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._under_way is not None and self._under_way.task.done():
                    await self._settle()
                    reader.acknowledge(self._progress.projected)
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
        self._context.pace.spend(sum(len(group.commits) for group in groups))
        self._batch = batch.commits
        hand = self._progress.read(groups, batch)
        if self._plan.routers:
            # an aggregate without a row is woken for nothing, unless its actor has to learn of others' commits
            keepers, find = self._plan.keepers, self._context.residents.find
            groups = [group for group in groups if group.address.aggregate in keepers or find(group.address.subject)]
            groups += await self._route()
        moves = self._position.moves(self._writer.generations, batch.commits[-1].sequence)
        if not groups and not moves and not self._garbage:
            self._read_to = batch.commits[-1].sequence
            self._progress.written(hand)
            return
        began = time.time_ns()
        residents = self._context.residents.wake([group.address for group in groups])
        for resident in residents:
            resident.busy += 1  # from here until it is written
        try:
            folded, write = await self._fold(groups, residents, moves)
            failures = {(failure.aggregate, failure.projection): failure for failure in folded.failures}
            FOLD_SECONDS.observe(time.perf_counter() - arrived)
            for index, count in folded.written().items():
                ROWS.labels(projection=self._name(index)).inc(count)
            parked = {failure.aggregate for failure in await self._settle()}
            if not parked.isdisjoint(key for key, _, _ in write.batch):
                # they were folded from records that are not in the database
                self._drop_rows(residents)
                folded, write = await self._fold(groups, residents, moves)
                failures |= {(failure.aggregate, failure.projection): failure for failure in folded.failures}
            write.letters += self._garbage
            self._garbage = []
        except BaseException:
            for resident in residents:
                resident.busy -= 1
            raise
        self._position.advance(moves, self._writer.generations)
        self._read_to = batch.commits[-1].sequence
        self._writer.park_suspects(write)
        writing = self._context.committer.write(self._writer, write)
        task = asyncio.ensure_future(self._context.tracing.projecting(writing, groups, began))
        self._under_way = _UnderWay(
            task, residents, groups, folded.count, self._read_to, hand, [*failures.values()], self._quarantined
        )
        self._quarantined = []

    async def _route(self) -> list[Group]:
        """Return the rows with keys of their own that the batch belongs to."""
        try:
            return await self._sorter.route()
        except RowsWait as wait:
            self._context.pauses.wait(wait.projection, str(wait))
            raise ProjectionPaused from wait

    async def _fold(self, groups: list[Group], residents: list[Resident], moves: list[Move]) -> tuple[Folded, Write]:
        """Have the actors fold their commits; give the loop a turn between slices."""
        context, turn = self._context, Turn(self._plan, Folded(self._plan))
        asleep = [resident.address for resident in residents if not resident.has_rows]
        stored, unreadable = await self._load_rows(asleep)
        first = {group.key: group.commits[0][1][0] for group in reversed(groups)} if unreadable else {}
        for row in unreadable:
            failure = HandlerFailed(row.index, row.aggregate, first[row.aggregate].sequence, row.error)
            self._plan.park(failure)
            turn.folded.failures.append(failure)
        for start in range(0, len(groups), SLICE):
            messages = []
            for group, resident in zip(groups[start : start + SLICE], residents[start : start + SLICE], strict=True):
                rows = kept = None
                if not resident.has_rows:
                    rows, kept = stored[group.address.subject]
                    resident.has_rows = True
                messages.append((resident.actor, Fold(group.address, turn, group.commits, rows, group.skip, kept)))
            self._context.residents.actors.send(messages)
            if start:
                await asyncio.sleep(0)
        for failure, made in self._sorter.left_out:
            turn.folded.failures.append(failure)
            turn.folded.letters.append(made)
        if context.pauses.note(groups, turn.folded.failures):
            raise ProjectionPaused
        # the next batch may be at work when the database refuses something of this one
        letter = partial(stored_commit, commits=self._batch, subjects=self._context.log.subjects)
        return turn.folded, self._writer.freeze(turn.folded, moves, letter, batch_of(groups))

    async def _load_rows(
        self, addresses: list[Address]
    ) -> tuple[dict[str, tuple[list[Any], int | None]], list[Unreadable]]:
        """Load the stored rows of aggregates that wake up, one SELECT for all of them and each projection.

        Where there are none, the sequence of the last event is kept beside them.
        """
        by_aggregate: dict[str, dict[str, str]] = {}
        for address in addresses:
            by_aggregate.setdefault(address.aggregate, {})[address.id] = address.subject

        def load() -> tuple[dict[str, tuple[list[Any], int | None]], list[Unreadable]]:
            found: dict[str, tuple[list[Any], int | None]] = {}
            unreadable: list[Unreadable] = []
            with reads(self._context.engine).connect() as connection:
                for aggregate, subjects in by_aggregate.items():
                    rows, odd = self._writer.load_rows(connection, aggregate, list(subjects))
                    unreadable += odd
                    kept = self._writer.load_kept(connection, aggregate, rows)
                    for aggregate_id, records in rows.items():
                        found[subjects[aggregate_id]] = records, kept.get(aggregate_id)
            return found, unreadable

        return await self._context.read(load)

    def _drop_rows(self, residents: list[Resident]) -> None:
        drop = DropRows()
        self._context.residents.actors.send([(resident.actor, drop) for resident in residents])
        for resident in residents:
            resident.has_rows = False

    def _quarantine(self, sequence: int, subject: str, partition: int, payload: bytes, why: str) -> None:
        """Keep bytes that are no commit of this app; they concern no projection in particular."""
        self._quarantined.append((sequence, subject, why))
        self._garbage.append(self._writer.garbage(sequence, subject, partition, payload, why))

    async def _settle(self) -> list[HandlerFailed]:
        """Wait for the write under way. Return the aggregates that it parked."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return []
        try:
            parked = await under_way.task
        finally:
            for resident in under_way.residents:
                resident.busy -= 1
        for sequence, subject, why in under_way.quarantined:
            logger.error("quarantined stream sequence %d (%s): %s", sequence, subject, why)
        for failure in parked:
            self._plan.park(failure)
        self._note_parked([*under_way.failures, *parked], under_way.groups)
        paused = self._context.pauses.note((), parked)
        if parked:
            keys = {failure.aggregate for failure in parked}
            named = zip(under_way.residents, under_way.groups, strict=True)
            self._drop_rows([resident for resident, group in named if group.key in keys])
        self._progress.projected = under_way.position
        self._progress.written(under_way.hand)
        EVENTS.inc(under_way.events)
        BATCH_EVENTS.observe(under_way.events)
        POSITION.set(self._progress.projected)
        if paused:
            raise ProjectionPaused
        return parked

    async def _advance_quiet(self) -> None:
        """Move up the checkpoints of partitions without news, so that the next start need not read that far back."""
        moves = self._position.quiet_moves(self._writer.generations, self._read_to)
        if moves:
            write = Write(moves)
            self._position.advance(moves, self._writer.generations)
            await self._context.committer.write(self._writer, write)
        self._progress.projected = max(self._progress.projected, self._read_to)

    def _name(self, index: int) -> str:
        return self._context.app.projections[index].name if index >= 0 else "every projection"

    def _note_parked(self, failures: list[HandlerFailed], groups: list[Group]) -> None:
        self._context.parkings.write(failures, lambda: ((group.key, group.commits) for group in groups))
        for failure in failures:
            PARKINGS.labels(reason=failure.kind).inc()
        if failures:
            ERRORS.labels(kind="handler").inc(len(failures))
