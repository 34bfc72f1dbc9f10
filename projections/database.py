"""Opens the projection database, with the same options everywhere."""

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
"""They detect a host that has disappeared after seconds instead of hours."""
_FAULTS_OF_DATA = ("0A", "21", "22", "23", "27", "2F", "38", "39", "42", "44", "54", "P0")
"""SQLSTATE classes of errors that a statement or its values cause."""
_INSUFFICIENT_PRIVILEGE, _TRANSACTION_FAILED = "42501", "25P02"
_SQLITE_ITSELF = {3, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 23, 26}
"""PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, AUTH, NOTADB."""


def database_url(text: str) -> URL:
    """Return the URL with an explicit driver.

    Raises:
        SchemaError: the text is not a URL, or the database is not supported.
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

    SQLite is opened in WAL mode, and a writer begins with the write lock (`BEGIN IMMEDIATE`). On both databases a
    writer waits up to `lock_timeout` for a lock. Then the statement fails, and the caller tries again.

    Commits don't wait for the disk. A power cut may lose the latest transactions, but never a part of one. Rows and
    checkpoint are one transaction, so the lost events are folded again from the log.

    Args:
        read_only: refuse writes, for queries that people type.
        pool_size: connections kept open.
        max_overflow: further connections while all of those are in use.
        pool_timeout: seconds to wait for a connection while all are in use.
        pool_recycle: age in seconds at which a connection is replaced; -1 never.
        connect_timeout: seconds to wait for a new connection (PostgreSQL).
        lock_timeout: seconds to wait for a lock that another connection holds.
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
        try:
            return create_engine(url, connect_args=arguments, pool_pre_ping=read_only, **pool)
        except ModuleNotFoundError as error:
            raise SchemaError(
                f"database.url names PostgreSQL, and its driver {error.name} is not installed; run "
                "`pip install 'eskernel[postgres]'`"
            ) from None
    shared = url.database in (None, "", ":memory:")  # such a database lives in its only connection
    if url.database and not shared:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, connect_args={"timeout": lock_timeout, "check_same_thread": False}, **({} if shared else pool)
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # the driver's own transaction control doesn't include DDL; SQLAlchemy's recipe is to switch it off
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
    """Return the same engine for read-only transactions: on SQLite they don't wait for the write lock."""
    return engine.execution_options(**{_READS: True})


def is_infrastructure(error: BaseException) -> bool:
    """Return whether the database caused the error, not the data or the statement: then trying again later helps."""
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
