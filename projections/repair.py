"""Makes the row of one aggregate again, from its events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, Engine

from projections import exclusions
from projections.contention import outlast_contention
from projections.errors import HandlerFailed, SchemaError
from projections.fold import Commits, Folded, Plan
from projections.generations import fence, live_generation, lock_checkpoints, positions
from projections.parked import Key
from projections.unit_of_work import Writer


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done to one aggregate's row.

    Attributes:
        sequence: of the last event in the row; 0 if there is none.
        changed: the row was not what the log says.
        exists: there is a row now.
    """

    projection: str
    aggregate: str
    aggregate_id: str
    sequence: int
    changed: bool
    exists: bool


def repair(engine: Engine, plan: Plan, key: Key, partition: int, read: Callable[[], Commits]) -> Repaired:
    """Replace the row of one aggregate by what its events lead to, in a transaction that fences the partition's owner.

    Args:
        plan: of one `Rows` projection.
        key: the aggregate's type and id.
        partition: where its events are.
        read: returns all of its commits. It is called when the partition's owner can't go on: no later ones are in the
            tables.

    Raises:
        SchemaError: the projection has not been built, or its rows are not those of aggregates.
        HandlerFailed: the program fails at an event that it has folded before.
        sqlalchemy.exc.DBAPIError: the database failed, or refuses the row. Nothing has changed.
    """
    (declared,) = plan.projections
    if declared.kind != "rows" or declared.keyed:
        what = "has rows with a key of their own" if declared.keyed else f"is a {declared.kind.title()} projection"
        raise SchemaError(
            f"{declared.name} {what}: events of many aggregates are in each row of "
            f"such tables; rebuild it as a whole with `eskernel rebuild {declared.name}`"
        )
    return outlast_contention(partial(_repair, engine, plan, key, partition, read))


def _repair(engine: Engine, plan: Plan, key: Key, partition: int, read: Callable[[], Commits]) -> Repaired:
    (declared,) = plan.projections
    with engine.begin() as connection:
        made = live_generation(connection, declared)
        if made is None:
            raise SchemaError(
                f"{declared.name} version {declared.version} has not been built; start the service, or rebuild it"
            )
        lock_checkpoints(connection, made.name, made.number, [partition])
        until = positions(connection, made).get(partition, 0)
        exclusions.load_skipped(connection, plan)
        exclusions.load_parked(connection, plan, [made])
        writer = Writer(engine, plan, [made], epoch=0)
        folded = Folded(plan)
        rows = [None]
        known = [commit for commit in read() if commit[0] <= until]
        if known:
            plan.fold(*key, rows, known, folded, 0)
        if folded.failures:
            raise folded.failures[0]
        changed = _write(connection, writer, key, folded, known)
        fence(connection, made, [partition])
        record = folded.rows[0].get(key[1])
        last = record.eskernel_sequence if record is not None else folded.kept[0].get(plan.kept_id(key), 0)
        return Repaired(declared.name, *key, last, changed, record is not None)


def _write(connection: Connection, writer: Writer, key: Key, folded: Folded, known: Commits) -> bool:
    """Write the row, or delete it. Return whether it is another one than before."""
    bulk, aggregate_id = writer.bulk(0), key[1]
    found, _ = bulk.load(connection, [aggregate_id])
    before = [] if aggregate_id not in found else bulk.carry_own({aggregate_id: found[aggregate_id]})[0]
    writer.delete(connection, 0, [aggregate_id])
    write = writer.freeze(folded, [], lambda _: (0, b""), [(key, known, frozenset())])
    if write.suspects:
        suspect = write.suspects[0]
        raise HandlerFailed(0, key, suspect.since, suspect.error, "refused")
    for index, rows in write.rows.items():
        writer.insert(connection, index, rows)
    if writer.plan.keeps(key[0]) and write.kept.get(0):
        writer.keep(connection, 0, write.kept[0])
    return [tuple(row) for row in before] != [tuple(row) for row in write.rows.get(0, [])]
