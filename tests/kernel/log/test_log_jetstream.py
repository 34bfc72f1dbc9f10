"""What only the log on JetStream promises: atomic batches, streams of others, counts by pages."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from kernel.errors import Conflict, StreamMismatch, Unavailable
from kernel.log import JetStreamLog, Stored, find_log
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api
from tests.conftest import open_log
from tests.kernel.log.logs import drain, fill, subject_of


@pytest.mark.parametrize("subjects_in_stream", [5, 1_000_000])
async def test_a_count_takes_all_pages_that_the_server_gives(
    nats_url: str, app_name: str, subjects_in_stream: int
) -> None:
    connection = await connect(nats_url, name="pages")
    log = await open_log(connection, app_name, partitions=1)
    subjects = [log.subjects.address("Account", f"a{number}").subject for number in range(5)]

    async def page(_subject: str, request: Any) -> dict[str, Any]:
        if request is None:
            return {"state": {"num_subjects": subjects_in_stream}}
        start = request["offset"]
        return {"total": 5, "state": {"subjects": dict.fromkeys(subjects[start : start + 2], 3)}}

    log._call = page  # type: ignore[method-assign] - a page of a server has 100,000 subjects
    assert await log.count_commits(()) == {"Account": (15, 5)}
    await log.close()
    await connection.close()


async def test_a_conflict_inside_an_atomic_batch_leaves_the_others_in_one_piece(grouped: JetStreamLog) -> None:
    assert grouped.appender.grouping
    await grouped.append(subject_of(grouped, "guilty"), 0, b"before")
    for position in (0, 50, 99):
        names = [f"{position}-{number}" for number in range(99)]
        names.insert(position, "guilty")
        futures = [grouped.append(subject_of(grouped, name), 0, f"{position} {name}".encode()) for name in names]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert [name for name, outcome in zip(names, outcomes, strict=True) if not isinstance(outcome, int)] == [
            "guilty"
        ]
        assert isinstance(outcomes[position], Conflict)
        for name, outcome in zip(names, outcomes, strict=True):
            if name != "guilty":
                stored = await grouped.read_subject(subject_of(grouped, name))
                assert stored == [Stored(outcome, subject_of(grouped, name), f"{position} {name}".encode())]


async def test_an_atomic_batch_goes_out_where_the_log_groups(connection: NatsConnection, grouped: JetStreamLog) -> None:
    await asyncio.gather(*[grouped.append(subject_of(grouped, str(n)), 0, b"%d" % n) for n in range(10)])
    stored = await call_api(connection, f"STREAM.MSG.GET.{grouped.stream}", {"seq": 5})
    assert b"Nats-Batch-Id" in base64.b64decode(stored["message"]["hdrs"])


async def test_an_existing_stream_keeps_its_partitions(connection: NatsConnection, app_name: str) -> None:
    first = await open_log(connection, app_name, partitions=4)
    sequence = await first.append(subject_of(first), 0, b"first")
    again, found = await open_log(connection, app_name, partitions=32), await find_log(connection, app_name)
    for log in (again, found):
        assert log.subjects.partitions == 4
        assert (await log.info()).partitions == 4
        assert await log.read_subject(subject_of(log)) == [Stored(sequence, subject_of(first), b"first")]
    for log in (first, again, found):
        await log.close()


async def test_a_log_that_is_not_there_is_not_found(connection: NatsConnection, app_name: str) -> None:
    with pytest.raises(Unavailable, match=app_name):
        await find_log(connection, app_name)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "description"),
        ({"description": "orders"}, "orders"),
        ({"description": "eskernel format=999 partitions=4"}, "format=999"),
        ({"description": "eskernel format=1 partitions=4", "storage": "memory", "allow_direct": True}, "storage"),
        ({"description": "eskernel format=1 partitions=4", "retention": "workqueue"}, "retention"),
    ],
)
async def test_a_foreign_stream_is_refused(
    connection: NatsConnection, app_name: str, config: dict[str, Any], named: str
) -> None:
    base = {"name": app_name, "subjects": [f"{app_name}.evt.>"], "storage": "file", "discard": "new"}
    await call_api(connection, f"STREAM.CREATE.{app_name}", {**base, **config})
    with pytest.raises(StreamMismatch, match=named):
        await open_log(connection, app_name)


async def test_a_reader_survives_the_deletion_of_its_consumer(
    connection: NatsConnection, grouped: JetStreamLog
) -> None:
    made = await fill(grouped, 300)
    reader = await grouped.read(0)
    found = (await reader.next(50, timeout=20)).commits
    for number in range(3):
        consumers = (await call_api(connection, f"CONSUMER.NAMES.{grouped.stream}", None))["consumers"]
        assert len(consumers) == 1
        await call_api(connection, f"CONSUMER.DELETE.{grouped.stream}.{consumers[0]}", {})
        # the reader may have received some of the next commits already, but not the last one
        subject = subject_of(grouped, f"after-{number}")
        made.append(Stored(await grouped.append(subject, 0, b"after %d" % number), subject, b"after %d" % number))
        found += await drain(reader, len(made) - len(found), limit=100)
    assert found == made
    assert (await reader.next(10, timeout=0.1)).commits == []
    await reader.close()
