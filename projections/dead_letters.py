"""Dead letters: list them, fold them again in order, and skip events that can't be folded.

All functions work on the database alone, also while a service runs. Each change is one transaction that also fences the
partition's checkpoint: the next write of the partition's owner fails, and the owner starts again from the database.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from aggregates import InvalidMessage
from projections.contention import outlast_contention
from projections.database import is_infrastructure, reads
from projections.declaration import DeclaredProjection
from projections.errors import NoSuchLetter, reason
from projections.exclusions import skipped_of
from projections.faults import may_pass
from projections.fold import Folded, Plan
from projections.generations import Generation, fence, live_generation
from projections.stored_letters import StoredLetter, event_of, letter_of
from projections.tables import checkpoint, dead_letter, projection, skipped_letter
from projections.unit_of_work import Writer, one_line

MAX_PAUSE_S = 300.0
REACTION = 0
"""Generation number of the dead letters of policies and effects: no projection has it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An aggregate that is parked for one projection or waits for a newer program, or a message in quarantine.

    Attributes:
        projection: the projection's name, empty for a message in quarantine.
        aggregate: the aggregate's type, empty for a message in quarantine; or the projection's name, if what is parked
            is a row with a key of its own.
        aggregate_id: the aggregate's id, the subject of a message in quarantine, or the row's key.
        sequence: the first waiting event's place in its aggregate; for a row with a key of its own, in the log.
        stream_sequence: the first waiting event's place in the stream.
        events: number of waiting events.
        error: the error of the first waiting event.
        since: when the first waiting event failed, RFC 3339 in UTC.
        attempts: how often the first waiting event has failed.
        next_attempt: Unix time of the next automatic attempt, or None if none is planned.
        newer: the aggregate is not parked. Its first waiting event has not failed: a newer program has appended it. It
            is folded as soon as a program that can read it projects the partition.
        reaction: it is a policy or an effect that the aggregate is parked for: a worker tries again, not this process.
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
    newer: bool = False
    reaction: bool = False


@dataclass(frozen=True, slots=True)
class Retried:
    """The result of a retry.

    Attributes:
        folded: number of events that are no longer dead letters.
        left: number of events that still wait.
        error: the error of the first event that still waits, or an empty text.
        newer: what is left has not failed: it waits for a newer program.
    """

    projection: str
    aggregate: str
    aggregate_id: str
    folded: int
    left: int
    error: str
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Stopped:
    """Why a dead letter could not be folded.

    Attributes:
        error: one line for people; empty if there was nothing in the way.
        transient: an automatic retry may help.
        waits: the event has not failed: only a newer program can read it.
    """

    error: str
    transient: bool = False
    waits: bool = False


def waiting(engine: Engine, name: str | None = None) -> list[Waiting]:
    """Return the parked and waiting aggregates, and the quarantined messages, oldest first.

    Args:
        name: only those of this projection; `""` for the quarantine, None for all.
    """
    with reads(engine).connect() as connection:
        columns = [column for column in dead_letter.columns if column.name != "payload"]
        rows = connection.execute(
            select(*columns)
            .outerjoin(
                projection,
                (projection.c.name == dead_letter.c.projection) & (projection.c.generation == dead_letter.c.generation),
            )
            .where(
                (projection.c.state == "live")
                | (dead_letter.c.projection == "")
                | (dead_letter.c.generation == REACTION)
            )
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
            not row.attempts,
            row.generation == REACTION and bool(row.projection),
        )
        for key, row in heads.items()
    ]


def letters(engine: Engine, name: str, aggregate: str, aggregate_id: str) -> list[StoredLetter]:
    """Return the dead letters of one aggregate for one projection, in order.

    Raises:
        NoSuchLetter: there are none.
    """
    with reads(engine).connect() as connection:
        rows = _rows(connection, name, aggregate, aggregate_id)
    return [letter_of(row) for row in rows]


def due(engine: Engine, now: float) -> list[Waiting]:
    """Return the parked aggregates whose next automatic attempt is due.

    An attempt that is planned too far in the future is due as well: the clock has been set back since it was planned.
    """
    with reads(engine).connect() as connection:
        planned = dead_letter.c.next_attempt
        some = select(dead_letter.c.id).where((planned <= now) | (planned > now + 2 * MAX_PAUSE_S)).limit(1)
        if connection.scalar(some) is None:
            return []  # the whole table need not be read
    found = [(parked, parked.next_attempt) for parked in waiting(engine) if not parked.reaction]
    return [parked for parked, at in found if at is not None and (at <= now or at > now + 2 * MAX_PAUSE_S)]


def retry(engine: Engine, plan: Plan, name: str, aggregate: str, aggregate_id: str, pause: float | None) -> Retried:
    """Fold the dead letters of one aggregate for one projection, in order, up to the first event that fails again.

    Args:
        plan: plan of this one projection.
        pause: seconds until the next automatic attempt, if an event fails again with a transient error; None for no
            further attempt.

    Raises:
        NoSuchLetter: there are no such dead letters.
        sqlalchemy.exc.DBAPIError: the database failed; nothing has changed.
    """
    (declared,) = plan.projections

    def attempt() -> Retried:
        plan.parked.clear()
        with engine.begin() as connection:
            made = live_generation(connection, declared)
            if made is None:
                raise _not_live(declared)
            _lock(connection, made, aggregate, aggregate_id)
            rows = _rows(connection, name, aggregate, aggregate_id)
            writer = Writer(engine, plan, [made], epoch=0)
            folded, stopped = fold_letters(connection, writer, 0, rows)
            settle(connection, rows, folded, stopped, pause)
            if folded:
                fence(connection, made, [rows[0].partition])
        return Retried(name, aggregate, aggregate_id, folded, len(rows) - folded, stopped.error, stopped.waits)

    return outlast_contention(attempt)


def fold_letters(connection: Connection, writer: Writer, index: int, rows: Sequence[Row[Any]]) -> tuple[int, Stopped]:
    """Fold and write the dead letters of one aggregate for one projection, letter by letter.

    Args:
        index: of the projection in the writer's plan.

    Returns:
        how many were written, and why not all.
    """
    plan, made = writer.plan, writer.generations[index]
    others = frozenset(range(len(plan.projections))) - {index}
    aggregate, aggregate_id = rows[0].aggregate, rows[0].aggregate_id
    if aggregate not in plan.projections[index].units:
        return 0, Stopped(rows[0].error)  # the event of a key that failed: its rows have gone on without it
    loaded, unreadable = writer.load_rows(connection, aggregate, [aggregate_id])
    if unreadable:
        return 0, Stopped(unreadable[0].error)
    records = loaded[aggregate_id]
    skipped = skipped_of(connection, made.name, aggregate, [aggregate_id]).get(aggregate_id, set())
    last = max((sequence for sequence in skipped if sequence < rows[0].sequence), default=None)
    # what another projection keeps goes on without this plan: here it would grow old
    kept = writer.load_kept(connection, aggregate, loaded).get(aggregate_id) if plan.keeps(aggregate) else None
    if last is not None:
        last = max(last, records[index].eskernel_sequence if records[index] is not None else 0, kept or 0)
    for done, row in enumerate(rows):
        while last is not None and last + 1 in skipped:
            last += 1
        try:
            commits = [(row.stream_sequence, [event_of(plan, index, row)])]
            folded = Folded(plan)
            last = plan.fold(aggregate, aggregate_id, records, commits, folded, last, others, kept)
            failures = folded.failures
            if folded.letters and not failures:
                return done, Stopped(folded.letters[0].error, waits=True)
            if not plan.keeps(aggregate):
                folded.kept[index].clear()
            if not failures:
                write = writer.freeze(folded, [], lambda _: (0, b""), [((aggregate, aggregate_id), commits, others)])
                with connection.begin_nested() as savepoint:
                    failures = writer.apply(connection, write)
                    if failures:
                        savepoint.rollback()
            if failures:
                return done, Stopped(failures[0].error, failures[0].transient)
        except InvalidMessage as error:
            return done, Stopped(f"{type(error).__name__}: {error}")
        except Exception as error:
            if is_infrastructure(error):
                raise
            return done, Stopped(reason(error), isinstance(error, plan.transient) or may_pass(error))
    return len(rows), Stopped("")


def remove(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    """Delete dead letters that were folded."""
    ordered = sorted(row.id for row in rows)
    for start in range(0, len(ordered), 500):
        ids = ordered[start : start + 500]
        connection.execute(delete(dead_letter).where(dead_letter.c.id.in_(ids)))


def settle(
    connection: Connection,
    rows: Sequence[Row[Any]],
    folded: int,
    stopped: Stopped,
    pause: float | None,
    *,
    removed: bool = False,
) -> None:
    """Delete the dead letters that were folded, and note at the others what they wait for.

    Args:
        rows: the dead letters of one aggregate for one projection.
        folded: how many of them were folded.
        pause: seconds until the next automatic attempt, if the error is transient; None for no further attempt.
        removed: the folded letters are deleted already.
    """
    if not removed:
        remove(connection, rows[:folded])
    if folded == len(rows):
        return
    head = rows[folded]
    attempts = 0 if stopped.waits else head.attempts + 1 if folded == 0 else 1
    again = None if pause is None or not stopped.transient else time.time() + pause
    error = one_line(stopped.error)
    left = [row.id for row in rows[folded:]]
    for start in range(0, len(left), 500):
        own = dead_letter.c.id.in_(left[start : start + 500])
        connection.execute(update(dead_letter).where(own).values(error=error, attempts=min(attempts, 1)))
    connection.execute(
        update(dead_letter)
        .where(dead_letter.c.id == head.id)
        .values(failed=_now(), attempts=attempts, next_attempt=again)
    )


def skip(engine: Engine, plan: Plan, aggregate: str, aggregate_id: str, who: str, reason: str) -> StoredLetter:
    """Skip the first waiting event of an aggregate for good, and record who did it and why. Later events still wait.

    Args:
        plan: plan of the one projection that the event waits for.

    Raises:
        NoSuchLetter: there is no such dead letter.
    """
    (declared,) = plan.projections

    def attempt() -> StoredLetter:
        with engine.begin() as connection:
            made = live_generation(connection, declared)
            if made is None:
                raise _not_live(declared)
            _lock(connection, made, aggregate, aggregate_id)
            row = _rows(connection, made.name, aggregate, aggregate_id)[0]
            _move_to_skipped(connection, row, who, reason)
            _count_as_folded(connection, Writer(engine, plan, [made], epoch=0), aggregate, aggregate_id, row.sequence)
            fence(connection, made, [row.partition])
        return letter_of(row)

    return outlast_contention(attempt)


def skip_quarantined(engine: Engine, stream_sequence: int, who: str, reason: str) -> StoredLetter:
    """Skip a message in quarantine, and record who did it and why.

    Raises:
        NoSuchLetter: there is no such message in quarantine.
    """
    with engine.begin() as connection:
        query = select(dead_letter).where(
            dead_letter.c.projection == "", dead_letter.c.stream_sequence == stream_sequence
        )
        row = connection.execute(query).first()
        if row is None:
            raise NoSuchLetter(
                f"stream sequence {stream_sequence} is not in quarantine; `eskernel dead-letters list` shows all"
            )
        _move_to_skipped(connection, row, who, reason)
    return letter_of(row)


def _move_to_skipped(connection: Connection, row: Row[Any], who: str, reason: str) -> None:
    kept = {
        column.name: getattr(row, column.name)
        for column in dead_letter.columns
        if column.name not in ("id", "attempts", "next_attempt")
    }
    connection.execute(insert(skipped_letter).values(**kept, skipped=_now(), who=who, reason=reason))
    connection.execute(delete(dead_letter).where(dead_letter.c.id == row.id))


def skipped(engine: Engine) -> list[dict[str, Any]]:
    """Return the skipped events and messages, each with the time, the person and the reason."""
    with reads(engine).connect() as connection:
        rows = connection.execute(select(skipped_letter).order_by(skipped_letter.c.id)).mappings()
        return [{str(key): value for key, value in row.items() if key not in ("id", "payload")} for row in rows]


def counts(engine: Engine) -> tuple[int, int]:
    """Return the number of parked aggregates, summed over the projections, and of messages in quarantine."""
    with reads(engine).connect() as connection:
        parked = select(dead_letter.c.projection, dead_letter.c.aggregate, dead_letter.c.aggregate_id).distinct()
        failed = parked.where(dead_letter.c.projection != "", dead_letter.c.attempts > 0)
        total = connection.scalar(select(func.count()).select_from(failed.subquery()))
        garbage = connection.scalar(select(func.count()).select_from(dead_letter).where(dead_letter.c.projection == ""))
    return int(total or 0), int(garbage or 0)


def _lock(connection: Connection, made: Generation, aggregate: str, aggregate_id: str) -> None:
    """Keep the partition's owner from adding dead letters until this transaction ends."""
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
        query = query.where(dead_letter.c.generation.in_(live) | (dead_letter.c.generation == REACTION))
    rows = connection.execute(query.order_by(dead_letter.c.stream_sequence, dead_letter.c.sequence)).all()
    if not rows:
        what = f"dead letters of {aggregate} {aggregate_id} for {name}" if name else f"quarantined {aggregate_id}"
        raise NoSuchLetter(f"there are no {what}; `eskernel dead-letters list` shows all")
    return rows


def _not_live(declared: DeclaredProjection) -> NoSuchLetter:
    return NoSuchLetter(
        f"{declared.name} version {declared.version} is not live, so it has no dead letters; "
        "start the service, or rebuild the projection"
    )


def _count_as_folded(connection: Connection, writer: Writer, aggregate: str, aggregate_id: str, sequence: int) -> None:
    """Record a skipped event as folded, so that the next event follows it without a gap."""
    loaded, _ = writer.load_rows(connection, aggregate, [aggregate_id])
    if loaded[aggregate_id][0] is None:
        if writer.plan.keeps(aggregate):
            writer.keep(connection, 0, {writer.plan.kept_id((aggregate, aggregate_id)): sequence})
        return
    bulk = writer.bulk(0)
    connection.execute(bulk.sequence, {**bulk.key_parameters([aggregate_id]), "sequence": sequence})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
