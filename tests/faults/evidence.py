"""Reading the evidence of a run: the stream with nats-py, the tables with SQL. It imports nothing of the product."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import nats
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection, make_url

from tests.faults.owed import of_kind
from tests.faults.rules import Letter, Message, Tables, tank_of

_BATCH = 500
TOMBSTONES = ("DEL", "PURGE")


@dataclass(frozen=True, slots=True)
class Stream:
    """The whole stream."""

    partitions: int
    last: int
    messages: list[Message]


async def _connect(url: str) -> Any:
    return await nats.connect(url, allow_reconnect=False, connect_timeout=10)


async def read_stream(url: str, name: str) -> Stream:
    """Read every message, with a consumer that is removed again."""
    client = await _connect(url)
    try:
        js: JetStreamContext = client.jetstream(timeout=10)
        info = await js.stream_info(name)
        found = re.search(r"partitions=(\d+)", info.config.description or "")
        assert found is not None, info.config.description
        messages: list[Message] = []
        if info.state.messages:
            config = ConsumerConfig(
                ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, inactive_threshold=30.0, mem_storage=True
            )
            subscription = await js.pull_subscribe("", stream=name, config=config)
            consumer = (await subscription.consumer_info()).name
            try:
                while not messages or messages[-1].sequence < info.state.last_seq:
                    for message in await subscription.fetch(_BATCH, timeout=10):
                        meta = message.metadata
                        stored = meta.timestamp.timestamp()
                        messages.append(Message(meta.sequence.stream, message.subject, message.data, stored))
            finally:
                await js.delete_consumer(name, consumer)
        return Stream(int(found[1]), info.state.last_seq, messages)
    finally:
        await client.close()


async def readers(url: str, name: str, last: int) -> set[str]:
    """Return the consumers of a stream that have received everything: those of live workers.

    A killed worker's consumer and its pull requests stay for a minute, but receive nothing.
    """
    return {
        consumer.name
        for consumer in await _consumers(url, name)
        if consumer.delivered and consumer.delivered.stream_seq >= last
    }


async def consumers(url: str, name: str) -> set[str]:
    """Return all consumers of a stream."""
    return {consumer.name for consumer in await _consumers(url, name)}


async def _consumers(url: str, name: str) -> list[Any]:
    client = await _connect(url)
    try:
        return list(await client.jetstream(timeout=10).consumers_info(name))
    except NotFoundError:
        return []
    finally:
        await client.close()


async def last_of(url: str, name: str) -> int:
    """Return a stream's last sequence."""
    client = await _connect(url)
    try:
        return int((await client.jetstream(timeout=10).stream_info(name)).state.last_seq)
    finally:
        await client.close()


async def delete(url: str, name: str) -> None:
    """Delete a stream."""
    client = await _connect(url)
    try:
        await client.jetstream(timeout=10).delete_stream(name)
    finally:
        await client.close()


async def subjects(url: str, name: str) -> list[str]:
    """Return the subjects that a stream has messages of; an absent stream has none."""
    client = await _connect(url)
    try:
        info = await client.jetstream(timeout=10).stream_info(name, subjects_filter=">")
        return sorted(info.state.subjects or {})
    except NotFoundError:
        return []
    finally:
        await client.close()


async def keys(url: str, bucket: str) -> list[str]:
    """Return the keys of a key-value bucket that are set; an absent bucket has none."""
    client = await _connect(url)
    try:
        js: JetStreamContext = client.jetstream(timeout=10)
        try:
            info = await js.stream_info(f"KV_{bucket}", subjects_filter=">")
        except NotFoundError:
            return []
        found = []
        for subject in info.state.subjects or {}:
            message = await js.get_last_msg(f"KV_{bucket}", subject)
            headers = message.headers or {}
            if headers.get("KV-Operation") not in TOMBSTONES and "Nats-Marker-Reason" not in headers:
                found.append(subject.removeprefix(f"$KV.{bucket}."))
        return sorted(found)
    finally:
        await client.close()


class Reader:
    """Reads the projection database."""

    def __init__(self, url: str) -> None:
        given = make_url(url)
        if given.get_backend_name() == "postgresql":
            given = given.set(drivername="postgresql+psycopg")
        self._engine = create_engine(given)

    def close(self) -> None:
        self._engine.dispose()

    def behind(self, app: str, stream: Stream) -> list[str]:
        """Return the projections that have not folded their partitions up to the stream's end, and missing garbage."""
        ends: dict[int, int] = {}
        rung: dict[int, int] = {}
        garbage = 0
        for message in stream.messages:
            commit = message.payload.startswith(b'[{"specversion"')
            if commit and of_kind(app, message.subject, "Gauge") is not None:
                rung[int(message.subject.split(".")[2])] = message.sequence
            elif tank_of(app, message.subject) is None or not commit:
                garbage += 1
            else:
                ends[int(message.subject.split(".")[2])] = message.sequence
        with self._engine.connect() as connection:
            stands = {(row[0], row[1]): row[2] for row in _rows(connection, _CHECKPOINTS)}
            reacted = {(row[0], row[1]): row[2] for row in _rows(connection, _REACTED)}
            pending = _rows(connection, "SELECT count(*) FROM eskernel_timer WHERE attempt IS NOT NULL")[0][0]
            kept = _rows(connection, "SELECT count(*) FROM eskernel_dead_letter WHERE projection = ''")[0][0]
        last = max((*ends.values(), *rung.values()), default=0)
        found = [
            f"{projection} of partition {partition} is at {at}, its last event at {goal}"
            for (projection, partition), at in sorted(stands.items())
            # any event may belong to a row of any partition
            if at < (goal := last if projection == "Stories" else ends.get(partition, 0))
        ]
        found += [
            f"{name} of partition {partition} is at {at}, what it reacts to at {goal.get(partition, 0)}"
            for (name, partition), at in sorted(reacted.items())
            if at < (goal := {"Watch": ends, "Bell": rung}.get(name, {})).get(partition, 0)
        ]
        found += [f"{pending} timers are pending"] if pending else []
        missing = set(ends) - {partition for _, partition in stands}
        found += [f"partition {partition} has no checkpoint" for partition in sorted(missing)]
        return found + ([f"{kept} of {garbage} pieces of garbage are kept"] if kept < garbage else [])

    def rejected(self) -> list[tuple[str, str]]:
        """Return event and place of the commands of policies that were rejected."""
        with self._engine.connect() as connection:
            return [(row[0], row[1]) for row in _rows(connection, "SELECT event_id, place FROM eskernel_rejection")]

    def live_versions(self) -> set[int]:
        """Return the versions of the projections with versions that readers see."""
        with self._engine.connect() as connection:
            return {int(row[0]) for row in _rows(connection, _LIVE)}

    def failed(self, words: str) -> int:
        """Return the number of dead letters whose error has these words."""
        with self._engine.connect() as connection:
            found = connection.execute(text(_FAILED), {"words": f"%{words}%"})
            return int(found.scalar_one())

    def deadlocks(self) -> int:
        """Return how many deadlocks the database has ended; SQLite has none."""
        if self._engine.dialect.name == "sqlite":
            return 0
        with self._engine.connect() as connection:
            return int(_rows(connection, _DEADLOCKS)[0][0])

    def tables(self) -> Tables:
        """Read every row."""
        with self._engine.connect() as connection:
            return Tables(
                _rows(connection, "SELECT tank, level, events, last FROM levels"),
                _rows(connection, "SELECT colour, times, amount FROM colours"),
                _rows(connection, "SELECT tank, sequence, kind, amount, note FROM entries"),
                [Letter(*row[:6], bytes(row[6])) for row in _rows(connection, _LETTERS)],
                _rows(connection, "SELECT story, events, digest FROM stories"),
            )


_CHECKPOINTS = """
    SELECT c.projection, c.partition, c.sequence FROM eskernel_checkpoint c
    JOIN eskernel_projection p ON p.name = c.projection AND p.generation = c.generation WHERE p.state = 'live'"""
_REACTED = "SELECT projection, partition, sequence FROM eskernel_checkpoint WHERE generation = 0"
_LIVE = "SELECT version FROM eskernel_projection WHERE state = 'live' AND name IN ('Levels', 'Colours')"
_FAILED = """
    SELECT count(*) FROM eskernel_dead_letter d JOIN eskernel_projection p
    ON p.name = d.projection AND p.generation = d.generation WHERE p.state = 'live' AND d.error LIKE :words"""
_DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
_LETTERS = """
    SELECT d.projection, d.partition, d.aggregate, d.aggregate_id, d.stream_sequence, d.sequence, d.payload
    FROM eskernel_dead_letter d
    LEFT JOIN eskernel_projection p ON p.name = d.projection AND p.generation = d.generation
    WHERE d.projection = '' OR p.state = 'live' ORDER BY d.id"""


def _rows(connection: Connection, statement: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.execute(text(statement))]
