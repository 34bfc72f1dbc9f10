"""The stream of snapshots, beside the log: the latest of each aggregate. It is a cache: it may be deleted."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from kernel.errors import LogError, StreamMismatch, Unavailable
from kernel.log.base import LogReader
from kernel.log.direct_get import DirectGets
from kernel.log.reader import JetStreamReader, gentle_reader
from kernel.log.repeats import Repeats
from kernel.log.subjects import Subjects
from kernel.settings import Consumer
from kernel.transport.connection import NatsConnection, publish_frame, status_of
from kernel.transport.jetstream_api import NO_STREAM, ApiError, call_api

logger = logging.getLogger("eskernel.log")
_NAME_IN_USE = 10058
HEADERS = 512
"""Bytes of a message that are kept free for what is not the snapshot."""


def snapshots_of(stream: str) -> str:
    """Return the name of the snapshots' stream beside a log's stream."""
    return f"{stream}-snapshots"


class SnapshotStore:
    """Reads and writes snapshots. What it can't write is lost, which costs time and no more.

    Args:
        stream: name of the log's stream.

    Attributes:
        name: name of the snapshots' stream.
        written: number of snapshots that the server took.
    """

    def __init__(self, connection: NatsConnection, stream: str, subjects: Subjects) -> None:
        self.name = snapshots_of(stream)
        self._connection, self._subjects = connection, subjects
        self._gets = DirectGets(connection, self.name)
        self._repeats = Repeats(60.0)
        self._some = True
        self.written = 0

    async def start(self, storage: str, replicas: int) -> None:
        """Create the stream, if it does not exist, and subscribe to answers.

        Raises:
            LogError: the stream can't be created.
            StreamMismatch: another program has made a stream of this name.
        """
        config = {
            "name": self.name,
            "description": "eskernel: snapshots of aggregates, a cache that may be deleted",
            "subjects": [self._subjects.snapshot()],
            "max_msgs_per_subject": 1,
            "discard": "old",
            "storage": storage,
            "num_replicas": replicas,
            "allow_direct": True,
        }
        try:
            answer = await call_api(self._connection, f"STREAM.CREATE.{self.name}", config)
        except ApiError as error:
            if error.code != _NAME_IN_USE:
                raise
            answer = await call_api(self._connection, f"STREAM.INFO.{self.name}", None)
        found = answer["config"]
        if found.get("subjects") != config["subjects"] or found.get("max_msgs_per_subject") != 1:
            raise StreamMismatch(
                f"the stream {self.name} exists, and can't hold snapshots: delete it (`nats stream rm {self.name}`), "
                "and the service makes its own"
            )
        self._some = bool(answer["state"]["messages"])
        await self.listen()

    async def listen(self) -> None:
        """Subscribe to answers."""
        await self._gets.start()
        inbox = self._connection.new_inbox()
        self._inbox = inbox.encode()
        self._stop_listening = await self._connection.listen(inbox, self._acknowledged)

    async def close(self) -> None:
        """Take no more answers."""
        await self._gets.close()
        await self._stop_listening()

    async def read(self, subject: str) -> bytes | None:
        """Return the snapshot of an aggregate, or None.

        Args:
            subject: of the aggregate's events.
        """
        if not self._some:
            return None
        try:
            found = await self._gets.newest(self._subjects.snapshot(subject))
        except Unavailable:
            return None  # the stream may have been deleted
        return found.payload if found is not None else None

    async def read_latest(self, count: int) -> LogReader | None:
        """Return a reader of the snapshots that were stored last, at most so many; None if there are none.

        Raises:
            LogError: the server refused, or did not answer.
        """
        info = await self.info()
        if info is None or not info["state"]["messages"]:
            return None
        api, after = partial(call_api, self._connection), max(0, int(info["state"]["last_seq"]) - count)
        reader = f"snapshots-{secrets.token_hex(4)}"  # a name of its own: several workers may read at once
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        settings = gentle_reader(Consumer())
        return JetStreamReader(self._connection, api, self.name, after, None, settings, reader, nothing, nothing)

    @property
    def most(self) -> int:
        """Most bytes of a snapshot."""
        return self._connection.max_payload - HEADERS

    def write(self, subject: str, data: bytes) -> None:
        """Store a snapshot, without waiting for it.

        Args:
            subject: of the aggregate's events.
        """
        self._some = True
        target = self._subjects.snapshot(subject).encode()
        self._connection.send(publish_frame(target, data, reply=self._inbox))

    def _acknowledged(self, _subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):
            why = "their stream is gone"
        elif b'"error"' in payload:
            why = str(orjson.loads(payload)["error"].get("description"))
        else:
            self.written += 1
            return
        if (more := self._repeats.due(why)) is not None:
            logger.warning("snapshots are not stored: %s; aggregates are loaded from their histories%s", why, more)

    # for operators

    async def info(self) -> dict[str, Any] | None:
        """Return what the server says about the stream, or None if there is none."""
        try:
            return await call_api(self._connection, f"STREAM.INFO.{self.name}", None)
        except ApiError as error:
            if error.code == NO_STREAM:
                return None
            raise

    async def subjects(self) -> dict[str, int]:
        """Return the subjects of all snapshots, with how many there are of each.

        Raises:
            LogError: the server refused, or did not answer.
        """
        found: dict[str, int] = {}
        total = 1
        while len(found) < total:
            request = {"subjects_filter": self._subjects.snapshot(), "offset": len(found)}
            answer = await call_api(self._connection, f"STREAM.INFO.{self.name}", request)
            page = answer["state"].get("subjects") or {}
            total = int(answer.get("total", 0)) if page else 0
            found |= page
        return found

    async def drop(self, aggregate: str = "") -> int:
        """Delete all snapshots, or those of one aggregate type; return how many."""
        wanted = f"{self._subjects.prefix}.snap.*.{aggregate}.*" if aggregate else self._subjects.snapshot()
        answer = await call_api(self._connection, f"STREAM.PURGE.{self.name}", {"filter": wanted})
        return int(answer.get("purged", 0))


async def open_snapshots(
    connection: NatsConnection, stream: str, subjects: Subjects, storage: str, replicas: int
) -> SnapshotStore | None:
    """Return the store of a log's snapshots, or None if the server does not let us have one; that is logged."""
    store = SnapshotStore(connection, stream, subjects)
    try:
        await store.start(storage, replicas)
    except LogError as error:
        logger.warning("no snapshots: %s; aggregates are loaded from their whole histories", error)
        return None
    return store
