"""Queries that people type: one statement that reads, whatever its text is.

Several walls stand behind each other. The text has to be one statement that begins like a query. The transaction is
read-only, and it is rolled back. SQLite opens the file for reading, and asks about each action. What a read-only
transaction of PostgreSQL does not stop, such as writing files, is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from projections.errors import QueryRefused

_BEGINNINGS = {
    "sqlite": ("select", "with", "values", "explain", "pragma"),
    "postgresql": ("select", "with", "values", "table", "explain", "show"),
}
_OUTSIDE = re.compile(
    # PostgreSQL lets these work in a transaction that is read only: on other sessions, on the server, on its files
    r"""\b(
        pg_(?:terminate|cancel)_backend | pg_(?:reload_conf|rotate_logfile|promote|switch_wal|create_restore_point)
        | pg_(?:try_)?advisory_\w+ | pg_(?:backup|start_backup|stop_backup)\w* | pg_wal_replay_\w+
        | pg_\w*replication_\w+ | pg_logical_\w+ | pg_stat_reset\w* | pg_stat_clear_snapshot | pg_stat_statements_reset
        | pg_notify | pg_file_\w+ | pg_export_snapshot | pg_log_backend_memory_contexts | pg_import_system_collations
        | lo_\w+ | lowrite | dblink\w* | set_config | setval | nextval | (?:query|cursor)_to_xml\w*
    )["\s]*(?:\(|/\*|--)""",
    re.IGNORECASE | re.VERBOSE,
)
_ESCAPED_NAME = re.compile(r"\bu&\"", re.IGNORECASE)
_READ_ONLY_TRANSACTION, _SYNTAX = "25006", "42601"
_SQLSTATE_FIELD, _MESSAGE_FIELD = ord("C"), ord("M")
_SQLITE_READONLY, _SQLITE_AUTH = 8, 23


def run_query(engine: Engine, sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Run a query and return its rows.

    Args:
        engine: opened with `open_database(..., read_only=True)`.
        parameters: values for `:name` in the text.

    Raises:
        QueryRefused: the text is not one statement that only reads.
        sqlalchemy.exc.DBAPIError: the database can't run it.
    """
    check_query(sql, engine.dialect.name)
    with engine.connect() as connection:
        try:
            if engine.dialect.name == "postgresql" and not parameters:
                _check_single(connection, sql)
            result = connection.execute(text(sql), dict(parameters or {}))
            return [dict(row) for row in result.mappings()] if result.returns_rows else []
        except DBAPIError as error:
            if (why := _refusal(error)) is not None:
                raise QueryRefused(why) from None
            raise
        except SQLAlchemyError as error:
            if "bind parameter" not in str(error):
                raise
            raise QueryRefused(
                f"{str(error).splitlines()[0].removeprefix('(sqlalchemy.exc.InvalidRequestError) ')}: give its value, "
                "or write \\: for a colon"
            ) from None
        finally:
            connection.rollback()


def check_query(sql: str, backend: str) -> None:
    """Raise `QueryRefused` unless the text begins like a query, and names nothing that works outside of it."""
    first = _first_word(sql, nested=backend == "postgresql")
    allowed = _BEGINNINGS[backend]
    if first not in allowed:
        raise QueryRefused(
            f"a query is read-only, and begins with {', '.join(allowed[:-1]).upper()} or {allowed[-1].upper()}; this "
            f"one begins with {first.upper() or 'nothing'}"
        )
    if backend != "postgresql":
        return
    if found := _OUTSIDE.search(sql):
        raise QueryRefused(f"a query is read-only, and {found[1]}() does more than that")
    if _ESCAPED_NAME.search(sql):
        raise QueryRefused('a query is read-only, and has its names as they are, not as U&"..."')


def _first_word(sql: str, nested: bool) -> str:
    """Return the first word of a statement, in lower case. Comments and parentheses may stand before it."""
    at, depth = 0, 0
    while at < len(sql):
        if depth or sql.startswith("/*", at):
            if sql.startswith("/*", at) and (nested or not depth):
                depth, at = depth + 1, at + 2
            elif sql.startswith("*/", at):
                depth, at = depth - 1, at + 2
            else:
                at += 1
        elif sql.startswith("--", at):
            ends = [end for end in (sql.find("\n", at), sql.find("\r", at) if nested else -1) if end >= 0]
            at = min(ends, default=len(sql))
        elif sql[at].isspace() or sql[at] in "(\ufeff":
            at += 1
        else:
            found = re.match(r"[A-Za-z_]+", sql[at:])
            return found[0].lower() if found else sql[at]
    return ""


def _check_single(connection: Connection, sql: str) -> None:
    """Have the server parse the text, which it does for one statement only.

    The driver sends a text without parameters by a protocol that takes several statements.
    """
    compiled = text(sql).compile(dialect=connection.dialect)
    driver: Any = connection.connection.driver_connection
    if driver is None or compiled.params:
        return
    answer = driver.pgconn.prepare(b"", str(compiled).replace("%%", "%").encode())
    if not answer.error_message:
        return
    state = (answer.error_field(_SQLSTATE_FIELD) or b"").decode()
    said = (answer.error_field(_MESSAGE_FIELD) or answer.error_message).decode(errors="replace").strip()
    if state == _SYNTAX:
        raise QueryRefused(f"a query is one statement: {said}")
    dbapi: Any = connection.dialect.dbapi
    kind = dbapi.errors.lookup(state) if state else dbapi.OperationalError
    raise DBAPIError.instance(sql, None, kind(said), dbapi.Error, dialect=connection.dialect)


def _refusal(error: DBAPIError) -> str | None:
    """Return a sentence about an error, if the database refused to write."""
    said = str(error.orig).splitlines()[0]
    state = getattr(error.orig, "sqlstate", None)
    if state == _READ_ONLY_TRANSACTION:
        return f"a query is read-only: {said}"
    if state == _SYNTAX:
        return f"a query is one statement: {said}"
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None and (code & 0xFF in (_SQLITE_READONLY, _SQLITE_AUTH) or said.startswith("not authorized")):
        return f"a query is read-only: {said}"
    if "one statement at a time" in said:
        return "a query is one statement; this text has several"
    return None
