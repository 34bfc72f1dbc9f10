"""The promises of every event log: one suite, run on the memory log and on JetStream of two server versions."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from aggregates import InvalidId
from kernel.errors import Conflict, LogError, PayloadTooLarge, StreamMismatch, Unavailable
from kernel.log import JetStreamLog, MemoryLog, Stored, find_log
from kernel.log.base import LogReader
from kernel.runtime.nats_server import EmbeddedServer
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api
from tests.conftest import open_log

Log = MemoryLog | JetStreamLog
PARTITIONS = 8

STRANGE_IDS = [
    "plain",
    "Plain",
    "with space",
    " ",
    "dot.ted",
    "dot%2Eted",
    ".",
    "..",
    "*",
    ">",
    "a.*",
    "a.>",
    "a/b",
    "a\\b",
    "100%",
    "100%25",
    "%",
    "~",
    "tilde~",
    "$JS.API.INFO",
    "Zürich",
    "東京",
    "🛩️",
    "quote'\"",
    "x" * 255,
]
REFUSED_IDS = ["", "x" * 256, "x" * 10_240, "é" * 100, "a\nb", "a\r\nPUB x 0", "\x00", "tab\t", "\x7f", "\ud800"]


@pytest.fixture(params=["memory", "jetstream", "jetstream-grouped", "jetstream-2.10"])
def place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The log's location: the URL of a server, or none, and options of `open_log`."""
    if request.param == "memory":
        return "", {}
    url = request.getfixturevalue("old_nats_url" if request.param == "jetstream-2.10" else "nats_url")
    return url, {"group_commit": "always"} if request.param == "jetstream-grouped" else {}


@pytest.fixture
async def log(place: tuple[str, dict[str, Any]], app_name: str) -> AsyncIterator[Log]:
    url, options = place
    if not url:
        yield MemoryLog(app_name, PARTITIONS)
        return
    connection = await connect(url, name="contract")
    opened = await open_log(connection, app_name, partitions=PARTITIONS, **options)
    yield opened
    await opened.close()
    await connection.close()


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="test")
    yield connected
    await connected.close()


@pytest.fixture
async def grouped(connection: NatsConnection, app_name: str) -> AsyncIterator[JetStreamLog]:
    opened = await open_log(connection, app_name, partitions=PARTITIONS, group_commit="always")
    yield opened
    await opened.close()


def subject_of(log: Log, id: str = "1", aggregate: str = "Thing") -> str:
    return log.subjects.address(aggregate, id).subject


async def fill(log: Log, count: int, ids: int = 10) -> list[Stored]:
    """Append `count` commits, spread over `ids` subjects, and return them in stream order."""
    subjects = [subject_of(log, str(number)) for number in range(ids)]
    last = dict.fromkeys(subjects, 0)
    made = []
    for start in range(0, count, ids):
        some = subjects[: count - start]
        payloads = [b"%d" % (start + place) for place in range(len(some))]
        futures = [log.append(subject, last[subject], payload) for subject, payload in zip(some, payloads, strict=True)]
        for subject, payload, sequence in zip(some, payloads, await asyncio.gather(*futures), strict=True):
            last[subject] = sequence
            made.append(Stored(sequence, subject, payload))
    return sorted(made)


async def drain(reader: LogReader, count: int, limit: int = 1000) -> list[Stored]:
    """Read until there are `count` commits; fail if none come for a long time."""
    found: list[Stored] = []
    while len(found) < count:
        batch = await reader.next(limit, timeout=20)
        assert batch.commits, f"{len(found)} of {count} commits, then nothing"
        found += batch.commits
    return found


# appending


async def test_an_append_with_the_right_expected_sequence_is_stored(log: Log) -> None:
    subject = subject_of(log)
    first = await log.append(subject, 0, b"first")
    second = await log.append(subject, first, b"second")
    assert 0 < first < second
    assert await log.read_subject(subject) == [Stored(first, subject, b"first"), Stored(second, subject, b"second")]
    assert await log.last(subject) == Stored(second, subject, b"second")


async def test_an_append_with_a_stale_expected_sequence_conflicts_and_tells_the_actual_one(log: Log) -> None:
    subject = subject_of(log)
    first = await log.append(subject, 0, b"first")
    second = await log.append(subject, first, b"second")
    for stale in (0, first):
        with pytest.raises(Conflict) as conflict:
            await log.append(subject, stale, b"late %d" % stale)
        assert conflict.value.actual == second
        assert subject in str(conflict.value)
    assert [stored.payload for stored in await log.read_subject(subject)] == [b"first", b"second"]


async def test_an_append_that_expects_a_commit_of_an_empty_subject_conflicts(log: Log) -> None:
    subject, other = subject_of(log, "1"), subject_of(log, "2")
    sequence = await log.append(subject, 0, b"first")
    with pytest.raises(Conflict) as conflict:
        await log.append(other, sequence, b"first of another")
    assert conflict.value.actual == 0
    assert await log.read_subject(other) == []


async def test_of_concurrent_appends_to_one_subject_exactly_one_wins(log: Log) -> None:
    subject = subject_of(log)
    last = 0
    for contest in range(5):
        payloads = [b"%d.%d" % (contest, contender) for contender in range(20)]
        outcomes = await asyncio.gather(*[log.append(subject, last, p) for p in payloads], return_exceptions=True)
        winners = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert len(winners) == 1
        assert all(isinstance(outcome, int | Conflict) for outcome in outcomes)
        stored = await log.last(subject)
        assert stored == Stored(outcomes[winners[0]], subject, payloads[winners[0]])
        last = stored.sequence
    assert len(await log.read_subject(subject)) == 5


async def test_many_appends_in_flight_all_settle_with_distinct_growing_sequences(log: Log) -> None:
    subjects = [subject_of(log, f"many-{number}") for number in range(3000)]
    first = await asyncio.gather(*[log.append(subject, 0, subject.encode()) for subject in subjects])
    assert first == sorted(set(first))
    futures = [
        log.append(subject, last, b"2 " + subject.encode()) for subject, last in zip(subjects, first, strict=True)
    ]
    second = await asyncio.gather(*futures)
    assert second == sorted(set(second))
    assert second[0] > first[-1]
    for place in (0, 1, 1499, 2999):
        subject = subjects[place]
        stored = [
            Stored(first[place], subject, subject.encode()),
            Stored(second[place], subject, b"2 " + subject.encode()),
        ]
        assert await log.read_subject(subject) == stored


async def test_a_conflict_among_many_appends_hits_only_the_guilty_commit(log: Log) -> None:
    guilty = {0, 7, 19}
    for number in guilty:
        await log.append(subject_of(log, str(number)), 0, b"before")
    futures = [log.append(subject_of(log, str(number)), 0, b"new %d" % number) for number in range(20)]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert {number for number, outcome in enumerate(outcomes) if isinstance(outcome, Conflict)} == guilty
    for number, outcome in enumerate(outcomes):
        payload = b"before" if number in guilty else b"new %d" % number
        stored = await log.read_subject(subject_of(log, str(number)))
        assert [commit.payload for commit in stored] == [payload]
        if number not in guilty:
            assert stored[0].sequence == outcome


async def test_an_append_that_its_caller_gave_up_disturbs_no_other(log: Log) -> None:
    futures = [log.append(subject_of(log, str(number)), 0, b"%d" % number) for number in range(6)]
    futures[2].cancel()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    for number in (0, 1, 3, 4, 5):
        assert isinstance(outcomes[number], int)
        assert [commit.payload for commit in await log.read_subject(subject_of(log, str(number)))] == [b"%d" % number]


async def test_a_payload_over_the_limit_is_refused_and_the_log_goes_on(log: Log) -> None:
    subject, other = subject_of(log, "1"), subject_of(log, "2")
    largest = bytes(range(256)) * (log.max_payload // 256)
    largest += b"x" * (log.max_payload - len(largest))
    outcomes = await asyncio.gather(
        log.append(subject, 0, largest),
        log.append(subject, 0, largest + b"x"),
        log.append(other, 0, largest[::-1]),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], PayloadTooLarge), outcomes[1]
    assert subject in str(outcomes[1])
    assert await log.read_subject(subject) == [Stored(outcomes[0], subject, largest)]
    assert await log.read_subject(other) == [Stored(outcomes[2], other, largest[::-1])]
    assert await log.append(subject, outcomes[0], b"next") > outcomes[0]


async def test_payloads_come_back_byte_by_byte(log: Log) -> None:
    payloads = [b"", bytes(range(256)), b"\r\n", b"MSG a 1 4\r\nabcd\r\n", b"NATS/1.0 100\r\n\r\n", b"\x00" * 10_000]
    subject, last, expected = subject_of(log), 0, []
    for payload in payloads:
        last = await log.append(subject, last, payload)
        expected.append(Stored(last, subject, payload))
        assert await log.last(subject) == expected[-1]
    assert await log.read_subject(subject) == expected
    reader = await log.read(0)
    assert await drain(reader, len(payloads)) == expected
    await reader.close()


async def test_a_closed_log_refuses_appends(log: Log) -> None:
    await log.close()
    with pytest.raises(Unavailable):
        await log.append(subject_of(log), 0, b"late")
    await log.close()


# one subject


async def test_a_subject_is_read_in_order_and_after_a_sequence(log: Log) -> None:
    made = await fill(log, 30, ids=3)
    for number in range(3):
        subject = subject_of(log, str(number))
        own = [stored for stored in made if stored.subject == subject]
        assert len(own) == 10
        assert await log.read_subject(subject) == own
        for skipped in (0, 1, 4, 9, 10):
            after = own[skipped - 1].sequence if skipped else 0
            assert await log.read_subject(subject, after) == own[skipped:]
    assert await log.read_subject(subject_of(log, "0"), made[-1].sequence + 1000) == []


async def test_a_subject_without_commits_is_empty(log: Log) -> None:
    await fill(log, 3)
    assert await log.read_subject(subject_of(log, "empty")) == []
    assert await log.last(subject_of(log, "empty")) is None


async def test_a_history_longer_than_one_round_trip_is_read_whole(log: Log) -> None:
    subject, last, expected = subject_of(log), 0, []
    noise = subject_of(log, "noise")
    await log.append(noise, 0, b"noise")
    for number in range(2500):
        payload = b"commit %d" % number
        last = await log.append(subject, last, payload)
        expected.append(Stored(last, subject, payload))
    assert await log.read_subject(subject) == expected
    assert await log.read_subject(subject, expected[1199].sequence) == expected[1200:]


async def test_several_subjects_are_read_at_the_same_time(log: Log) -> None:
    made = await fill(log, 200, ids=20)
    subjects = [subject_of(log, str(number)) for number in range(20)]
    for subject, found in zip(subjects, await asyncio.gather(*map(log.read_subject, subjects)), strict=True):
        assert found == [stored for stored in made if stored.subject == subject]


async def test_strange_ids_are_kept_apart(log: Log) -> None:
    appended = {}
    for name in STRANGE_IDS:
        address = log.subjects.address("Thing", name)
        appended[name] = await log.append(address.subject, 0, name.encode())
        assert log.subjects.parse(address.subject) == address
        assert address.id == name
    for name, sequence in appended.items():
        subject = subject_of(log, name)
        assert await log.read_subject(subject) == [Stored(sequence, subject, name.encode())]
    reader = await log.read(0)
    found = await drain(reader, len(STRANGE_IDS))
    assert [log.subjects.parse(stored.subject).id for stored in found] == STRANGE_IDS
    await reader.close()


@pytest.mark.parametrize("id", REFUSED_IDS, ids=ascii)
def test_ids_that_no_subject_can_carry_are_refused(id: str) -> None:
    with pytest.raises(InvalidId):
        MemoryLog("app", PARTITIONS).subjects.address("Thing", id)


# everything, or a partition


async def test_everything_is_read_in_stream_order(log: Log) -> None:
    made = await fill(log, 500, ids=50)
    reader = await log.read(0)
    assert await drain(reader, 500) == made
    await reader.close()


async def test_a_partition_has_its_own_commits_and_all_of_them(log: Log) -> None:
    made = await fill(log, 200, ids=40)
    seen = 0
    for partition in range(PARTITIONS):
        own = [stored for stored in made if log.subjects.parse(stored.subject).partition == partition]
        reader = await log.read(0, partition)
        assert await drain(reader, len(own)) == own
        assert (await reader.next(10, timeout=0.1)).commits == []
        await reader.close()
        seen += len(own)
    assert seen == len(made)


async def test_reading_goes_on_behind_a_sequence(log: Log) -> None:
    made = await fill(log, 60, ids=12)
    reader = await log.read(made[24].sequence)
    assert await drain(reader, 35) == made[25:]
    await reader.close()
    partition = log.subjects.parse(made[0].subject).partition
    own = [stored for stored in made if log.subjects.parse(stored.subject).partition == partition]
    reader = await log.read(own[1].sequence, partition)
    assert await drain(reader, len(own) - 2) == own[2:]
    await reader.close()


async def test_reading_from_the_end_gives_what_comes_then(log: Log) -> None:
    made = await fill(log, 20)
    reader = await log.read(made[-1].sequence)
    assert (await reader.next(10, timeout=0.1)).commits == []
    sequence = await log.append(subject_of(log, "new"), 0, b"new")
    assert await drain(reader, 1) == [Stored(sequence, subject_of(log, "new"), b"new")]
    await reader.close()


async def test_a_batch_keeps_to_its_limit(log: Log) -> None:
    made = await fill(log, 50)
    reader = await log.read(0)
    found: list[Stored] = []
    while len(found) < 50:
        batch = await reader.next(7, timeout=20)
        assert 1 <= len(batch.commits) <= 7
        found += batch.commits
    assert found == made
    await reader.close()


async def test_a_batch_tells_how_many_wait_behind_it(log: Log) -> None:
    await fill(log, 50)
    reader = await log.read(0)
    left = 50
    while left:
        batch = await reader.next(7, timeout=20)
        left -= len(batch.commits)
        assert batch.pending == left
    await reader.close()


async def test_a_reader_waits_for_new_commits(log: Log) -> None:
    reader = await log.read(0)
    waiting = asyncio.create_task(reader.next(10, timeout=30))
    await log.info()
    assert not waiting.done()
    sequence = await log.append(subject_of(log), 0, b"new")
    assert (await waiting).commits == [Stored(sequence, subject_of(log), b"new")]
    await reader.close()


async def test_a_reader_with_nothing_to_read_returns_an_empty_batch(log: Log) -> None:
    reader = await log.read(0)
    assert await reader.next(10, timeout=0.05) == ([], 0, 0.0)
    made = await fill(log, 5)
    assert await drain(reader, 5) == made
    assert await reader.next(10, timeout=0.05) == ([], 0, 0.0)
    await reader.close()


async def test_a_reader_whose_wait_is_cancelled_stops_and_loses_nothing(log: Log) -> None:
    reader = await log.read(0)
    for _ in range(20):
        waiting = asyncio.create_task(reader.next(10))
        # its answer arrives at the same time as the reader's own
        await log.info()
        waiting.cancel()
        done, _ = await asyncio.wait({waiting}, timeout=5)
        assert done, "the cancellation was swallowed"
        await reader.close()
        reader = await log.read(0)
    made = await fill(log, 20)
    found: list[Stored] = []
    while len(found) < 20:
        waiting = asyncio.create_task(reader.next(4))
        await log.info()
        if waiting.cancel():
            await asyncio.wait({waiting}, timeout=5)
        found += (await reader.next(4, 20) if waiting.cancelled() else waiting.result()).commits
        assert found == made[: len(found)]
        assert found
    await reader.close()


async def test_two_readers_are_independent(log: Log) -> None:
    made = await fill(log, 40)
    ahead, behind = await log.read(0), await log.read(0)
    assert await drain(ahead, 40) == made
    assert await drain(behind, 40, limit=6) == made
    await ahead.close()
    more = await log.append(subject_of(log, "more"), 0, b"more")
    assert [stored.sequence for stored in await drain(behind, 1)] == [more]
    await behind.close()
    await behind.close()


async def test_the_log_knows_its_size(log: Log) -> None:
    empty = await log.info()
    assert (empty.partitions, empty.last, empty.commits) == (PARTITIONS, 0, 0)
    made = await fill(log, 25)
    full = await log.info()
    assert (full.first, full.last, full.commits) == (made[0].sequence, made[-1].sequence, 25)
    assert full.created == empty.created
    assert full.durability


async def test_commits_are_counted_by_the_name_of_their_aggregate(log: Log) -> None:
    assert await log.count_commits(()) == {}
    for aggregate, name, commits in (("Account", "alice", 2), ("Account", "a.b", 1), ("Loan", "alice", 3)):
        last = 0
        for number in range(commits):
            subject = log.subjects.address(aggregate, name).subject
            last = await log.append(subject, last, b"%s %d" % (subject.encode(), number))
    right = log.subjects.partition("Nobody", "alice")
    wrong = (right + 1) % PARTITIONS
    await log.append(f"{log.subjects.prefix}.evt.{wrong}.Nobody.alice", 0, b"no subject of ours")
    await log.append(f"{log.subjects.prefix}.evt.{right}.Nobody.alice.b", 0, b"nor this")
    for known in ((), ("Account", "Loan")):
        assert await log.count_commits(known) == {"Account": 3, "Loan": 3}


# JetStream only


async def test_a_count_takes_all_pages_that_the_server_gives(nats_url: str, app_name: str) -> None:
    connection = await connect(nats_url, name="pages")
    log = await open_log(connection, app_name, partitions=1)
    subjects = [log.subjects.address("Account", f"a{number}").subject for number in range(5)]

    async def page(_subject: str, request: Any) -> dict[str, Any]:
        start = request["offset"]
        return {"total": 5, "state": {"subjects": dict.fromkeys(subjects[start : start + 2], 3)}}

    log._call = page  # type: ignore[method-assign] - a page of a server has 100,000 subjects
    assert await log.count_commits(()) == {"Account": 15}
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


# outages


class Proxy:
    """A fixed address in front of a server that may be replaced; it can lose bytes and cut connections."""

    def __init__(self) -> None:
        self.target = ""
        self.lose_answers = self.lose_requests = False
        self.latency = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connected(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.removeprefix("nats://").split(":")
        try:
            behind, before = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, before}
        await asyncio.gather(
            self._pass(reader, before, lambda: self.lose_requests),
            self._pass(behind, writer, lambda: self.lose_answers),
        )

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, lost: Callable[[], bool]) -> None:
        try:
            while data := await source.read(65_536):
                await asyncio.sleep(self.latency)
                if not lost():
                    to.write(data)
                    await to.drain()
        except OSError:
            pass
        finally:
            to.close()

    def cut(self) -> None:
        """Cut every connection; new connections pass everything again."""
        self.lose_answers = self.lose_requests = False
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    yield made
    await made.stop()


@pytest.fixture(params=["auto", "always"])
async def proxied(
    request: pytest.FixtureRequest, proxy: Proxy, nats_url: str, app_name: str
) -> AsyncIterator[JetStreamLog]:
    """A log whose connection goes through the proxy."""
    proxy.target = nats_url
    connection = await connect(await proxy.start(), name="proxied")
    opened = await open_log(connection, app_name, partitions=PARTITIONS, group_commit=request.param)
    yield opened
    await opened.close()
    await connection.close()


async def test_appends_whose_answers_are_lost_settle_as_what_they_became(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection, wait_until: Callable[..., Any]
) -> None:
    beside = await find_log(connection, proxied.stream)
    await proxied.append(subject_of(proxied, "taken"), 0, b"taken")
    proxy.lose_answers = True
    futures = [proxied.append(subject_of(proxied, str(n)), 0, b"%d" % n) for n in range(10)]

    async def arrived() -> bool:
        return (await beside.info()).commits == 11

    await wait_until(arrived)
    assert not any(future.done() for future in futures)
    proxy.cut()
    sequences = await asyncio.gather(*futures)
    for number, sequence in enumerate(sequences):
        subject = subject_of(proxied, str(number))
        assert await beside.read_subject(subject) == [Stored(sequence, subject, b"%d" % number)]
    assert (await beside.info()).commits == 11
    await beside.close()


async def test_appends_that_got_lost_on_the_way_are_sent_again(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection, wait_until: Callable[..., Any]
) -> None:
    beside = await find_log(connection, proxied.stream)
    proxy.lose_requests = True
    futures = [proxied.append(subject_of(proxied, str(n)), 0, b"%d" % n) for n in range(10)]
    await wait_until(lambda: proxied.appender.pressure[1] > 0)
    overtaken = await beside.append(subject_of(proxied, "3"), 0, b"overtaken")
    proxy.cut()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, int)] == [3]
    assert isinstance(outcomes[3], Conflict)
    assert outcomes[3].actual == overtaken
    for number in set(range(10)) - {3}:
        subject = subject_of(proxied, str(number))
        assert await beside.read_subject(subject) == [Stored(outcomes[number], subject, b"%d" % number)]
    assert (await beside.info()).commits == 10
    await beside.close()


@pytest.fixture(params=["nats_url", "old_nats_url"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


async def test_a_slow_connection_does_not_shorten_a_history(proxy: Proxy, app_name: str, server_url: str) -> None:
    proxy.target = server_url
    connection = await connect(await proxy.start(), name="slow")
    log = await open_log(connection, app_name, partitions=PARTITIONS)
    made = await fill(log, 5, ids=1)
    proxy.latency = 0.35
    assert await log.read_subject(subject_of(log, "0")) == made
    assert await log.read_subject(subject_of(log, "0"), made[-1].sequence) == []
    proxy.latency = 0
    await log.close()
    await connection.close()


async def test_a_reader_goes_on_after_a_lost_connection(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection
) -> None:
    beside = await find_log(connection, proxied.stream)
    made = await fill(beside, 100)
    reader = await proxied.read(0)
    found = (await reader.next(30, timeout=20)).commits
    for outage in range(2):
        proxy.cut()
        made.append(
            Stored(
                await beside.append(subject_of(beside, f"r{outage}"), 0, b"r"), subject_of(beside, f"r{outage}"), b"r"
            )
        )
        found += await drain_patiently(reader, 60 + 20 * outage - len(found), limit=20)
    found += await drain_patiently(reader, 102 - len(found))
    assert found == made
    await reader.close()
    await beside.close()


async def drain_patiently(reader: LogReader, count: int, limit: int = 1000) -> list[Stored]:
    """Read as the kernel does: where a read fails, try again."""
    found: list[Stored] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            try:
                found += (await reader.next(min(limit, count - len(found)), timeout=1)).commits
            except Unavailable:
                await asyncio.sleep(0.05)
    return found


@pytest.mark.parametrize("group_commit", ["auto", "always"])
async def test_acknowledged_appends_survive_the_death_of_the_server(
    tmp_path: Path, proxy: Proxy, app_name: str, group_commit: Any
) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    proxy.target = await server.start()
    connection = await connect(await proxy.start(), name="survivor")
    log = await open_log(connection, app_name, partitions=PARTITIONS, group_commit=group_commit)
    made = await fill(log, 200, ids=20)
    in_flight = [log.append(subject_of(log, f"flight-{n}"), 0, b"flight %d" % n) for n in range(50)]
    await asyncio.wait(in_flight, timeout=0.001)
    os.kill(server.pid, signal.SIGKILL)
    outage = [log.append(subject_of(log, f"outage-{n}"), 0, b"outage %d" % n) for n in range(20)]
    stale = log.append(subject_of(log, "0"), 0, b"stale")
    restarted = EmbeddedServer(tmp_path / "nats")
    proxy.target = await restarted.start()
    try:
        outcomes = await asyncio.gather(*in_flight, *outage, return_exceptions=True)
        with pytest.raises(Conflict):
            await stale
        reader = await log.read(0)
        stored = await drain_patiently(reader, (await log.info()).commits)
        assert stored[:200] == made
        names = [f"flight-{n}" for n in range(50)] + [f"outage-{n}" for n in range(20)]
        for name, outcome in zip(names, outcomes, strict=True):
            own = [commit for commit in stored if commit.subject == subject_of(log, name)]
            assert len(own) <= 1
            if isinstance(outcome, int):
                assert [commit.sequence for commit in own] == [outcome]
            else:
                assert isinstance(outcome, LogError)
    finally:
        await log.close()
        await connection.close()
        await restarted.stop()
