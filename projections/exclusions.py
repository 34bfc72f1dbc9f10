"""What of the log a generation has not folded: the events behind dead letters, and events that a person has skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, text

from projections.fold import Plan
from projections.generations import Generation
from projections.parked import Parked
from projections.tables import dead_letter, skipped_letter

_QUARANTINE = 0x65736B71
"""Key of the lock under which messages are put into quarantine."""


def load_parked(connection: Connection, plan: Plan, made: Sequence[Generation]) -> None:
    """Replace the plan's parked aggregates by those that wait behind the stored dead letters.

    Args:
        made: the generation of each of the plan's projections.
    """
    index_of = {(g.name, g.number): index for index, g in enumerate(made)}
    plan.parked.clear()
    key = [dead_letter.c[name] for name in ("projection", "generation", "aggregate", "aggregate_id")]
    firsts = select(*key, func.min(dead_letter.c.sequence).label("first")).group_by(*key).subquery()
    heads = select(*key, dead_letter.c.sequence, dead_letter.c.error, dead_letter.c.attempts).join(
        firsts,
        and_(dead_letter.c.sequence == firsts.c.first, *(column == firsts.c[column.name] for column in key)),
    )
    for row in connection.execute(heads.order_by(dead_letter.c.id)):
        index = index_of.get((row.projection, row.generation))
        if index is not None and row.sequence > 0:
            # not transient: the stored letter itself has the time of the next attempt
            parked = Parked(row.sequence, row.error, waits=not row.attempts)
            plan.parked.add((row.aggregate, row.aggregate_id), index, parked)


def load_skipped(connection: Connection, plan: Plan) -> None:
    """Have the plan leave out the events that a person has skipped, in whatever generation that was."""
    index_of = {declared.name: index for index, declared in enumerate(plan.projections)}
    columns = [skipped_letter.c[name] for name in ("projection", "aggregate", "aggregate_id", "sequence")]
    for name, aggregate, aggregate_id, sequence in connection.execute(select(*columns)):
        if name in index_of:
            plan.parked.skip((aggregate, aggregate_id), index_of[name], sequence)


def skipped_of(connection: Connection, name: str, aggregate: str, ids: Sequence[str]) -> dict[str, set[int]]:
    """Return the sequences that a person has skipped for a projection, in whatever generation, of each aggregate."""
    columns = skipped_letter.c.aggregate_id, skipped_letter.c.sequence
    own = skipped_letter.c.projection == name, skipped_letter.c.aggregate == aggregate
    found: dict[str, set[int]] = {}
    for aggregate_id, sequence in connection.execute(
        select(*columns).where(*own, skipped_letter.c.aggregate_id.in_(ids))
    ):
        found.setdefault(aggregate_id, set()).add(sequence)
    return found


def plan_of(plan: Plan, name: str) -> Plan:
    """Return a plan with only the projection of this name, which leaves out the same events."""
    chosen = [projection for projection in plan.projections if projection.name == name]
    alone = Plan(list(plan.types.values()), chosen, plan.dialect, plan.transient)
    alone.kept_elsewhere = frozenset(
        aggregate for aggregate, index in plan.keepers.items() if plan.projections[index].name != name
    )
    for key, events in plan.parked.skipped.items():
        for index, sequence in events:
            if plan.projections[index] in chosen:
                alone.parked.skip(key, chosen.index(plan.projections[index]), sequence)
    return alone


def without_known_garbage(connection: Connection, letters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out messages that are in quarantine, or were skipped: each program that keeps tables up to date meets them.

    Args:
        letters: rows for the dead letter table.
    """
    if connection.dialect.name == "postgresql":
        # two programs meet a message at the same moment; SQLite has one writer at a time
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _QUARANTINE})
    met = {letter["stream_sequence"] for letter in letters if not letter["projection"]}
    known: set[int] = set()
    for table in (dead_letter, skipped_letter):
        own = (table.c.projection == "") & table.c.stream_sequence.in_(met)
        known.update(connection.scalars(select(table.c.stream_sequence).where(own)))
    return [letter for letter in letters if letter["projection"] or letter["stream_sequence"] not in known]
