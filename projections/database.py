"""Opening the projection database, the same way everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from projections.errors import SchemaError

_READS = "eskernel_reads"
_KEEP_ALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""A host that is gone is noticed after seconds rather than after hours."""
_FAULTS_OF_DATA = ("0A", "21", "22", "23", "27", "2F", "38", "39", "42", "44", "54", "P0")
"""SQLSTATE classes of what a statement or its values are to blame for."""
_INSUFFICIENT_PRIVILEGE, _TRANSACTION_FAILED = "42501", "25P02"
_SQLITE_ITSELF = {3, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 23, 26}
"""PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, AUTH, NOTADB."""


def database_url(text: str) -> URL:
    """Return the URL with its driver named.

    Raises:
        SchemaError: it is no URL, or a database that is not supported.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise SchemaError(
            "database.url is not a URL; use sqlite:///file.db or postgresql://user:password@host/name"
        ) from None
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise SchemaError(
            f"{backend!r} is not supported; use sqlite:///file.db or postgresql://user:password@host/name"
        )
    return url


def open_database(
    text: str,
    *,
    read_only: bool = False,
    pool_size: int = 5,
    max_overflow: int = 5,
    pool_timeout: float = 10.0,
    pool_recycle: int = -1,
    connect_timeout: int = 10,
    lock_timeout: float = 5.0,
) -> Engine:
    """Return an engine.

    Writers on SQLite begin with the write lock (`BEGIN IMMEDIATE`) in WAL mode, and wait for it for
    seconds; so do those on PostgreSQL for the locks of others. Then they are told, and try again. On both
    databases a commit may be lost in a power cut, never torn: rows and checkpoint are one transaction, and what is
    missing is folded again from the log. So commits need not wait for the disk.

    Args:
        read_only: refuse writes; for queries that people type.
        pool_size, max_overflow: connections kept open, and further ones when those are in use.
        pool_timeout: seconds to wait for a connection when all are in use.
        pool_recycle: age in seconds at which a connection is replaced; -1 never.
        connect_timeout: seconds for making a connection (PostgreSQL).
        lock_timeout: seconds to wait for somebody else's lock.
    """
    url = database_url(text)
    pool: dict[str, Any] = {
        "pool_size": pool_size,
        "max_overflow": max_overflow,
        "pool_timeout": pool_timeout,
        "pool_recycle": pool_recycle,
    }
    if url.get_backend_name() == "postgresql":
        options = f"-c synchronous_commit=off -c lock_timeout={max(1, round(lock_timeout * 1000))}"
        if read_only:
            options += " -c default_transaction_read_only=on"
        arguments = {"options": options, "connect_timeout": connect_timeout, **_KEEP_ALIVE}
        return create_engine(url, connect_args=arguments, pool_pre_ping=read_only, **pool)
    shared = url.database in (None, "", ":memory:")  # such a database is its one connection
    if url.database and not shared:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, connect_args={"timeout": lock_timeout, "check_same_thread": False}, **({} if shared else pool)
    )

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
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state:
        blamed = state[:2] in _FAULTS_OF_DATA or state == _TRANSACTION_FAILED
        return not blamed or state == _INSUFFICIENT_PRIVILEGE
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_ITSELF
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
