"""Frozen generations: tables as of a moment, under a view of their own. Nothing keeps them up to date."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, select, update

from projections import views
from projections.adoption import adopt
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.exclusions import load_skipped
from projections.fold import Plan
from projections.generations import Generation, create, drop_generation, recorded, shown
from projections.heads import mark_keepers
from projections.naming import MAX_BYTES
from projections.tables import generation_table, projection
from projections.views import View

FREEZING, FROZEN = "freezing", "frozen"


def begin(
    engine: Engine, plan: Plan, projections: Sequence[DeclaredProjection], view: str, partitions: Sequence[int]
) -> Generation:
    """Create the empty tables of a frozen generation.

    Args:
        plan: of the one projection. It is given the events that a person has skipped.
        projections: all of the app's.

    Raises:
        SchemaError: the name can't be used, or the projection has several tables.
    """
    (declared,) = plan.projections
    if len(declared.models) != 1:
        raise SchemaError(f"{declared.name} has {len(declared.models)} tables; only one can be shown under one name")
    if not view.isidentifier() or len(view.encode()) > MAX_BYTES:
        raise SchemaError(
            f"{view!r} can't be the name of a table: use letters, digits and _; {MAX_BYTES} bytes at most"
        )
    with engine.begin() as connection:
        adopt(connection, projections)
        for number in _unfinished(connection, declared.name, view):
            drop_generation(connection, declared.name, number)
        if views.exists(connection, View(None, view)):
            raise SchemaError(
                f"there is a view {view}; choose another name, or drop a frozen table of this name with `eskernel "
                f"projections drop {declared.name} --as {view}`"
            )
        made = create(connection, declared, partitions)
        mine = (projection.c.name == made.name) & (projection.c.generation == made.number)
        connection.execute(update(projection).where(mine).values(state=FREEZING))
        tables = (generation_table.c.projection == made.name) & (generation_table.c.generation == made.number)
        connection.execute(update(generation_table).where(tables).values(schema="", view=view))
        mark_keepers(connection, projections, [made], new=True)
        load_skipped(connection, plan)
        return made


def _unfinished(connection: Connection, name: str, view: str) -> list[int]:
    """Return the generations that an earlier try has left behind under this name."""
    states = select(projection.c.generation).where(projection.c.name == name, projection.c.state == FREEZING)
    numbers = set(connection.scalars(states))
    return [table.generation for table in recorded(connection, name) if table.generation in numbers
            and table.view == View(None, view)]  # fmt: skip


def show(engine: Engine, made: Generation, view: str) -> None:
    """Show a frozen generation, which is complete, under its name."""
    (table,) = made.tables.values()
    with engine.begin() as connection:
        views.replace(connection, View(None, view), table, shown(table))
        own = (projection.c.name == made.name) & (projection.c.generation == made.number)
        connection.execute(update(projection).where(own).values(state=FROZEN))


def give_up(engine: Engine, made: Generation) -> None:
    """Drop a frozen generation that could not be completed."""
    with engine.begin() as connection:
        drop_generation(connection, made.name, made.number)


def drop_frozen(engine: Engine, name: str, view: str) -> list[str]:
    """Drop a frozen table, and return the names of what was dropped.

    Raises:
        SchemaError: there is none of this name, or others have built on it.
    """
    with engine.begin() as connection:
        states = select(projection.c.generation).where(
            projection.c.name == name, projection.c.state.in_((FREEZING, FROZEN))
        )
        numbers = set(connection.scalars(states))
        found = [table for table in recorded(connection, name) if table.generation in numbers]
        mine = [table for table in found if str(table.view) == view]
        if not mine:
            there = ", ".join(sorted(str(table.view) for table in found)) or "none"
            raise SchemaError(f"{name} has no frozen table {view!r}; it has: {there}")
        for table in mine:
            views.check_droppable(connection, table.view, f"the frozen table {view} is to be dropped")
            views.drop(connection, table.view, {table.physical}.__contains__)
            drop_generation(connection, name, table.generation)
        return [view, *(table.physical for table in mine)]
