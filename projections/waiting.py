"""Aggregates that wait for a newer program: listed, and folded on as soon as a program can read their events.

They wait behind dead letters with no attempts: nothing has failed. Later events of the aggregate wait behind them.
All dead letters of an aggregate have attempts, or none has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Row, func, select

from aggregates import InvalidMessage
from aggregates.commit import Envelope
from aggregates.errors import NewerEvent
from projections.checkpoints import Position
from projections.contention import outlast_contention
from projections.database import is_infrastructure, reads
from projections.dead_letters import Retried, Stopped, fold_letters, remove, settle
from projections.errors import Fenced, HandlerFailed
from projections.fold import Folded, Plan
from projections.generations import lock_checkpoints
from projections.stored_letters import envelope_of
from projections.tables import dead_letter, projection
from projections.unit_of_work import Writer

CHUNK = 2_000
"""Aggregates that are folded on in one transaction."""


class Postponed(NamedTuple):
    """Aggregates that wait for a newer program.

    Attributes:
        aggregate: their type.
        why: the event that this program can't read.
        aggregates: how many of them wait, in whatever projection.
    """

    aggregate: str
    why: str
    aggregates: int


@dataclass(frozen=True, slots=True)
class _Reason:
    """A reason for which aggregates of one projection wait: projection's index, aggregate type, error."""

    index: int
    aggregate: str
    error: str


def postponed(engine: Engine) -> list[Postponed]:
    """Return what waits for a newer program, by aggregate type and reason."""
    with reads(engine).connect() as connection:
        query = (
            select(dead_letter.c.aggregate, dead_letter.c.error, func.count(dead_letter.c.aggregate_id.distinct()))
            .join(
                projection,
                (projection.c.name == dead_letter.c.projection) & (projection.c.generation == dead_letter.c.generation),
            )
            .where(projection.c.state == "live", dead_letter.c.attempts == 0)
            .group_by(dead_letter.c.aggregate, dead_letter.c.error)
            .order_by(dead_letter.c.aggregate, dead_letter.c.error)
        )
        return [Postponed(*row) for row in connection.execute(query)]


def fold_postponed(writer: Writer, partitions: Collection[int], position: Position | None = None) -> list[Retried]:
    """Fold on the aggregates of some partitions that waited for this program, in order and as far as it can.

    Call it between the claim of the partitions and `load_parked`: nothing else may fold them meanwhile.

    Args:
        writer: of the claim.
        position: the claim's, where not all partitions are claimed for each projection.

    Returns:
        an entry for each aggregate and projection. What is left waits for another program, or is parked.

    Raises:
        Fenced: the partitions have been claimed by another owner since.
        sqlalchemy.exc.DBAPIError: the database failed. What was folded is written, the rest waits as before.
    """
    done: list[Retried] = []
    with reads(writer.engine).connect() as connection:
        reasons = list(_readable(connection, writer, partitions))
    for reason in reasons:
        after = ""
        own = partitions if position is None else position.of(reason.index).keys() & partitions
        while resumed := outlast_contention(partial(_fold_next, writer, reason, own, after)):
            done += resumed
            after = resumed[-1].aggregate_id
    return done


def _fold_next(writer: Writer, reason: _Reason, partitions: Collection[int], after: str) -> list[Retried]:
    with writer.engine.begin() as connection:
        rows = _next_chunk(connection, writer, reason, partitions, after)
        if not rows:
            return []
        _check_owner(connection, writer, reason.index, {row.partition for row in rows})
        by_id = [list(own) for _, own in groupby(rows, lambda row: row.aggregate_id)]
        return _fold_chunk(connection, writer, reason, by_id)


def _readable(connection: Connection, writer: Writer, partitions: Collection[int]) -> Iterator[_Reason]:
    """Yield the reasons that no longer hold. The oldest dead letter of a reason is the head of its aggregate."""
    index_of = {(made.name, made.number): index for index, made in enumerate(writer.generations)}
    oldest = (
        select(func.min(dead_letter.c.id))
        .where(
            dead_letter.c.projection != "", dead_letter.c.attempts == 0, dead_letter.c.partition.in_(sorted(partitions))
        )
        .group_by(
            dead_letter.c.projection, dead_letter.c.generation, dead_letter.c.aggregate, dead_letter.c.error
        )
    )  # fmt: skip
    for row in connection.execute(select(dead_letter).where(dead_letter.c.id.in_(oldest)).order_by(dead_letter.c.id)):
        index = index_of.get((row.projection, row.generation))
        if index is not None and _can_read(writer.plan, row):
            yield _Reason(index, row.aggregate, row.error)


def _can_read(plan: Plan, row: Row[Any]) -> bool:
    declared = plan.types.get(row.aggregate)
    if declared is None:
        return False
    try:
        envelope = envelope_of(row)
        return envelope.dataversion <= declared.stored_event(envelope.type).version
    except NewerEvent:
        return False
    except InvalidMessage:
        return True  # it is parked with this as its error


def _next_chunk(
    connection: Connection, writer: Writer, reason: _Reason, partitions: Collection[int], after: str
) -> Sequence[Row[Any]]:
    """Return the dead letters of the next aggregates, by aggregate and in order."""
    made = writer.generations[reason.index]
    own = (
        dead_letter.c.projection == made.name,
        dead_letter.c.generation == made.number,
        dead_letter.c.aggregate == reason.aggregate,
        dead_letter.c.partition.in_(sorted(partitions)),
    )
    ids = (
        select(dead_letter.c.aggregate_id)
        .where(*own, dead_letter.c.attempts == 0, dead_letter.c.error == reason.error)
        .where(dead_letter.c.aggregate_id > after)
        .distinct()
        .order_by(dead_letter.c.aggregate_id)
        .limit(CHUNK)
    )
    chosen = select(dead_letter).where(*own, dead_letter.c.aggregate_id.in_(ids))
    order = dead_letter.c.aggregate_id, dead_letter.c.stream_sequence, dead_letter.c.sequence
    return connection.execute(chosen.order_by(*order)).all()


def _check_owner(connection: Connection, writer: Writer, index: int, partitions: set[int]) -> None:
    """Keep others from the partitions until the transaction ends. Raises `Fenced` if they are another owner's."""
    made = writer.generations[index]
    epochs = lock_checkpoints(connection, made.name, made.number, sorted(partitions))
    if set(epochs.values()) != {writer.epoch}:
        raise Fenced(f"partitions of {made.name} have been claimed by another owner since epoch {writer.epoch}")


def _fold_chunk(
    connection: Connection, writer: Writer, reason: _Reason, by_id: Sequence[Sequence[Row[Any]]]
) -> list[Retried]:
    writer.plan.parked.clear()
    try:
        with connection.begin_nested():
            results = _fold_together(connection, writer, reason, by_id)
    except Exception as error:
        if isinstance(error, Fenced) or is_infrastructure(error):
            raise
        results = [fold_letters(connection, writer, reason.index, rows) for rows in _unparked(writer.plan, by_id)]
    done = []
    whole = [rows for rows, (folded, _) in zip(by_id, results, strict=True) if folded == len(rows)]
    remove(connection, [row for rows in whole for row in rows])
    for rows, (folded, stopped) in zip(by_id, results, strict=True):
        if folded < len(rows):
            settle(connection, rows, folded, stopped, writer.retry_after or None)
        name, left = writer.generations[reason.index].name, len(rows) - folded
        done.append(Retried(name, reason.aggregate, rows[0].aggregate_id, folded, left, stopped.error, stopped.waits))
    return done


def _unparked(plan: Plan, by_id: Sequence[Sequence[Row[Any]]]) -> Iterator[Sequence[Row[Any]]]:
    for rows in by_id:
        plan.parked.clear()
        yield rows


def _fold_together(
    connection: Connection, writer: Writer, reason: _Reason, by_id: Sequence[Sequence[Row[Any]]]
) -> list[tuple[int, Stopped]]:
    """Fold and write all dead letters of the aggregates at once.

    Returns:
        for each aggregate how many were folded, and why not all.

    Raises:
        Exception: one of them is to blame; fold them one by one.
    """
    plan, index = writer.plan, reason.index
    others = frozenset(range(len(plan.projections))) - {index}
    ids = [rows[0].aggregate_id for rows in by_id]
    records, unreadable = writer.load_rows(connection, reason.aggregate, ids)
    kept = writer.load_kept(connection, reason.aggregate, records)
    folded = Folded(plan)
    batch: list[tuple[tuple[str, str], list[tuple[int, list[Envelope]]], frozenset[int]]] = []
    for aggregate_id, rows in zip(ids, by_id, strict=True):
        commits = [(row.stream_sequence, [envelope_of(row)]) for row in rows]
        batch.append(((reason.aggregate, aggregate_id), commits, others))
        plan.fold(
            reason.aggregate, aggregate_id, records[aggregate_id], commits, folded, None, others, kept.get(aggregate_id)
        )
    again, folded.letters = folded.letters, []
    failures = folded.failures or writer.apply(connection, writer.freeze(folded, [], lambda _: (0, b""), batch))
    if failures:
        raise failures[0]
    for row in unreadable:
        raise HandlerFailed(row.index, row.aggregate, 0, row.error)
    heads = {letter.aggregate[1]: letter for letter in reversed(again)}
    results = []
    for aggregate_id, rows in zip(ids, by_id, strict=True):
        head = heads.get(aggregate_id)
        if head is None:
            results.append((len(rows), Stopped("")))
        else:
            place = next(place for place, row in enumerate(rows) if row.sequence == head.sequence)
            results.append((place, Stopped(head.error, waits=True)))
    return results
