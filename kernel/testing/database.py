"""The database of an app under test: made in one go, empty, and read by the test between two writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, event, insert, table
from sqlalchemy import column as named_column
from sqlalchemy.schema import Column, MetaData, Table
from sqlalchemy.types import String

from kernel.app import App
from kernel.reactions import store
from projections.database import reads
from projections.errors import SchemaError
from projections.generations import create, show
from projections.heads import mark_keepers
from projections.identity import identify
from projections.naming import database_problems
from projections.origin import register
from projections.revision import HEAD, TABLE
from projections.scratch import scratch
from projections.sqlite import authorize
from projections.tables import metadata


@contextmanager
def empty_database(app: App, url: str | None, created: str, partitions: int) -> Iterator[Engine]:
    """Yield an engine on a new database with the kernel's tables, and with those of the app's projections.

    They are what migrations and a first start make; Alembic alone would take longer than a whole test.

    Args:
        url: as for `projections.projected`.
        created: creation time of the log.

    Raises:
        SchemaError: the database can't be used, or refuses what the app declares.
    """
    for declared in app.projections:
        for model in declared.models:
            if url is not None and (schema := model.__table__.schema):  # type: ignore[attr-defined]
                raise SchemaError(
                    f"{model.__name__} is in the schema {schema!r}, where a test could touch what exists; run it "
                    "without `database`"
                )
    with scratch(url, {name for declared in app.projections for name in declared.tables}) as engine:
        if problems := database_problems(engine.dialect.name, app.projections):
            raise SchemaError("\n".join(problems))
        # without a look at what exists: another schema may have tables of these names
        metadata.create_all(engine, checkfirst=False)
        _revision.create_all(engine, checkfirst=False)
        register(engine, app.name, created, partitions, 0)
        if app.reactions:
            store.register(engine, app.reactions, partitions, 0)
        identify(engine)
        with engine.begin() as connection:
            connection.execute(insert(table(TABLE, named_column("version_num"))).values(version_num=HEAD))
            made = [create(connection, declared, range(partitions)) for declared in app.projections]
            mark_keepers(connection, app.projections, made, new=True)
            for generation in made:
                show(connection, generation)
        yield engine


_revision = MetaData()
Table(TABLE, _revision, Column("version_num", String(32), primary_key=True))


def reading_only(engine: Engine) -> Engine:
    """Return the same engine for `run_query`: a transaction of it can't write."""
    if engine.dialect.name == "postgresql":
        reading: Engine = engine.execution_options(postgresql_readonly=True)
        # at once: only within a transaction the tables are found, see `projections.scratch`
        event.listen(reading, "engine_connect", lambda connection: connection.begin())
        return reading
    reading = reads(engine)

    # the database is in its only connection, which is the projector's too: so for one transaction at a time
    @event.listens_for(reading, "begin")
    def _begin(connection: Connection) -> None:
        _driver(connection).set_authorizer(authorize)

    @event.listens_for(reading, "rollback")
    def _end(connection: Connection) -> None:
        _driver(connection).set_authorizer(None)

    return reading


def _driver(connection: Connection) -> sqlite3.Connection:
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    return driver
