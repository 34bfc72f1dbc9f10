"""The identity of a database: the same for every worker that uses it, and another for a copy of it.

The database keeps an id, made once. A copy has the same id, so the identity also says where the database is: the
number of the file, or what PostgreSQL's server calls itself, the database and the table.
"""

from __future__ import annotations

import uuid
from typing import Final

from sqlalchemy import Connection, Engine, func, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from projections.database import reads
from projections.sqlite import DatabaseFile
from projections.tables import database
from projections.urls import readable_name, sqlite_file

Identity = dict[str, str]
"""`name` for people; every other entry differs between two databases. An entry that can't be found out is left out."""

_SYSTEM: Final = text("SELECT system_identifier::text FROM pg_control_system()")
_PLACE: Final = text(
    "SELECT (SELECT oid FROM pg_database WHERE datname = current_database())::text AS number, "
    "to_regclass('eskernel_database')::oid::text AS place, current_schema() AS schema"
)


def read_identity(engine: Engine) -> Identity:
    """Return the database's identity. The id is empty if the database has none yet: then no worker uses it."""
    with reads(engine).connect() as connection:
        return _read(connection)


def identify(engine: Engine) -> Identity:
    """Return the database's identity. A database without one gets it now."""
    with engine.begin() as connection:
        if connection.scalar(select(func.count()).select_from(database)) == 0:
            connection.execute(insert(database).values(id=str(uuid.uuid4())))
        return _read(connection)


def _read(connection: Connection) -> Identity:
    engine = connection.engine
    found = {"name": readable_name(engine.url), "id": ""}
    if not inspect(connection).has_table(database.name):
        return found
    found["id"] = connection.scalar(select(func.min(database.c.id))) or ""
    if engine.dialect.name == "postgresql":
        return found | _read_place(connection, found["name"])
    file = sqlite_file(engine.url)
    if file is not None and (current := DatabaseFile(file).current()) is not None:
        # not the device: the same file system has different numbers on two machines
        found["file"] = str(current[1])
    return found


def _read_place(connection: Connection, name: str) -> Identity:
    place = connection.execute(_PLACE).one()
    found = {"database": place.number, "table": place.place}
    if place.schema not in ("public", None):
        found["name"] = f"{name}, schema {place.schema}"
    try:
        with connection.begin_nested():
            system = connection.scalar(_SYSTEM)
    except DBAPIError:
        return found  # the role may not see it
    return found if system is None else found | {"system": system}
