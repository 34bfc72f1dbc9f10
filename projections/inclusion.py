"""Whether what readers see of a projection includes an event."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, select

from projections.checkpoints import reached
from projections.exclusions import skipped_of
from projections.following import live_version
from projections.parked import Parked
from projections.stored_letters import letter_of
from projections.tables import dead_letter, projection

State = Literal["included", "behind", "parked", "waiting", "skipped", "not built"]


@dataclass(frozen=True, slots=True)
class Inclusion:
    """How far the live generation of a projection has folded an aggregate.

    Attributes:
        version: the one that readers see, 0 if they see none.
        position: stream sequence up to which the aggregate's partition is folded.
        parked: from which event on the aggregate's events are dead letters.
        skipped: sequences of the events that a person has skipped.
    """

    version: int
    position: int
    parked: Parked | None
    skipped: Collection[int]

    def of(self, sequence: int, stream_sequence: int) -> State:
        """Return what has become of an event of the aggregate.

        `parked`: it is a dead letter, or will be one. `waiting`: it waits for a program that can read it, or behind an
        event that does.
        """
        if not self.version:
            return "not built"
        if sequence in self.skipped:
            return "skipped"
        if self.parked is not None and sequence >= self.parked.since:
            return "waiting" if self.parked.waits else "parked"
        return "included" if self.position >= stream_sequence else "behind"


def read_inclusion(connection: Connection, name: str, partition: int, aggregate: str, aggregate_id: str) -> Inclusion:
    """Return how far readers see a projection include an aggregate."""
    live = select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    first = connection.execute(
        select(dead_letter.c.sequence, dead_letter.c.error, dead_letter.c.attempts)
        .where(
            dead_letter.c.projection == name,
            dead_letter.c.generation.in_(live),
            dead_letter.c.aggregate == aggregate,
            dead_letter.c.aggregate_id == aggregate_id,
        )
        .order_by(dead_letter.c.sequence)
        .limit(1)
    ).first()
    return Inclusion(
        live_version(connection, name),
        reached(connection, partition, [name]).get(name, 0),
        None if first is None else Parked(first.sequence, first.error, waits=not first.attempts),
        skipped_of(connection, name, aggregate, [aggregate_id]).get(aggregate_id, frozenset()),
    )


def read_row_inclusion(
    connection: Connection, name: str, aggregate: str, aggregate_id: str, sequence: int, stream_sequence: int
) -> Inclusion:
    """Return how far readers see a projection, whose rows have a key of their own, include one event.

    Args:
        sequence, stream_sequence: the event's places in its aggregate and in the stream.
    """
    live = select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    of_commit = select(dead_letter).where(
        dead_letter.c.projection == name,
        dead_letter.c.generation.in_(live),
        dead_letter.c.stream_sequence == stream_sequence,
    )
    letters = [row for row in connection.execute(of_commit) if letter_of(row).sequence == sequence]
    parked = None
    if letters:
        where = f"row {letters[0].aggregate_id}: " if letters[0].aggregate == name else ""
        parked = Parked(sequence, f"{where}{letters[0].error}")
    return Inclusion(
        live_version(connection, name),
        reached(connection, 0, [name], [name]).get(name, 0),
        parked,
        skipped_of(connection, name, aggregate, [aggregate_id]).get(aggregate_id, frozenset()),
    )
