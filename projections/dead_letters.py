"""Dead letters in sequence: what waits, folding it again from the head, and leaving out what can't be folded.

Everything here works on the database alone, beside a running service: what it changes it changes in one transaction
that takes the epoch off the partition's checkpoint, so that the partition's owner meets the fence at its next write
and starts again from what the database says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from aggregates import InvalidMessage
from aggregates.commit import Envelope, decode
from projections.database import is_infrastructure, reads
from projections.errors import HandlerFailed, NoSuchLetter
from projections.fold import Folded, Plan
from projections.generations import FENCE, Generation, live_generation
from projections.records import SEQUENCE
from projections.tables import checkpoint, dead_letter, projection, skipped_letter
from projections.unit_of_work import Writer, one_line

MAX_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """An aggregate that waits for one projection; or bytes in quarantine, which belong to no projection.

    Attributes:
        projection: empty for the quarantine.
        aggregate, aggregate_id: in quarantine, nothing and the subject.
        sequence: of the first event that waits.
        stream_sequence: its place in the stream.
        events: how many wait.
        error: what the first one failed with.
        since: when it did, RFC 3339 in UTC.
        attempts: how often it has failed.
        next_attempt: Unix time of the next automatic attempt, if there is to be one.
    """

    projection: str
    aggregate: str
    aggregate_id: str
    sequence: int
    stream_sequence: int
    events: int
    error: str
    since: str
    attempts: int
    next_attempt: float | None


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        event: the event as it is stored, or None where the bytes are no event.
        payload: the whole commit that it came in.
    """

    sequence: int
    stream_sequence: int
    error: str
    event: dict[str, Any] | None
    payload: bytes


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry did.

    Attributes:
        folded: events that are no longer dead letters.
        left: those that still wait.
        error: what the first of them failed with, if any does.
    """

    projection: str
    aggregate: str
    aggregate_id: str
    folded: int
    left: int
    error: str


def waiting(engine: Engine, name: str | None = None) -> list[Waiting]:
    """Return what waits, of one projection or of all, oldest first; the quarantine is named `""`."""
    with reads(engine).connect() as connection:
        rows = connection.execute(
            select(dead_letter)
            .outerjoin(
                projection,
                (projection.c.name == dead_letter.c.projection) & (projection.c.generation == dead_letter.c.generation),
            )
            .where((projection.c.state == "live") | (dead_letter.c.projection == ""))
            .order_by(dead_letter.c.stream_sequence, dead_letter.c.sequence, dead_letter.c.id)
        )
        heads: dict[tuple[Any, ...], Row[Any]] = {}
        counts: dict[tuple[Any, ...], int] = {}
        for row in rows:
            if name is not None and row.projection != name:
                continue
            key = (row.projection, row.aggregate, row.aggregate_id, row.stream_sequence if not row.projection else 0)
            heads.setdefault(key, row)
            counts[key] = counts.get(key, 0) + 1
    return [
        Waiting(
            row.projection,
            row.aggregate,
            row.aggregate_id,
            row.sequence,
            row.stream_sequence,
            counts[key],
            row.error,
            row.failed,
            row.attempts,
            row.next_attempt,
        )
        for key, row in heads.items()
    ]


def letters(engine: Engine, name: str, aggregate: str, aggregate_id: str) -> list[Letter]:
    """Return what waits of one aggregate for one projection, in order.

    Raises:
        NoSuchLetter: nothing does.
    """
    with reads(engine).connect() as connection:
        rows = _rows(connection, name, aggregate, aggregate_id)
    return [Letter(row.sequence, row.stream_sequence, row.error, _event(row), row.payload) for row in rows]


def due(engine: Engine, now: float) -> list[Waiting]:
    """Return what is to be folded again by now; a moment too far away was noted before the clock was set back."""
    found = [(one, one.next_attempt) for one in waiting(engine)]
    return [one for one, at in found if at is not None and (at <= now or at > now + 2 * MAX_PAUSE_S)]


def retry(engine: Engine, plan: Plan, name: str, aggregate: str, aggregate_id: str, pause: float | None) -> Retried:
    """Fold what waits of one aggregate for one projection, from the head, up to the first event that fails again.

    Args:
        plan: of this one projection.
        pause: seconds until the next automatic attempt if the first one fails with something transient, or None if
            there is to be none.

    Raises:
        NoSuchLetter: nothing waits there.
        sqlalchemy.exc.DBAPIError: the database failed; nothing has changed.
    """
    (declared,) = plan.projections
    with engine.begin() as connection:
        made = live_generation(connection, declared)
        if made is None:
            raise NoSuchLetter(f"{name} version {declared.version} is not the live one; start the service, or rebuild")
        _lock(connection, made, aggregate, aggregate_id)
        rows = _rows(connection, name, aggregate, aggregate_id)
        writer = Writer(engine, plan, [made], epoch=0)
        folded, error, transient = _fold(connection, writer, rows)
        if folded:
            connection.execute(delete(dead_letter).where(dead_letter.c.id.in_([row.id for row in rows[:folded]])))
            _fence(connection, made, rows[0].partition)
        if folded < len(rows):
            head = rows[folded]
            attempts = head.attempts + 1 if folded == 0 else 1
            again = None if pause is None or not transient else time.time() + pause
            connection.execute(
                update(dead_letter)
                .where(dead_letter.c.id == head.id)
                .values(error=one_line(error), failed=_now(), attempts=attempts, next_attempt=again)
            )
    return Retried(name, aggregate, aggregate_id, folded, len(rows) - folded, error)


def _fold(connection: Connection, writer: Writer, rows: Sequence[Row[Any]]) -> tuple[int, str, bool]:
    """Fold and write letter by letter; return how many, and what stopped it."""
    plan, (made,) = writer.plan, writer.generations
    aggregate, aggregate_id = rows[0].aggregate, rows[0].aggregate_id
    records = writer.load_rows(connection, aggregate, [aggregate_id])[aggregate_id]
    last = _last_skipped(connection, made, aggregate, aggregate_id)
    kept = writer.load_kept(connection, aggregate, {aggregate_id: records}).get(aggregate_id)
    if last is not None:
        last = max(last, records[0].eskernel_sequence if records[0] is not None else 0, kept or 0)
    for done, row in enumerate(rows):
        folded = Folded(plan)
        try:
            commits = [(row.stream_sequence, [_envelope(row)])]
            last = plan.fold(aggregate, aggregate_id, records, commits, folded, last, kept=kept)
            write = writer.freeze(folded, [], lambda _: (0, b""))
            with connection.begin_nested():
                writer.apply(connection, write)
        except HandlerFailed as failure:
            return done, failure.error, failure.transient
        except InvalidMessage as error:
            return done, f"{type(error).__name__}: {error}", False
        except DBAPIError as error:
            if is_infrastructure(error):
                raise
            return done, str(error.orig), False
    return len(rows), "", False


def skip(
    engine: Engine, plan: Plan | None, name: str, aggregate: str, aggregate_id: str, who: str, reason: str,
    stream_sequence: int | None = None,
) -> Letter:  # fmt: skip
    """Leave out the head of what waits, for good, and write down who did it and why; what waits behind it stays.

    Args:
        plan: of this one projection; None for the quarantine (`name` is empty).
        stream_sequence: in quarantine: which message.

    Raises:
        NoSuchLetter: nothing waits there.
    """
    with engine.begin() as connection:
        made = None
        if plan is not None:
            made = live_generation(connection, plan.projections[0])
            if made is None:
                raise NoSuchLetter(f"{name} is not live in the declared version; start the service, or rebuild")
            _lock(connection, made, aggregate, aggregate_id)
        rows = _rows(connection, name, aggregate, aggregate_id)
        row = next((one for one in rows if stream_sequence in (None, one.stream_sequence)), None)
        if row is None:
            raise NoSuchLetter(f"stream sequence {stream_sequence} is not in quarantine")
        kept = {
            column.name: getattr(row, column.name)
            for column in dead_letter.columns
            if column.name not in ("id", "attempts", "next_attempt")
        }
        connection.execute(insert(skipped_letter).values(**kept, skipped=_now(), who=who, reason=reason))
        connection.execute(delete(dead_letter).where(dead_letter.c.id == row.id))
        if made is not None:
            assert plan is not None
            _count_as_folded(connection, Writer(engine, plan, [made], epoch=0), aggregate, aggregate_id, row.sequence)
            _fence(connection, made, row.partition)
    return Letter(row.sequence, row.stream_sequence, row.error, _event(row), row.payload)


def skipped(engine: Engine) -> list[dict[str, Any]]:
    """Return what was left out: which, when, who, why."""
    with reads(engine).connect() as connection:
        rows = connection.execute(select(skipped_letter).order_by(skipped_letter.c.id)).mappings()
        return [{str(key): value for key, value in row.items() if key not in ("id", "payload")} for row in rows]


def counts(engine: Engine) -> tuple[int, int]:
    """Return how many aggregates wait (for each projection), and how many messages are in quarantine."""
    with reads(engine).connect() as connection:
        parked = select(dead_letter.c.projection, dead_letter.c.aggregate, dead_letter.c.aggregate_id).distinct()
        total = connection.scalar(
            select(func.count()).select_from(parked.where(dead_letter.c.projection != "").subquery())
        )
        garbage = connection.scalar(select(func.count()).select_from(dead_letter).where(dead_letter.c.projection == ""))
    return int(total or 0), int(garbage or 0)


def _lock(connection: Connection, made: Generation, aggregate: str, aggregate_id: str) -> None:
    """Keep the partition's owner from adding to what waits until this transaction is over."""
    partition = connection.scalar(
        select(dead_letter.c.partition)
        .where(*_where(made.name, aggregate, aggregate_id), dead_letter.c.generation == made.number)
        .limit(1)
    )
    connection.execute(
        select(checkpoint.c.epoch)
        .where(
            checkpoint.c.projection == made.name,
            checkpoint.c.generation == made.number,
            checkpoint.c.partition == partition,
        )
        .with_for_update()
    )


def _fence(connection: Connection, made: Generation, partition: int) -> None:
    connection.execute(
        update(checkpoint)
        .where(
            checkpoint.c.projection == made.name,
            checkpoint.c.generation == made.number,
            checkpoint.c.partition == partition,
        )
        .values(epoch=FENCE)
    )


def _where(name: str, aggregate: str, aggregate_id: str) -> tuple[Any, ...]:
    return (
        dead_letter.c.projection == name,
        dead_letter.c.aggregate == aggregate,
        dead_letter.c.aggregate_id == aggregate_id,
    )


def _rows(connection: Connection, name: str, aggregate: str, aggregate_id: str) -> Sequence[Row[Any]]:
    live = select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    query = select(dead_letter).where(*_where(name, aggregate, aggregate_id))
    if name:
        query = query.where(dead_letter.c.generation.in_(live))
    rows = connection.execute(query.order_by(dead_letter.c.stream_sequence, dead_letter.c.sequence)).all()
    if not rows:
        what = f"{aggregate} {aggregate_id} for {name}" if name else aggregate_id
        raise NoSuchLetter(f"nothing waits of {what}; `eskernel dead-letters list` shows what does")
    return rows


def _last_skipped(connection: Connection, made: Generation, aggregate: str, aggregate_id: str) -> int | None:
    last: int | None = connection.scalar(
        select(func.max(skipped_letter.c.sequence)).where(
            skipped_letter.c.projection == made.name,
            skipped_letter.c.generation == made.number,
            skipped_letter.c.aggregate == aggregate,
            skipped_letter.c.aggregate_id == aggregate_id,
        )
    )
    return last


def _count_as_folded(connection: Connection, writer: Writer, aggregate: str, aggregate_id: str, sequence: int) -> None:
    """The next event follows the one that was left out."""
    (made,) = writer.generations
    records = writer.load_rows(connection, aggregate, [aggregate_id])[aggregate_id]
    if records[0] is None:
        writer.keep(connection, 0, {aggregate_id: sequence})
        return
    quote = connection.dialect.identifier_preparer.quote
    columns = made.projection.columns
    assert columns is not None
    table, key = quote(next(iter(made.tables.values())).name), quote(columns.columns[0].name)
    connection.execute(
        text(f"UPDATE {table} SET {SEQUENCE} = :sequence WHERE {key} = :id AND {SEQUENCE} < :sequence"),
        {"sequence": sequence, "id": aggregate_id},
    )


def _envelope(row: Row[Any]) -> Envelope:
    for envelope in decode(row.payload):
        if envelope.sequence == row.sequence:
            return envelope
    raise InvalidMessage(f"the commit at {row.stream_sequence} holds no event {row.sequence}")


def _event(row: Row[Any]) -> dict[str, Any] | None:
    try:
        batch: list[dict[str, Any]] = msgspec.json.decode(row.payload, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return next((one for one in batch if one.get("sequence") == row.sequence), None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def plan_of(plan: Plan, name: str) -> Plan:
    """Return a plan of one of the projections alone."""
    chosen = [one for one in plan.projections if one.name == name]
    return Plan(list(plan.types.values()), chosen, plan.transient)
