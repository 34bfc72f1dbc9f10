"""A database for one scenario: it touches nothing that exists, and leaves nothing behind.

On PostgreSQL it is a schema of its own, dropped at the end; on SQLite a new file, or memory.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from projections.database import database_url, open_database
from projections.errors import SchemaError

# The schemas that are searched behind the scenario's own: they may have the types and functions of extensions. Those
# with a table of a name that the scenario uses too are left out, so that it can't be taken for the scenario's.
_HARMLESS = """
    SELECT quote_ident(searched) FROM unnest(current_schemas(false)) AS searched WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_class AS found JOIN pg_catalog.pg_namespace AS place ON place.oid = found.relnamespace
        WHERE place.nspname = searched AND (
            starts_with(found.relname, 'eskernel_')
            OR EXISTS (SELECT FROM unnest(CAST(:tables AS text[])) AS ours
                       WHERE found.relname = ours OR starts_with(found.relname, ours || '__'))))"""


@contextmanager
def scratch(database: str | None, tables: Collection[str]) -> Iterator[Engine]:
    """Yield an engine on an empty database.

    Args:
        database: URL of a database; SQLite in memory if there is none.
        tables: names of the tables that will be created, besides the kernel's own.

    Raises:
        SchemaError: the URL is not one, the SQLite file exists, or the user may not create a schema.
    """
    if database is None:
        engine = _memory()
        try:
            yield engine
        finally:
            engine.dispose()
        return
    url = database_url(database)
    if url.get_backend_name() == "postgresql":
        with _schema(database, tables) as engine:
            yield engine
        return
    file = Path(url.database) if url.database and url.database != ":memory:" else None
    if file is not None and file.exists():
        raise SchemaError(f"{file} exists; name a new file, which the scenario creates and removes")
    engine = open_database(database)
    try:
        yield engine
    finally:
        engine.dispose()
        for ending in ("", "-wal", "-shm", "-journal") if file is not None else ():
            Path(f"{file}{ending}").unlink(missing_ok=True)


def _memory() -> Engine:
    # the database lives in its only connection, which one transaction has at a time
    only: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    engine = create_engine("sqlite://", connect_args={"check_same_thread": False}, **only)
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


@contextmanager
def _schema(database: str, tables: Collection[str]) -> Iterator[Engine]:
    name = f"eskernel_scenario_{uuid.uuid4().hex[:16]}"
    outside = open_database(database)
    try:
        with outside.begin() as connection:
            path = ", ".join([name, *connection.scalars(text(_HARMLESS), {"tables": list(tables)})])
            try:
                connection.exec_driver_sql(f"CREATE SCHEMA {name}")
            except DBAPIError as error:
                raise SchemaError(
                    f"the scenario needs a schema of its own: {str(error.orig).splitlines()[0]}; allow the user to "
                    "create one with GRANT CREATE ON DATABASE, or name another database"
                ) from None
        inside = open_database(database)

        def search(connection: Connection) -> None:
            # for one transaction at a time: a pooler may give the next one to another session
            connection.exec_driver_sql(f"SET LOCAL search_path TO {path}")

        event.listen(inside, "begin", search)
        try:
            yield inside
        finally:
            inside.dispose()
            with outside.begin() as connection:
                connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    finally:
        outside.dispose()
