"""Opens the projection database, with the same options everywhere."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from projections.errors import SchemaError
from projections.postgresql import Sessions, check_parameters, connection_arguments, session_settings
from projections.sqlite import DatabaseFile, FileReplaced, authorize
from projections.urls import database_url, read_only_url, sqlite_file

__all__ = ["database_url", "is_infrastructure", "open_database", "reads"]

_READS = "eskernel_reads"
FAULTS_OF_DATA = ("0A", "21", "22", "23", "27", "2F", "38", "39", "42", "44", "54", "P0")
"""SQLSTATE classes of errors that a statement or its values cause."""
_INSUFFICIENT_PRIVILEGE, _TRANSACTION_FAILED = "42501", "25P02"
_SQLITE_ITSELF = {3, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 23, 26}
"""PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, AUTH, NOTADB."""


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

    What the URL's query says goes before these arguments.

    Args:
        read_only: refuse writes, for queries that people type. See `projections.queries` too.
        pool_size: connections kept open.
        max_overflow: further connections while all of those are in use.
        pool_timeout: seconds to wait for a connection while all are in use.
        pool_recycle: age in seconds at which a connection is replaced; -1 never.
        connect_timeout: seconds to wait for a new connection (PostgreSQL).
        lock_timeout: seconds to wait for a lock that another connection holds.

    Raises:
        SchemaError: the URL can't be used, or the driver is not installed.
    """
    url = database_url(text)
    pool: dict[str, Any] = {
        "pool_size": pool_size,
        "max_overflow": max_overflow,
        "pool_timeout": pool_timeout,
        "pool_recycle": pool_recycle,
    }
    if url.get_backend_name() == "postgresql":
        return _open_postgresql(url, read_only, connect_timeout, lock_timeout, pool)
    return _open_sqlite(url, read_only, lock_timeout, pool)


def _open_postgresql(
    url: URL, read_only: bool, connect_timeout: int, lock_timeout: float, pool: dict[str, Any]
) -> Engine:
    settings, others = session_settings(
        url, synchronous_commit="off", lock_timeout=f"{max(1, round(lock_timeout * 1000))}ms"
    )
    prepares = "prepare_threshold" in url.query
    url, arguments = connection_arguments(url, connect_timeout)
    if read_only:
        # the server fixes the columns of a prepared `select *`: after a cut-over that adds one it would fail
        arguments.setdefault("prepare_threshold", None)
    try:
        engine = create_engine(
            url,
            connect_args=arguments,
            pool_pre_ping=read_only,
            execution_options={"postgresql_readonly": True} if read_only else {},
            **pool,
        )
    except ModuleNotFoundError as error:
        raise SchemaError(
            f"database.url names PostgreSQL, and its driver {error.name} is not installed; run "
            "`pip install 'eskernel[postgres]'`"
        ) from None
    check_parameters(engine)
    Sessions(engine, settings, others, prepares)
    return engine


def _open_sqlite(url: URL, read_only: bool, lock_timeout: float, pool: dict[str, Any]) -> Engine:
    path = sqlite_file(url)
    file = DatabaseFile(path) if path is not None else None
    if path is not None and not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SchemaError(
                f"the folder of the database file {path} can't be created: {error.strerror}; change database.url"
            ) from None
    arguments: dict[str, Any] = {"timeout": lock_timeout, "check_same_thread": False}
    arguments = {name: value for name, value in arguments.items() if name not in url.query}
    # a database in memory lives in its only connection
    engine = create_engine(
        read_only_url(url) if read_only else url, connect_args=arguments, **(pool if file is not None else {})
    )

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, _record: Any, places: Any, keywords: dict[str, Any]) -> Any:
        if file is not None and not read_only:
            file.check()  # SQLite would create an empty file in place of the one that is gone
        return dialect.connect(*places, **keywords)

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        # the driver's own transaction control doesn't include DDL; SQLAlchemy's recipe is to switch it off
        connection.isolation_level = None
        cursor = connection.cursor()
        if not read_only:
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA cache_size=-65536")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
            connection.set_authorizer(authorize)
        cursor.close()
        if file is not None:
            file.open()
            record.info[_READS] = file.current()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if file is not None and not read_only:
            file.check()
        reading = read_only or connection.get_execution_options().get(_READS)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    if read_only and file is not None:

        @event.listens_for(engine, "checkout")
        def _checkout(_connection: Any, record: Any, _proxy: Any) -> None:
            if record.info.get(_READS) != file.current():
                raise DisconnectionError("the database's file is another one by now")

    return engine


def reads(engine: Engine) -> Engine:
    """Return the same engine for read-only transactions: on SQLite they don't wait for the write lock."""
    return engine.execution_options(**{_READS: True})


def is_infrastructure(error: BaseException) -> bool:
    """Return whether the database caused the error, not the data or the statement: then trying again later helps."""
    if isinstance(error, PoolTimeout | FileReplaced):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state:
        blamed = state[:2] in FAULTS_OF_DATA or state == _TRANSACTION_FAILED
        return not blamed or state == _INSUFFICIENT_PRIVILEGE
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_ITSELF
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
