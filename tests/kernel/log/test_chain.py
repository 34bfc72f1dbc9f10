"""Histories are read backwards, commit by commit, and searched for only where that can't be done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from aggregates import Aggregate, applies, command, event, handles
from aggregates.cell import LINKED, MILESTONE, Cell
from aggregates.declaration import declare
from kernel.errors import Unavailable
from kernel.log import JetStreamLog, open_log
from kernel.log.base import Stored
from kernel.log.chain import DENSE
from kernel.log.direct_get import Link
from kernel.log.stream import find_log, wanted_config
from kernel.settings import Stream
from kernel.settings.sources import settings_of
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api, server_version


@command
class Happen:
    pass


@event
class Happened:
    pass


class Thing(Aggregate):
    @handles
    def happen(self, command: Happen) -> Happened:
        return Happened()

    @applies
    def happened(self, event: Happened) -> None: ...


class Questions:
    """Counts what a log asks its stream."""

    def __init__(self, log: JetStreamLog, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searches = self.round_trips = 0
        batch, by_sequence = log._gets.batch, log._gets.by_sequence

        async def search(subject: str, after: int) -> tuple[list[Stored], int]:
            self.searches += 1
            return await batch(subject, after)

        async def ask(subject: str, sequences: list[int]) -> object:
            self.round_trips += 1
            return await by_sequence(subject, sequences)

        monkeypatch.setattr(log._gets, "batch", search)
        monkeypatch.setattr(log._gets, "by_sequence", ask)


@pytest.fixture(params=["nats_url", "old_nats_url"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def connection(url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(url, name="test")
    yield connected
    await connected.close()


@pytest.fixture
async def log(connection: NatsConnection, app_name: str) -> AsyncIterator[JetStreamLog]:
    opened = await open_log(connection, app_name)
    yield opened
    await opened.close()


def subject_of(log: JetStreamLog, name: str = "thing") -> str:
    return log.subjects.address("Thing", name).subject


async def fill(log: JetStreamLog, commits: int, *, between: int = DENSE + 2, chained: bool = True) -> list[Stored]:
    """Append commits of one aggregate, with those of others between them."""
    subject, cell, made = subject_of(log), Cell(declare(Thing), "thing"), []
    for number in range(commits):
        payload = b"%d" % number
        cell.advance(await log.append(subject, cell.position, payload, cell.links if chained else b""))
        made.append(Stored(cell.position, subject, payload))
        others = [log.append(subject_of(log, f"other-{number}-{place}"), 0, b"noise") for place in range(between)]
        await asyncio.gather(*others)
    return made


async def test_commits_spread_over_a_log_are_read_without_a_search(
    log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await fill(log, 100)
    asked = Questions(log, monkeypatch)
    assert await log.read_subject(subject_of(log)) == made
    assert (asked.searches, asked.round_trips) == (0, 99 % MILESTONE + 96 // LINKED)


async def test_commits_without_our_header_are_read_one_by_one_without_a_search(
    log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await fill(log, 40, chained=False)
    asked = Questions(log, monkeypatch)
    assert await log.read_subject(subject_of(log)) == made
    assert (asked.searches, asked.round_trips) == (0, 39)


async def test_only_what_comes_after_a_sequence_is_asked_for(
    log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await fill(log, 50)
    asked = Questions(log, monkeypatch)
    assert await log.read_subject(subject_of(log), made[39].sequence) == made[40:]
    assert await log.read_subject(subject_of(log), made[49].sequence) == []
    assert await log.read_subject(subject_of(log, "nobody")) == []
    assert asked.round_trips == 2


async def test_a_dense_history_is_read_by_a_search(log: JetStreamLog, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await fill(log, 100, between=0)
    asked = Questions(log, monkeypatch)
    assert await log.read_subject(subject_of(log)) == made
    assert asked.round_trips == 99 % MILESTONE + 1
    assert await log.read_subject(subject_of(log), made[9].sequence) == made[10:]


async def test_a_history_that_has_lost_a_commit_is_read_as_far_as_it_goes(
    connection: NatsConnection, app_name: str
) -> None:
    config = wanted_config(app_name, Stream(), server_version(connection))
    await call_api(connection, f"STREAM.CREATE.{app_name}", {**config, "deny_delete": False, "deny_purge": False})
    log = await open_log(connection, app_name)
    made = await fill(log, 30)
    await call_api(connection, f"STREAM.MSG.DELETE.{app_name}", {"seq": made[20].sequence})
    assert await log.read_subject(subject_of(log)) == made[:20] + made[21:]
    await log.close()


async def test_a_copy_in_which_commits_have_other_sequences_is_read(
    log: JetStreamLog, connection: NatsConnection, app_name: str
) -> None:
    made = await fill(log, 30, between=DENSE + 3)
    partition = log.subjects.partition("Thing", "thing")
    copy = {
        "name": f"{app_name}-copy",
        "description": wanted_config(app_name, Stream(), (2, 12))["description"],
        "allow_direct": True,
        "sources": [{"name": app_name, "filter_subject": log.subjects.events(partition)}],
    }
    await call_api(connection, f"STREAM.CREATE.{copy['name']}", copy)
    copied = await find_log(connection, app_name, settings_of({"stream.name": copy["name"]}))
    async with asyncio.timeout(20):
        while (last := await copied.last(subject_of(log))) is None or last.payload != made[-1].payload:
            await asyncio.sleep(0.01)
    found = await copied.read_subject(subject_of(log))
    assert [stored.payload for stored in found] == [stored.payload for stored in made]
    assert [stored.sequence for stored in found] != [stored.sequence for stored in made]
    await copied.close()


async def test_a_replica_that_is_behind_is_asked_again(log: JetStreamLog, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await fill(log, 5)
    batch = log._gets.batch
    answers = [made[:3], []]

    async def missing(subject: str, sequences: list[int]) -> None: ...

    async def behind(subject: str, after: int) -> tuple[list[Stored], int]:
        return (answers.pop(0), 0) if answers else await batch(subject, after)

    monkeypatch.setattr(log._gets, "by_sequence", missing)
    monkeypatch.setattr(log._gets, "batch", behind)
    if log._batch_get:
        assert await log.read_subject(subject_of(log)) == made
        assert answers == []
        monkeypatch.setattr(log._connection, "request_timeout", 0.2)
        answers += [[]] * 100
        with pytest.raises(Unavailable, match="behind its leader"):
            await log.read_subject(subject_of(log))


@pytest.mark.parametrize(
    ("headers", "before"),
    [
        (b"", None),
        (b"Nats-Expected-Last-Subject-Sequence: 0\r\n", ()),
        (b"Nats-Expected-Last-Subject-Sequence: 90\r\n", (90,)),
        (b"Nats-Expected-Last-Subject-Sequence: 90\r\nEskernel-Before: 5 10\r\n", (90, 85, 75)),
        (b"Nats-Expected-Last-Subject-Sequence: 100\r\n", None),
        (b"Nats-Expected-Last-Subject-Sequence: x\r\n", None),
        (b"Nats-Expected-Last-Subject-Sequence: 90\r\nEskernel-Before: 5 x\r\n", None),
        (b"Nats-Expected-Last-Subject-Sequence: 90\r\nEskernel-Before: 0\r\n", None),
        (b"Nats-Expected-Last-Subject-Sequence: 90\r\nEskernel-Before: 90\r\n", None),
    ],
)
def test_a_header_says_where_earlier_commits_are_or_is_passed_over(
    headers: bytes, before: tuple[int, ...] | None
) -> None:
    assert Link(Stored(100, "s", b""), b"NATS/1.0\r\n" + headers + b"\r\n").before() == before
