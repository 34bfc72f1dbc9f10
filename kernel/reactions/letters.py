"""The dead letters of policies and effects: events whose turn comes again, in order, when their cause is gone."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Engine, Row, delete, func, insert, select, update

from aggregates import InvalidMessage
from aggregates.commit import decode
from aggregates.errors import NewerEvent
from aggregates.reacting import DeclaredReaction
from kernel.log.subjects import Address, Subjects
from kernel.reactions import store
from kernel.reactions.context import ReactorContext
from kernel.reactions.store import NUMBER, letters_of
from kernel.reactions.work import Failed, Task, Worker
from kernel.settings import DeadLetters
from kernel.telemetry.metrics import RETRIES
from projections.contention import outlast_contention
from projections.database import is_infrastructure, reads
from projections.dead_letters import MAX_PAUSE_S
from projections.errors import NoSuchLetter
from projections.generations import FENCE, PAUSED, lock_checkpoints
from projections.parked import Key
from projections.stored_letters import envelope_of
from projections.tables import checkpoint, dead_letter, skipped_letter
from projections.unit_of_work import one_line

logger = logging.getLogger("eskernel.reactions")
AT_ONCE = 100
"""Dead letters of an aggregate that are read at a time."""
LOOK_S = 1.0
"""Between two looks for dead letters whose turn has come."""
BEHIND = "waits for an event before it"
"""Error of a dead letter that was not tried."""
Job = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Parking:
    """The aggregates whose events wait behind a dead letter, for one policy or effect.

    Attributes:
        waiting: those of them that wait for a newer program, and have not failed.
        unwritten: dead letters of an aggregate that are not in the database yet.
        written: set whenever a batch was written.
    """

    parked: set[Key]
    waiting: set[Key]
    unwritten: Counter[Key] = field(default_factory=Counter)
    written: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_write(self) -> None:
        """Wait until another batch is written."""
        self.written.clear()
        await self.written.wait()


def next_attempt(settings: DeadLetters, attempts: int, now: float) -> float | None:
    """Return when an event that has failed so often is tried again, in Unix time; None if an operator has to look."""
    if attempts > settings.retries:
        return None
    return now + min(settings.retry_after * float(2 ** (attempts - 1)), MAX_PAUSE_S)


class LetterRetries:
    """Has events that wait for it tried again, with growing pauses.

    Args:
        queue: has a job done when it is an aggregate's turn; later events of the aggregate wait behind it.
        slots: how many events may be worked on at once.
    """

    def __init__(
        self,
        context: ReactorContext,
        declared: DeclaredReaction,
        worker: Worker,
        parking: Parking,
        queue: Callable[[Key, Job], None],
        slots: asyncio.Semaphore,
    ) -> None:
        self._context, self._declared, self._worker, self._parking = context, declared, worker, parking
        self._queue, self._slots = queue, slots
        self._trying: set[Key] = set()

    async def run(self, partitions: Collection[int], epoch: int) -> None:
        """Look for what is due, again and again.

        Raises:
            projections.Fenced: the partitions have another owner by now, or a person has paused or changed something.
        """
        due = set(self._parking.waiting)  # perhaps this program can read it
        while True:
            for key in due - self._trying:
                self._trying.add(key)
                self._queue(key, partial(self._retry, key, epoch))
            await asyncio.sleep(LOOK_S)
            try:
                due = await self._context.run(partial(self._find_retries, partitions, epoch))
            except Exception as error:
                if not is_infrastructure(error):
                    raise
                due = set()  # to begin again would mean to do again what is under way

    def _find_retries(self, partitions: Collection[int], epoch: int) -> set[Key]:
        engine, name = self._context.engine, self._declared.name
        store.check_owner(engine, name, epoch, partitions)
        return _find_due(engine, name, partitions, self._context.now()) if self._parking.parked else set()

    async def _retry(self, key: Key, epoch: int) -> None:
        try:
            while await self._try_all(key, epoch):
                pass
        finally:
            self._trying.discard(key)

    async def _try_all(self, key: Key, epoch: int) -> bool:
        """Try the dead letters of an aggregate in order; return whether there may be more."""
        rows = await self._context.run(partial(_load, self._context.engine, self._declared.name, key))
        rejected: store.Rejections = {}
        if rows and self._declared.kind == "policy":
            # the claim has loaded those beyond the checkpoints only
            sequences = {row.stream_sequence for row in rows}
            known = partial(store.read_rejected, self._context.engine, self._declared.name, sequences)
            rejected = await self._context.run(known)
        for place, row in enumerate(rows):
            if not await self._try(row, key, epoch, rejected, first=place == 0):
                return False
        if rows:
            return True
        if self._parking.unwritten[key]:
            await self._parking.wait_for_write()
            return True
        self._parking.parked.discard(key)
        self._parking.waiting.discard(key)
        logger.info("%s goes on with %s %s", self._declared.name, *key)
        return False

    async def _try(self, row: Row[Any], key: Key, epoch: int, rejected: store.Rejections, *, first: bool) -> bool:
        """Try one event again; return whether it is done."""
        engine, now = self._context.engine, self._context.now()
        try:
            task = self._task_of(row, key)
            if not self._reacts_no_more(task):
                self._worker.prepare(task)
                task.rejected = rejected.get(task.envelope.id, {})
                async with self._slots:
                    await self._worker.perform(task)
        except (NewerEvent, InvalidMessage, Failed) as problem:
            waits = isinstance(problem, NewerEvent)
            attempts = 0 if waits else (row.attempts if first else 0) + 1
            transient = isinstance(problem, Failed) and problem.transient
            again = next_attempt(self._context.settings.dead_letters, attempts, now) if transient else None
            await self._context.run(partial(_note, engine, row, epoch, attempts, again, str(problem)))
            RETRIES.labels(outcome="failed").inc()
            return False
        await self._context.run(partial(_remove, engine, row, epoch, task.timers))
        RETRIES.labels(outcome="ok").inc()
        return True

    def _task_of(self, row: Row[Any], key: Key) -> Task:
        envelope = envelope_of(row)
        number = row.sequence - decode(row.payload)[0].sequence + 1
        subjects: Subjects = self._context.log.subjects
        address: Address = subjects.address(*key)
        handler = self._declared.handlers.get(key[0], {}).get(envelope.type)
        return Task(address, row.stream_sequence, number, envelope, handler)

    def _reacts_no_more(self, task: Task) -> bool:
        """Return whether this program knows the event and owes nothing for it, unlike an earlier one perhaps."""
        declared = self._declared.types.get(task.address.aggregate)
        return task.handler is None and (declared is None or task.envelope.type in declared.events)


def _find_due(engine: Engine, name: str, partitions: Collection[int], now: float) -> set[Key]:
    with reads(engine).connect() as connection:
        planned = dead_letter.c.next_attempt
        rows = connection.execute(
            select(dead_letter.c.aggregate, dead_letter.c.aggregate_id).where(
                *letters_of(name),
                dead_letter.c.partition.in_(sorted(partitions)),
                # planned too far away: the clock has been set back
                (planned <= now) | (planned > now + 2 * MAX_PAUSE_S),
            )
        )
        return {(row.aggregate, row.aggregate_id) for row in rows}


def _load(engine: Engine, name: str, key: Key) -> Sequence[Row[Any]]:
    with reads(engine).connect() as connection:
        return connection.execute(_in_order(name, key).limit(AT_ONCE)).all()


def _in_order(name: str, key: Key) -> Any:
    own = dead_letter.c.aggregate == key[0], dead_letter.c.aggregate_id == key[1]
    return (
        select(dead_letter)
        .where(*letters_of(name), *own)
        .order_by(dead_letter.c.stream_sequence, dead_letter.c.sequence)
    )


def _note(engine: Engine, row: Row[Any], epoch: int, attempts: int, again: float | None, error: str) -> None:
    def note() -> None:
        with engine.begin() as connection:
            store.check_epoch(connection, row.projection, epoch, row.partition)
            connection.execute(
                update(dead_letter)
                .where(dead_letter.c.id == row.id)
                .values(attempts=attempts, next_attempt=again, error=one_line(error), failed=_now())
            )
            # all letters of an aggregate have attempts, or none has: it waits for a newer program
            others = dead_letter.c.aggregate == row.aggregate, dead_letter.c.aggregate_id == row.aggregate_id
            behind = update(dead_letter).where(*letters_of(row.projection), *others, dead_letter.c.id != row.id)
            connection.execute(
                behind.where(dead_letter.c.attempts != min(attempts, 1)).values(attempts=min(attempts, 1))
            )

    outlast_contention(note)


def _remove(engine: Engine, row: Row[Any], epoch: int, timers: list[dict[str, Any]]) -> None:
    def remove() -> None:
        with engine.begin() as connection:
            store.check_epoch(connection, row.projection, epoch, row.partition)
            connection.execute(delete(dead_letter).where(dead_letter.c.id == row.id))
            store.set_timers(connection, row.projection, timers)

    outlast_contention(remove)


def ask_again(engine: Engine, name: str, aggregate: str, aggregate_id: str) -> int:
    """Have the owner of an aggregate's partition try its dead letters again at once. Return how many there are."""
    with engine.begin() as connection:
        own = dead_letter.c.aggregate == aggregate, dead_letter.c.aggregate_id == aggregate_id
        number = connection.scalar(select(func.count()).select_from(dead_letter).where(*letters_of(name), *own))
        first = connection.execute(_in_order(name, (aggregate, aggregate_id)).limit(1)).first()
        if first is not None:
            connection.execute(update(dead_letter).where(dead_letter.c.id == first.id).values(next_attempt=0.0))
        return int(number or 0)


def skip(engine: Engine, name: str, aggregate: str, aggregate_id: str, who: str, reason: str) -> int:
    """Skip the first dead letter of an aggregate for good, and record who did it and why. Return its sequence.

    Later events of the aggregate go on waiting, until they are tried again.

    Raises:
        projections.NoSuchLetter: there is none.
    """

    def attempt() -> int:
        with engine.begin() as connection:
            lock_checkpoints(connection, name, NUMBER)  # its worker, or another person, may be done with it first
            row = connection.execute(_in_order(name, (aggregate, aggregate_id)).limit(1)).first()
            if row is None:
                raise NoSuchLetter(f"there are no dead letters of {aggregate} {aggregate_id} for {name}")
            kept = {
                column.name: getattr(row, column.name)
                for column in dead_letter.columns
                if column.name not in ("id", "attempts", "next_attempt")
            }
            own = checkpoint.c.projection == name, checkpoint.c.generation == NUMBER
            fenced = update(checkpoint).where(*own, checkpoint.c.partition == row.partition)
            connection.execute(fenced.where(checkpoint.c.epoch != PAUSED).values(epoch=FENCE))
            connection.execute(insert(skipped_letter).values(**kept, skipped=_now(), who=who, reason=reason))
            connection.execute(delete(dead_letter).where(dead_letter.c.id == row.id))
            return int(row.sequence)

    return outlast_contention(attempt)


def count(engine: Engine) -> dict[str, int]:
    """Return how many aggregates are parked, by policy or effect."""
    parked = (
        select(dead_letter.c.projection, dead_letter.c.aggregate, dead_letter.c.aggregate_id)
        .where(dead_letter.c.generation == NUMBER, dead_letter.c.projection != "")
        .distinct()
        .subquery()
    )
    with reads(engine).connect() as connection:
        query = select(parked.c.projection, func.count()).group_by(parked.c.projection)
        return {name: int(number) for name, number in connection.execute(query)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
