"""Where every generation of the database stands, for people: its version and state, its place, its tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from projections.generations import PAUSED, recorded
from projections.tables import checkpoint, dead_letter, projection


def read_standing(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Return the generations of each projection, oldest first, as JSON data."""
    of_generation = (checkpoint.c.projection == projection.c.name) & (
        checkpoint.c.generation == projection.c.generation
    )
    rows = connection.execute(
        select(
            projection,
            func.max(checkpoint.c.sequence).label("sequence"),
            func.min(checkpoint.c.sequence).label("lowest"),
            func.min(checkpoint.c.epoch).label("epoch"),
        )
        .outerjoin(checkpoint, of_generation)
        .group_by(*projection.columns)
        .order_by(projection.c.name, projection.c.generation)
    )
    # without attempts they wait for a newer program, and have not failed
    letters = (
        select(dead_letter.c.projection, dead_letter.c.generation, func.count())
        .where(dead_letter.c.attempts > 0)
        .group_by(dead_letter.c.projection, dead_letter.c.generation)
    )
    counted = {(row[0], row[1]): row[2] for row in connection.execute(letters)}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(
            {
                "name": row.name,
                "version": row.version,
                "generation": row.generation,
                "state": row.state,
                "created": row.created,
                "retired": row.retired,
                "sequence": row.sequence,
                "lowest": row.lowest,
                "paused": row.epoch == PAUSED,
                "dead_letters": counted.get((row.name, row.generation), 0),
                "tables": [
                    {"view": str(table.view), "table": table.physical}
                    for table in recorded(connection, row.name, row.generation)
                ],
            }
        )
    return found
