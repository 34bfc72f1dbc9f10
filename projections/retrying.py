"""Folds the dead letters of many aggregates again, many in one transaction: after a bad deploy thousands are parked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Engine, Row, select

from projections.contention import outlast_contention
from projections.dead_letters import (
    Retried,
    Stopped,
    Waiting,
    fold_letters,
    remove,
    settle,
)
from projections.exclusions import plan_of, skipped_of
from projections.fold import Folded, Plan
from projections.generations import fence, live_generation, lock_checkpoints
from projections.stored_letters import event_of
from projections.tables import dead_letter
from projections.unit_of_work import Batch, Writer

CHUNK = 1_000
"""Aggregates in one transaction."""
TRIES = 3
"""Times that a chunk is folded together, each time without the failed aggregates; then each aggregate alone."""
Pause = Callable[[int], float | None]
"""Returns the seconds until the next automatic attempt, from the number of attempts so far; None for no further one."""
Letters = Sequence[Row[Any]]
Result = tuple[int, Stopped]
"""How many dead letters of an aggregate were folded, and why not all."""


def retry_all(
    engine: Engine, plan: Plan, chosen: Iterable[Waiting], pause: Pause = lambda _attempts: None
) -> list[Retried]:
    """Fold the dead letters of parked aggregates, in order, each up to the first event that fails again.

    Aggregates that are no longer parked, and those of projections that the plan does not have, are left out.

    Raises:
        sqlalchemy.exc.DBAPIError: the database failed. What was folded is written, the rest waits as before.
    """
    known = {declared.name for declared in plan.projections}
    work = sorted(
        {(parked.projection, parked.aggregate, parked.aggregate_id) for parked in chosen if parked.projection in known}
    )
    done: list[Retried] = []
    for (name, aggregate), keys in groupby(work, lambda key: key[:2]):
        own, ids = plan_of(plan, name), [key[2] for key in keys]
        for start in range(0, len(ids), CHUNK):
            chunk = partial(_retry, engine, own, aggregate, ids[start : start + CHUNK], pause)
            done += outlast_contention(chunk)
    return done


def _retry(engine: Engine, plan: Plan, aggregate: str, ids: Sequence[str], pause: Pause) -> list[Retried]:
    (declared,) = plan.projections
    with engine.begin() as connection:
        made = live_generation(connection, declared)
        if made is None:
            return []
        own = (
            dead_letter.c.projection == made.name,
            dead_letter.c.generation == made.number,
            dead_letter.c.aggregate == aggregate,
            dead_letter.c.aggregate_id.in_(ids),
        )
        # the partitions' owners may not add dead letters until this transaction ends
        partitions = connection.scalars(select(dead_letter.c.partition).where(*own).distinct()).all()
        lock_checkpoints(connection, made.name, made.number, sorted(partitions))
        order = dead_letter.c.aggregate_id, dead_letter.c.stream_sequence, dead_letter.c.sequence
        rows = connection.execute(select(dead_letter).where(*own).order_by(*order)).all()
        by_id: dict[str, Letters] = {key: list(letters) for key, letters in groupby(rows, attrgetter("aggregate_id"))}
        writer = Writer(engine, plan, [made], epoch=0)
        results = _fold(connection, writer, by_id)
        done, folded_in = [], set()
        remove(connection, [row for key, (folded, _) in results.items() for row in by_id[key][:folded]])
        for key, (folded, stopped) in results.items():
            letters = by_id[key]
            if folded < len(letters):
                settle(connection, letters, folded, stopped, pause(letters[0].attempts), removed=True)
            if folded:
                folded_in.add(letters[0].partition)
            left = len(letters) - folded
            done.append(Retried(made.name, aggregate, key, folded, left, stopped.error, stopped.waits))
        if folded_in:
            fence(connection, made, sorted(folded_in))
        return done


def _fold(connection: Connection, writer: Writer, by_id: dict[str, Letters]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for _ in range(TRIES):
        left = {key: letters for key, letters in by_id.items() if key not in results}
        alone = _fold_together(connection, writer, left, results)
        if not alone:
            break
        for key in alone:
            writer.plan.parked.clear()
            results[key] = fold_letters(connection, writer, 0, by_id[key])
    for key, letters in by_id.items():
        if key not in results:
            writer.plan.parked.clear()
            results[key] = fold_letters(connection, writer, 0, letters)
    return results


def _fold_together(
    connection: Connection, writer: Writer, by_id: dict[str, Letters], results: dict[str, Result]
) -> list[str]:
    """Fold and write all dead letters of the aggregates, unless some fail.

    Returns:
        the aggregates that have to be folded alone. Then nothing was written, but results are known of those whose
        first event failed.
    """
    if not by_id:
        return []
    plan = writer.plan
    plan.parked.clear()
    aggregate = next(iter(by_id.values()))[0].aggregate
    if aggregate not in plan.projections[0].units:
        return list(by_id)
    records, unreadable = writer.load_rows(connection, aggregate, list(by_id))
    alone = {row.aggregate[1] for row in unreadable}
    kept = writer.load_kept(connection, aggregate, records) if plan.keeps(aggregate) else {}
    skipped = skipped_of(connection, writer.generations[0].name, aggregate, list(by_id))
    folded, batch = Folded(plan), []
    for key, letters in by_id.items():
        try:
            commits = [(row.stream_sequence, [event_of(plan, 0, row)]) for row in letters]
        except Exception:  # of the app's own key too
            alone.add(key)
            continue
        last = max((sequence for sequence in skipped.get(key, ()) if sequence < letters[0].sequence), default=None)
        if last is not None:
            row = records[key][0]
            last = max(last, row.eskernel_sequence if row is not None else 0, kept.get(key) or 0)
        batch.append(((aggregate, key), commits, frozenset[int]()))
        plan.fold(aggregate, key, records[key], commits, folded, last, kept=kept.get(key))
    if not plan.keeps(aggregate):
        folded.kept[0].clear()
    for failure in folded.failures:
        key = failure.aggregate[1]
        if failure.sequence == by_id[key][0].sequence and key not in alone:
            results[key] = 0, Stopped(failure.error, failure.transient)
        else:
            alone.add(key)
    alone |= {letter.aggregate[1] for letter in folded.letters} - results.keys()
    if alone or folded.failures:
        return list(alone) or list(_refolded(connection, writer, by_id, results))
    return _write(connection, writer, folded, batch, by_id, results)


def _refolded(
    connection: Connection, writer: Writer, by_id: dict[str, Letters], results: dict[str, Result]
) -> list[str]:
    """Fold the aggregates that are left when all failed ones are known."""
    return _fold_together(connection, writer, {key: own for key, own in by_id.items() if key not in results}, results)


def _write(
    connection: Connection,
    writer: Writer,
    folded: Folded,
    batch: Batch,
    by_id: dict[str, Letters],
    results: dict[str, Result],
) -> list[str]:
    write = writer.freeze(folded, [], lambda _: (0, b""), batch)
    savepoint = connection.begin_nested()
    failures = writer.attempt(connection, write)
    if failures:
        savepoint.rollback()
        return sorted({failure.aggregate[1] for failure in failures})
    savepoint.commit()
    results |= {key: (len(letters), Stopped("")) for key, letters in by_id.items()}
    return []
