"""The timers of policies, in SQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, and_, case, delete, func, or_, select, tuple_, update

from kernel.reactions.store import NUMBER
from projections.contention import outlast_contention
from projections.database import reads
from projections.tables import checkpoint, timer

AT_ONCE = 500
"""Timers that are fired at a time."""
MICROS = 1_000_000
"""Microseconds of a second."""


@dataclass(frozen=True, slots=True)
class DueTimer:
    """A timer whose time has come.

    Attributes:
        owed: the command, as it was stored.
        attempts: how often it has failed.
    """

    name: str
    partition: int
    stream_sequence: int
    place: int
    due: int
    attempts: int
    owed: str


def next_due(engine: Engine, policy: str, partitions: Collection[int]) -> int | None:
    """Return when the next timer of these partitions is to be fired, in microseconds since 1970; None for never."""
    with reads(engine).connect() as connection:
        found = connection.scalar(
            select(func.min(timer.c.attempt)).where(
                timer.c.policy == policy, timer.c.partition.in_(sorted(partitions)), timer.c.attempt.is_not(None)
            )
        )
        return None if found is None else int(found)


def due_timers(engine: Engine, policy: str, partitions: Collection[int], now: int) -> list[DueTimer]:
    """Return the timers that are to be fired by `now`, the first ones first, at most `AT_ONCE`."""
    with reads(engine).connect() as connection:
        rows = connection.execute(
            select(timer)
            .where(timer.c.policy == policy, timer.c.attempt <= now, timer.c.partition.in_(sorted(partitions)))
            .order_by(timer.c.attempt)
            .limit(AT_ONCE)
        )
        return [
            DueTimer(row.name, row.partition, row.stream_sequence, row.place, row.due, row.attempts, row.owed)
            for row in rows
        ]


def settle(engine: Engine, policy: str, fired: Sequence[DueTimer], failed: Sequence[tuple[DueTimer, int, str]]) -> None:
    """Note what became of timers; those that were set anew meanwhile stay as they are.

    Args:
        failed: each with the time of its next attempt, in microseconds, and the error.
    """

    def note() -> None:
        with engine.begin() as connection:
            for start in range(0, len(fired), 100):
                own = or_(*(_is(policy, each) for each in fired[start : start + 100]))
                connection.execute(update(timer).where(own).values(due=None, attempt=None, owed=None))
            for each, attempt, error in failed:
                connection.execute(
                    update(timer)
                    .where(_is(policy, each))
                    .values(attempt=attempt, attempts=each.attempts + 1, error=error)
                )
            _sweep(connection, policy)

    if fired or failed:
        outlast_contention(note)


def _is(policy: str, each: DueTimer) -> Any:
    return and_(
        timer.c.policy == policy,
        timer.c.name == each.name,
        timer.c.stream_sequence == each.stream_sequence,
        timer.c.place == each.place,
    )


def _sweep(connection: Connection, policy: str) -> None:
    """Delete what was fired or cancelled, where no partition can come with an earlier change any more."""
    passed = connection.scalar(
        select(func.min(checkpoint.c.sequence)).where(
            checkpoint.c.projection == policy, checkpoint.c.generation == NUMBER
        )
    )
    connection.execute(
        delete(timer).where(
            timer.c.policy == policy, timer.c.attempt.is_(None), timer.c.stream_sequence <= (passed or 0)
        )
    )


def sweep(engine: Engine, policy: str) -> None:
    """Delete what was fired or cancelled, as far as it is needed no longer."""
    with engine.begin() as connection:
        _sweep(connection, policy)


def pending(
    engine: Engine, policy: str | None = None, *, failed: bool = False, limit: int | None = 100
) -> list[dict[str, Any]]:
    """Return the timers that are pending, the first ones first.

    Args:
        failed: only those whose command has failed.
    """
    query = select(timer).where(timer.c.attempt.is_not(None)).order_by(timer.c.attempt, timer.c.policy, timer.c.name)
    if policy is not None:
        query = query.where(timer.c.policy == policy)
    if failed:
        query = query.where(timer.c.attempts > 0)
    with reads(engine).connect() as connection:
        return [dict(row) for row in connection.execute(query.limit(limit)).mappings()]


def counts(engine: Engine, now: int) -> dict[str, tuple[int, int, int]]:
    """Return by policy how many timers are pending, how many of them are overdue, and how many have failed."""
    late = func.sum(_one_if(timer.c.due <= now))
    failed = func.sum(_one_if(timer.c.attempts > 0))
    query = select(timer.c.policy, func.count(), late, failed).where(timer.c.attempt.is_not(None))
    with reads(engine).connect() as connection:
        return {
            name: (int(count), int(overdue or 0), int(broken or 0))
            for name, count, overdue, broken in connection.execute(query.group_by(timer.c.policy))
        }


def _one_if(condition: Any) -> Any:
    return case((condition, 1), else_=0)


def cancel(engine: Engine, policy: str, names: Sequence[str]) -> int:
    """Cancel timers by their names. Return how many were pending."""
    with engine.begin() as connection:
        own = tuple_(timer.c.policy, timer.c.name).in_([(policy, name) for name in names])
        done = connection.execute(
            update(timer).where(own, timer.c.attempt.is_not(None)).values(due=None, attempt=None, owed=None)
        )
        return int(done.rowcount)
