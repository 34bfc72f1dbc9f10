"""For users of Alembic: leaving the tables that the kernel makes out of `alembic revision --autogenerate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from sqlalchemy import Connection, inspect, select

from projections.declaration import DeclaredProjection
from projections.naming import OWN, table_of
from projections.tables import generation_table

IncludeObject = Callable[[Any, str | None, str, bool, Any], bool]


def alembic_filter(projections: Iterable[DeclaredProjection], connection: Connection) -> IncludeObject:
    """Return an `include_object` for `context.configure` in Alembic's env.py.

    Autogenerate then leaves alone what the service makes and drops itself: the kernel's tables, the tables of every
    generation, also of projections that the app no longer declares, and the models of projections, which the database
    shows as views. Tables of one's own, also in the same `MetaData`, are compared as usual.

    Args:
        projections: the app's, `app.projections`.
        connection: the one that Alembic was given.
    """
    models = {table_of(model).key for declared in projections for model in declared.models}

    @cache
    def generations() -> frozenset[str]:
        # not sooner: Alembic would take a transaction that is open already for the caller's, and would not commit it
        if not inspect(connection).has_table(generation_table.name):
            return frozenset()
        return frozenset(connection.scalars(select(generation_table.c.physical)))

    def include_object(found: Any, name: str | None, type_: str, reflected: bool, _compare_to: Any) -> bool:
        if type_ != "table" or name is None:
            return True
        if reflected:
            return not name.startswith(OWN) and name not in generations()
        return found.key not in models

    return include_object
