"""Checks of a database, before anything is written to it: its encoding, its version, and what the role may do."""

from __future__ import annotations

import sqlite3

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from projections.database import reads
from projections.errors import SchemaError
from projections.urls import readable_name, sqlite_file

OLDEST_POSTGRESQL = 12
OLDEST_SQLITE = (3, 35, 0)
_UNUSABLE = {3: "not accessible", 8: "read-only", 11: "damaged", 14: "not accessible", 23: "not accessible"}
_BUSY, _LOCKED, _NOT_A_DATABASE = 5, 6, 26
_STATE = text(
    "SELECT current_setting('server_encoding') AS encoding, current_setting('server_version_num')::integer AS version, "
    "pg_is_in_recovery() AS standby, current_setting('default_transaction_read_only') AS read_only, "
    "current_user AS role, current_schema() AS schema, current_setting('search_path') AS search_path"
)
_RIGHTS = text("SELECT has_schema_privilege(current_schema(), 'CREATE')")
_FOREIGN_TABLES = text(
    "SELECT relname AS name, pg_get_userbyid(relowner) AS owner FROM pg_class "
    "WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relname LIKE 'eskernel\\_%' AND NOT "
    "(has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE') "
    "AND has_table_privilege(oid, 'DELETE')) ORDER BY relname LIMIT 1"
)


def check_usable(engine: Engine) -> None:
    """Make sure that the database can hold projections: its encoding, its version, and what the role may do.

    Raises:
        SchemaError: it can't; the message says why, and what helps.
        sqlalchemy.exc.DBAPIError: it can't be reached.
    """
    if engine.dialect.name == "postgresql":
        _check_postgresql(engine)
    else:
        _check_sqlite(engine)


def _check_postgresql(engine: Engine) -> None:
    name = readable_name(engine.url)
    with reads(engine).connect() as connection:
        state = connection.execute(_STATE).one()
        if state.version < OLDEST_POSTGRESQL * 10_000:
            raise SchemaError(
                f"{name} is PostgreSQL {state.version // 10_000}, which is too old: use PostgreSQL {OLDEST_POSTGRESQL} "
                "or newer"
            )
        if state.encoding != "UTF8":
            raise SchemaError(
                f"the database {name} has the encoding {state.encoding}, which lacks letters that events may hold: "
                "create the database with ENCODING 'UTF8' TEMPLATE template0, and name that one in database.url"
            )
        if state.standby:
            raise SchemaError(
                f"{name} is a standby, which takes no writes: name the primary server in database.url, or several "
                "hosts and target_session_attrs=read-write"
            )
        if state.read_only == "on":
            raise SchemaError(
                f"{name} is not writable for the role {state.role}: default_transaction_read_only is on; set it off "
                "for the server, the database and the role"
            )
        if state.schema is None:
            raise SchemaError(
                f"the role {state.role} has no schema in {name}: search_path is {state.search_path}; create a schema "
                f"that is named there, and GRANT USAGE, CREATE ON SCHEMA ... TO {state.role}"
            )
        if not connection.scalar(_RIGHTS):
            raise SchemaError(
                f"the role {state.role} may not create tables in the schema {state.schema} of {name}: "
                f"GRANT CREATE ON SCHEMA {state.schema} TO {state.role}"
            )
        foreign = connection.execute(_FOREIGN_TABLES).first()
        if foreign is not None:
            raise SchemaError(
                f"the role {state.role} may not write the table {foreign.name} of {name}, which belongs to "
                f"{foreign.owner}: use that role, or give the tables to {state.role} with REASSIGN OWNED"
            )


def _check_sqlite(engine: Engine) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise SchemaError(
            f"Python's SQLite is {sqlite3.sqlite_version}, which is too old: use a Python with SQLite "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or newer"
        )
    file = sqlite_file(engine.url)
    try:
        with engine.connect() as connection:
            # it is rolled back
            connection.execute(text("CREATE TABLE eskernel_check (n INTEGER)"))
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code == _NOT_A_DATABASE:
            raise SchemaError(f"{file} is not a database of SQLite: name another file in database.url") from None
        if code in _UNUSABLE:
            raise SchemaError(
                f"the database file {file} is {_UNUSABLE[code]} ({error.orig}): allow this user to write the file and "
                "its folder, or name another file in database.url"
            ) from None
        if code not in (_BUSY, _LOCKED):
            raise
