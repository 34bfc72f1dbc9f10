"""Opening the projection database, the same way everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from projections.errors import SchemaError

_READS = "eskernel_reads"


def database_url(text: str) -> URL:
    """Return the URL with its driver named.

    Raises:
        SchemaError: it is no URL, or a database that is not supported.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise SchemaError(
            f"{text!r} is not a database URL; use sqlite:///file.db or postgresql://user:password@host/name"
        ) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise SchemaError(
            f"{backend!r} is not supported; use sqlite:///file.db or postgresql://user:password@host/name"
        )
    return url


def open_database(text: str, *, read_only: bool = False) -> Engine:
    """Return an engine.

    Writers on SQLite begin with the write lock (`BEGIN IMMEDIATE`) in WAL mode, and wait for it up to 30 s. On both
    databases a commit may be lost in a power cut, never torn: rows and checkpoint are one transaction, and what is
    missing is folded again from the log. So commits need not wait for the disk.

    Args:
        read_only: refuse writes; for queries that people type.
    """
    url = database_url(text)
    if url.get_backend_name() == "postgresql":
        options = "-c synchronous_commit=off"
        if read_only:
            options += " -c default_transaction_read_only=on"
        return create_engine(url, connect_args={"options": options, "connect_timeout": 10}, pool_pre_ping=read_only)
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # the driver's own transaction control doesn't cover DDL; SQLAlchemy's recipe is to switch it off
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA cache_size=-65536")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reading = read_only or connection.get_execution_options().get(_READS)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def reads(engine: Engine) -> Engine:
    """Return the same engine for transactions that only read: on SQLite they don't queue for the write lock."""
    return engine.execution_options(**{_READS: True})


def is_infrastructure(error: BaseException) -> bool:
    """Say whether the database, and not the data or the statement, is to blame: then waiting and trying again helps."""
    if isinstance(error, OperationalError | InterfaceError):
        return "no such" not in str(error.orig) and "syntax error" not in str(error.orig)
    return isinstance(error, DBAPIError) and error.connection_invalidated
