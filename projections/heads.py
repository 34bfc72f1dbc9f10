"""Generations that know every aggregate they have folded, so that a missing first event is noticed.

Such a generation has a mark among its sequences, under an id that no aggregate has. It loses the mark when it is no
longer the one that stores the sequences of its aggregate type, since other events are folded meanwhile. It never gets
one back: another program may be folding beside this one, and store nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert

from projections.declaration import DeclaredProjection, keepers_of
from projections.generations import Generation
from projections.tables import sequence

MARK = ""


def mark_keepers(
    connection: Connection, declared: Sequence[DeclaredProjection], made: Sequence[Generation], *, new: bool = False
) -> None:
    """Take the mark from the generations that do not store sequences.

    Args:
        declared: all projections of the app.
        made: generations of some of them, in the order in which they are folded.
        new: they are empty, and nobody else folds them: those that store sequences get the mark.
    """
    names = {declared[index].name for index in keepers_of(declared).values()}
    names &= {made[index].name for index in keepers_of([generation.projection for generation in made]).values()}
    for generation in made:
        stored = (sequence.c.projection == generation.name) & (sequence.c.generation == generation.number)
        if generation.name not in names:
            # another program, which has other projections, may store and need them again: these would be out of date
            connection.execute(delete(sequence).where(stored))
        elif new:
            connection.execute(
                insert(sequence).values(
                    projection=generation.name, generation=generation.number, aggregate_id=MARK, sequence=0
                )
            )
