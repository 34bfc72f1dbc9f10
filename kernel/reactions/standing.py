"""Where the policies and effects of a database stand, for people."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine, func, inspect, select

from kernel.reactions import letters, timers
from kernel.reactions.store import NUMBER
from kernel.reactions.timers import MICROS
from projections.database import reads
from projections.generations import PAUSED
from projections.tables import checkpoint, reaction, rejection


@dataclass(frozen=True, slots=True)
class Standing:
    """A policy or an effect as the database knows it.

    Attributes:
        began: stream sequence after which it began.
        lowest, highest: of its checkpoints.
        parked: aggregates whose events wait behind a dead letter.
        rejected: commands that were rejected, as far as they are kept.
        timers, late, failed: timers that are pending; those that are overdue; those whose command has failed.
    """

    name: str
    kind: str
    began: int
    created: str
    lowest: int
    highest: int
    paused: bool
    parked: int
    rejected: int
    timers: int
    late: int
    failed: int


def read_standings(engine: Engine, now: float) -> list[Standing]:
    """Return every policy and effect that has run on the database.

    Args:
        now: the Unix time.
    """
    if not inspect(engine).has_table(reaction.name):
        return []
    parked = letters.count(engine)
    pending = timers.counts(engine, int((now - 1.0) * MICROS))
    of_reaction = (checkpoint.c.projection == reaction.c.name) & (checkpoint.c.generation == NUMBER)
    query = (
        select(
            reaction,
            func.coalesce(func.min(checkpoint.c.sequence), 0).label("lowest"),
            func.coalesce(func.max(checkpoint.c.sequence), 0).label("highest"),
            func.min(checkpoint.c.epoch).label("epoch"),
        )
        .outerjoin(checkpoint, of_reaction)
        .group_by(*reaction.columns)
        .order_by(reaction.c.name)
    )
    with reads(engine).connect() as connection:
        refused = {
            name: int(number)
            for name, number in connection.execute(
                select(rejection.c.policy, func.count()).group_by(rejection.c.policy)
            )
        }
        return [
            Standing(
                row.name, row.kind, row.began, row.created, row.lowest, row.highest, row.epoch == PAUSED,
                parked.get(row.name, 0), refused.get(row.name, 0), *pending.get(row.name, (0, 0, 0)),
            )
            for row in connection.execute(query)
        ]  # fmt: skip
