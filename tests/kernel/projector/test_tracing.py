"""What an id stands for in a log: the commands, their events, and what these have caused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from aggregates.commit import Decision, encode, timestamp
from aggregates.context import uuid7
from aggregates.encoding import EncodedEvent
from examples.bank import Deposited
from kernel.log.base import EventLog
from kernel.log.memory import MemoryLog
from kernel.projector import tracing
from kernel.projector.tracing import SKEW, TracedCommand, made_at, trace
from kernel.transport.dial import connect
from tests.apps import bank
from tests.conftest import open_log, run

APP = bank("bank")


async def store(log: EventLog, aggregate_id: str, *decisions: Decision, time: str = "") -> int:
    subject = log.subjects.address("Account", aggregate_id).subject
    last = await log.last(subject)
    before = 0 if last is None else last.sequence
    return await log.append(subject, before, encode("/bank/Account", aggregate_id, decisions, 0, time or timestamp()))


def decision(command: str, correlation: str | None = None, causation: str | None = None, events: int = 1) -> Decision:
    made = [EncodedEvent("Deposited", 1, b'{"cents":5}', Deposited(5))] * events
    return Decision(command, made, correlation, causation)


async def find(log: EventLog, wanted: str, since: datetime | None = None) -> list[tuple[int, str]]:
    """Return depth and id of the commands."""
    found = await trace(APP, log, None, wanted, since=since)
    return [(depth, item.id) for depth, item in found.walk() if isinstance(item, TracedCommand)]


def test_a_command_is_found_with_everything_that_it_caused() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await store(log, "other", decision("o"))
        await store(log, "a", decision("first", events=2), decision("beside"))
        first = await trace(APP, log, None, "first")
        events = [event.envelope.id for event in first.commands[0].events]
        assert len(events) == 2
        await store(log, "b", decision("second", causation=events[1]))
        await store(log, "c", decision("third", causation="second"))
        await store(log, "c", decision("fourth", causation="o"))
        tree = [(0, "first"), (2, "second"), (3, "third")]
        assert await find(log, "first") == tree
        assert await find(log, events[0]) == tree
        assert (await trace(APP, log, None, events[1])).kinds == {"event", "causation"}
        assert await find(log, "third") == [(0, "third")]
        assert await find(log, "nowhere") == []

    run(scenario())


def test_a_correlation_is_found_with_all_of_its_commands() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        for number in range(3):
            await store(log, f"a{number}", decision(f"c{number}", "order 7"), decision(f"d{number}", "order 8"))
        await store(log, "a", decision("order 7"))
        assert await find(log, "order 7") == [(0, "c0"), (0, "c1"), (0, "c2"), (0, "order 7")]

    run(scenario())


@pytest.mark.parametrize("wanted", ["größe", 'say "7"', "a/b", "back\\slash", "a b"])
def test_ids_that_json_writes_in_several_ways_are_found(wanted: str) -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        subject = log.subjects.address("Account", "a").subject
        escaped = encode("/bank/Account", "a", [decision("anything")], 0, timestamp())
        text = "".join(f"\\u{ord(letter):04x}" for letter in wanted)
        await log.append(subject, 0, escaped.replace(b'"anything"', f'"{text}"'.encode()))
        assert await find(log, wanted) == [(0, wanted)]

    run(scenario())


def test_causes_that_lead_in_a_circle_end() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await store(log, "a", decision("one", causation="two"))
        await store(log, "b", decision("two", causation="one"))
        await store(log, "c", decision("self", causation="self"))
        assert await find(log, "one") == [(0, "one"), (1, "two")]
        assert await find(log, "self") == [(0, "self")]

    run(scenario())


def test_a_chain_of_causes_may_be_longer_than_the_stack_of_python() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        for number in range(3_000):
            await store(log, f"a{number}", decision(f"c{number}", causation=f"c{number - 1}"))
        assert (await find(log, "c0"))[-1] == (2_999, "c2999")

    run(scenario())


@pytest.mark.parametrize("payload", [b"no commit: wanted", b"[]"])
def test_what_is_no_commit_is_passed_over(payload: bytes) -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await log.append(log.subjects.address("Account", "a").subject, 0, payload)
        await log.append("elsewhere", 0, encode("/", "a", [decision("wanted")], 0, timestamp()))
        assert await find(log, "wanted") == []
        await store(log, "b", decision("wanted"))
        assert await find(log, "wanted") == [(0, "wanted")]

    run(scenario())


def test_a_uuid7_says_from_where_the_log_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "NEAR", 0)

    async def scenario() -> None:
        log = MemoryLog("bank")
        for year in range(2001, 2020):
            await store(log, "old", decision(f"y{year}"), time=f"{year}-01-01T00:00:00Z")
        late, early = uuid7(), uuid7()
        await store(log, "a", decision(early), time="2001-01-01T00:00:00Z")
        await store(log, "new", decision(late))
        found = await trace(APP, log, None, late)
        assert (found.after, [command.id for command in found.commands]) == (20, [late])
        # an imported log may have ids that are younger than its events
        assert await find(log, early) == [(0, early)]
        assert await find(log, "y2005", since=datetime(2005, 1, 1, tzinfo=UTC)) == [(0, "y2005")]
        assert await find(log, "y2005", since=datetime(2005, 1, 2, tzinfo=UTC)) == []

    run(scenario())


def test_a_time_is_found_in_a_stream_by_when_its_commits_were_appended(
    nats_url: str, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "NEAR", 0)

    async def scenario() -> None:
        connection = await connect(nats_url, name="trace")
        log = await open_log(connection, app_name)
        try:
            moments = []
            for number in range(8):
                moments.append(datetime.now(UTC))
                await store(log, f"a{number}", decision(f"c{number}"), time="2001-01-01T00:00:00Z")
            for number, moment in enumerate(moments):
                assert (await trace(APP, log, None, f"c{number}", since=moment)).after == number
            assert await find(log, "c7", since=datetime.now(UTC) + timedelta(seconds=5)) == []
        finally:
            await log.close()
            await connection.close()

    run(scenario())


def test_the_time_of_an_id_is_only_believed_of_a_uuid7() -> None:
    now = datetime.now(UTC)
    made = made_at(uuid7())
    assert made is not None
    assert abs(made + SKEW - now) < timedelta(seconds=5)
    others: Sequence[str] = ("payment 4711", "", "0193f3a0-1234-4abc-8def-0123456789ab", "f" * 36)
    assert [made_at(text) for text in others] == [None] * 4
    assert made_at("ffffffff-ffff-7abc-8def-0123456789ab") is None
