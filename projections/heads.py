"""Generations that know every aggregate they have folded, so that a missing first event is noticed.

Such a generation has a mark among its sequences, under an id that no aggregate has. It loses the mark when it is no
longer the one that stores the sequences of its aggregate type, since other events are folded meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from projections.declaration import DeclaredProjection, keepers_of
from projections.generations import Generation, positions
from projections.tables import sequence

MARK = ""


def mark_keepers(connection: Connection, declared: Sequence[DeclaredProjection], made: Sequence[Generation]) -> None:
    """Mark the generations that store sequences from their first event on, and no others.

    Args:
        declared: all projections of the app.
        made: generations of some of them, in the order in which they are folded.
    """
    names = {declared[index].name for index in keepers_of(declared).values()}
    names &= {made[index].name for index in keepers_of([generation.projection for generation in made]).values()}
    for generation in made:
        own = (
            (sequence.c.projection == generation.name)
            & (sequence.c.generation == generation.number)
            & (sequence.c.aggregate_id == MARK)
        )
        if generation.name not in names:
            connection.execute(delete(sequence).where(own))
        elif not any(positions(connection, generation).values()) and not connection.scalar(
            select(sequence.c.projection).where(own)
        ):
            connection.execute(
                insert(sequence).values(
                    projection=generation.name, generation=generation.number, aggregate_id=MARK, sequence=0
                )
            )
