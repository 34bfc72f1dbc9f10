"""SQLite: connections that only read, and the file under a running service."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from projections.errors import SchemaError

OLDEST = (3, 35, 0)
_READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_SAVEPOINT,
}
_DECLARED = (sqlite3.SQLITE_UPDATE, "sqlite_master")
"""What SQLite asks for when a table-valued function, such as json_each, is used for the first time."""
_FUNCTIONS = {"load_extension", "writefile", "edit", "fts3_tokenizer"}
_PRAGMAS = {
    *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"),
    *("foreign_key_list", "foreign_key_check", "integrity_check", "quick_check"),
}
"""Pragmas whose argument names what is shown. The argument of any other pragma would change something."""


def authorize(action: int, first: str | None, second: str | None, _database: str | None, _by: str | None) -> int:
    """Say for SQLite's authorizer whether a connection that only reads may do this."""
    if action == sqlite3.SQLITE_FUNCTION:
        allowed = (second or "").lower() not in _FUNCTIONS
    elif action == sqlite3.SQLITE_PRAGMA:
        name = (first or "").lower()
        allowed = name in _PRAGMAS or (second is None and name not in _ACTIVE_PRAGMAS)
    else:
        allowed = action in _READING or (action, first) == _DECLARED
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


_ACTIVE_PRAGMAS = {"wal_checkpoint", "optimize", "incremental_vacuum", "shrink_memory"}


class FileReplaced(SchemaError):
    """The database's file was deleted or replaced while it was open. Nothing more is written to it."""


class DatabaseFile:
    """The file of a database that is open.

    A process keeps the file that it has opened, also after the file was deleted or replaced. No other process would see
    what it writes then. The path tells: it leads to another file, or to none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, int] | None = None

    def open(self) -> None:
        """Note the file that the path leads to now, unless one was noted before."""
        if self._opened is None:
            self._opened = self.current()

    def current(self) -> tuple[int, int] | None:
        """Return what the path leads to now: device and number of the file, or None."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Raise `FileReplaced` unless the path leads to the file that was opened."""
        if self._opened is None:
            return
        now = self.current()
        if now != self._opened:
            what = "deleted" if now is None else "replaced by another file"
            raise FileReplaced(
                f"the database file {self.path} was {what} while the service ran, so nothing is written any more: "
                "restart the service, which builds from the log what the file lacks"
            )
