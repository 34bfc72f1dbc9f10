"""One database for one log: each worker's key in the lease bucket names the database that the worker projects into.

One worker projects a partition, into its own database. If the workers of an app had different databases, each database
would lack the partitions of the others. So a worker that brings another database is refused. A database counts while a
worker that uses it holds its key. After all of them have stopped, any database may follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from kernel.errors import DatabaseMismatch
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import NO_STREAM, ApiError, call_api, last_message

Identity = Mapping[str, str]
"""`name` for people; every other entry differs between two databases. An entry that isn't known is left out."""


class User(NamedTuple):
    """A worker, and the database that it projects into.

    Attributes:
        revision: revision of the worker's key, which changes at each renewal.
    """

    worker: str
    database: Identity
    revision: int


def differ(first: Identity, second: Identity) -> bool:
    """Return whether these are two databases."""
    return any(first[key] != second[key] for key in first.keys() & second.keys() - {"name"})


async def find_users(connection: NatsConnection, bucket: str) -> list[User]:
    """Return the live workers that have said which database they project into.

    Raises:
        LogError: the server doesn't answer.
    """
    prefix = f"$KV.{bucket}.w."
    try:
        answer = await call_api(connection, f"STREAM.INFO.KV_{bucket}", {"subjects_filter": f"{prefix}>"})
    except ApiError as error:
        if error.code == NO_STREAM:
            return []
        raise
    subjects = [*(answer["state"].get("subjects") or {})]
    keys = await asyncio.gather(*(last_message(connection, f"KV_{bucket}", subject) for subject in subjects))
    return [
        User(key.subject.removeprefix(prefix), database, key.sequence)
        for key in keys
        if key is not None and (database := _database_of(key.payload))
    ]


def _database_of(value: bytes) -> Identity:
    try:
        database = orjson.loads(value).get("database")
    except (orjson.JSONDecodeError, AttributeError):
        return {}  # another program has written the key
    return database if isinstance(database, dict) else {}


async def check_database(
    connection: NatsConnection, bucket: str, database: Identity, *, worker: str = "", wait: float = 0.0
) -> None:
    """Make sure that no live worker projects into another database.

    Args:
        database: the caller's.
        worker: the caller, which is left out.
        wait: seconds between two looks at a key that names another database. The key of a live worker has another
            revision by then, or one look later; the key of a dead worker expires. 0: don't wait.

    Raises:
        DatabaseMismatch: one does.
        LogError: the server doesn't answer.
    """
    seen: dict[str, int] = {}
    while others := [
        user
        for user in await find_users(connection, bucket)
        if user.worker != worker and differ(user.database, database)
    ]:
        for user in others:
            if not wait or seen.get(user.worker, user.revision) != user.revision:
                raise DatabaseMismatch(_sentence(user, database))
            seen[user.worker] = user.revision
        await asyncio.sleep(wait)


def _sentence(user: User, database: Identity) -> str:
    theirs, ours = user.database.get("name", "?"), database.get("name", "?")
    if theirs == ours:
        ours += ", which is another database of the same name: a copy, or created again"
    return (
        f"the worker {user.worker} of this app projects into the database {theirs}, and this program was given {ours}: "
        "give all of them the same database (--database; for SQLite, --data). To move to another database, stop all "
        "workers first"
    )


def describe_database(database: Identity | None) -> dict[str, Any]:
    """Return what the key of a worker says about its database."""
    return {} if not database else {"database": dict(database)}
