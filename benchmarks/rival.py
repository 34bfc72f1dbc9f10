"""The `eventsourcing` library on the same account: load, decide, save."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.sqlite import SQLiteConnectionPool
from psycopg import conninfo

FAST_FORWARD = {
    "AGGREGATE_CACHE_MAXSIZE": "10000",
    "DEEPCOPY_FROM_AGGREGATE_CACHE": "n",
    "POSTGRES_ENABLE_DB_FUNCTIONS": "y",
}
"""Its fastest settings for any number of processes: its cache queries the database for new events at each load."""
NO_LOADING = {**FAST_FORWARD, "AGGREGATE_CACHE_FASTFORWARD": "n"}
"""The same without that query, for one process that owns its aggregates: then a command doesn't load at all."""


class Account(Aggregate):
    def __init__(self) -> None:
        self.balance = 0

    @event("Deposited")
    def deposit(self, cents: int) -> None:
        self.balance += cents


class Accounts(Application[UUID]):
    def open(self) -> UUID:
        account = Account()
        self.save(account)
        return account.id

    def deposit(self, account: UUID, cents: int) -> int:
        loaded: Account = self.repository.get(account)
        if cents <= 0:
            raise ValueError("a deposit must be positive")
        loaded.deposit(cents)
        return self.save(loaded)[-1].notification.id


def postgres(url: str, **more: str) -> dict[str, str]:
    """Return the library's settings for a PostgreSQL database."""
    parts = conninfo.conninfo_to_dict(url)
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": str(parts["dbname"]),
        "POSTGRES_HOST": str(parts["host"]),
        "POSTGRES_PORT": str(parts.get("port", 5432)),
        "POSTGRES_USER": str(parts["user"]),
        "POSTGRES_PASSWORD": "",
        **more,
    }


def sqlite(path: Path, **more: str) -> dict[str, str]:
    """Return the library's settings for an SQLite file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(path), **more}


class relaxed_sqlite:  # noqa: N801 - used as a function
    """A context in which the library's new SQLite connections don't wait for the disk at each commit.

    The library has no setting for that. Without it, comparing it with ours, which doesn't wait either, would be unfair.
    """

    def __enter__(self) -> None:
        self._create = create = SQLiteConnectionPool._create_connection

        def relaxed(pool: SQLiteConnectionPool) -> Any:
            made = create(pool)
            found: sqlite3.Connection = made._sqlite_conn
            found.execute("PRAGMA synchronous=NORMAL")
            return made

        SQLiteConnectionPool._create_connection = relaxed  # type: ignore[method-assign]

    def __exit__(self, *_error: object) -> None:
        SQLiteConnectionPool._create_connection = self._create  # type: ignore[method-assign]


class Commands:
    """One application with accounts to work on."""

    def __init__(self, settings: dict[str, str], accounts: int) -> None:
        self.app = Accounts(settings)
        self.accounts = [self.app.open() for _ in range(accounts)]

    def run(self, seconds: float) -> tuple[float, list[float]]:
        """Deposit, one command after the other; return commands per second and what each took."""
        took: list[float] = []
        deposit, accounts = self.app.deposit, self.accounts
        begin = now = time.perf_counter()
        while now - begin < seconds:
            deposit(accounts[len(took) % len(accounts)], 1)
            before, now = now, time.perf_counter()
            took.append(now - before)
        return len(took) / (now - begin), took

    def close(self) -> None:
        self.app.close()
