"""Generations that an older program has made, before there was a list of their tables: they are put on the list."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, insert, inspect, select

from projections import views
from projections.declaration import DeclaredProjection
from projections.generations import generation
from projections.records import SEQUENCE
from projections.tables import generation_table, projection
from projections.views import View


def adopt(connection: Connection, projections: Sequence[DeclaredProjection]) -> None:
    """Record the tables of generations that a program before this list of tables has made."""
    listed = select(generation_table.c.projection, generation_table.c.generation)
    known = {(row.projection, row.generation) for row in connection.execute(listed)}
    every = [
        (row.name, row.generation) for row in connection.execute(select(projection.c.name, projection.c.generation))
    ]
    unlisted = [key for key in every if key not in known]
    if not unlisted:
        return
    there = set(inspect(connection).get_table_names())
    by_name = {declared.name: declared for declared in projections}
    rows = []
    for name, number in unlisted:
        if name in by_name:
            own = generation(by_name[name], number).views
            rows += [(name, number, view, table.name) for view, table in own.items() if table.name in there]
    for name, number in _shown_by_no_other(connection, {key for key in unlisted if key[0] not in by_name}):
        for table_name in sorted(there - {row[3] for row in rows}):
            view = View(None, table_name.rpartition("__")[0])
            # a table without this column may be the user's own; it is left alone
            if (
                table_name == f"{view.name}__{number}"
                and SEQUENCE in {column["name"] for column in inspect(connection).get_columns(table_name)}
                and views.shows(connection, view) == table_name
            ):
                numbered = {own: f"{view.name}__{own}" for own in (key[1] for key in unlisted if key[0] == name)}
                rows += [(name, own, view, table) for own, table in numbered.items() if table in there]
    for name, number, view, physical in rows:
        connection.execute(
            insert(generation_table).values(
                projection=name, generation=number, schema=view.schema or "", view=view.name, physical=physical
            )
        )


def _shown_by_no_other(connection: Connection, unlisted: set[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the live generations among these whose number no other one has: only their views tell whose they are."""
    live = select(projection.c.name, projection.c.generation).where(projection.c.state == "live")
    found = [(row.name, row.generation) for row in connection.execute(live) if (row.name, row.generation) in unlisted]
    return [key for key in found if [number for _, number in found].count(key[1]) == 1]
