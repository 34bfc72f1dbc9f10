"""An aggregate as its history says it is, now and in the past, for programs that read the log."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregates import InvalidId
from aggregates.declaration import declare
from examples.bank import Account, Deposit
from kernel import Client, LoadedAggregate, Service
from kernel.errors import NotDeclared, UnreadableHistory
from kernel.log.base import EventLog
from kernel.log.history import load_aggregate
from kernel.log.memory import MemoryLog
from tests.apps import Notebook, bank
from tests.conftest import run, settings_for

ACCOUNT = declare(Account)
MIDNIGHT = datetime(2026, 1, 31, tzinfo=UTC)


async def store(log: EventLog, *numbers: int, minutes: int | None = None, **fields: object) -> None:
    """Store a commit of deposits of 5 with these numbers, a minute after each other unless a time is given."""
    subject = log.subjects.address("Account", "a").subject
    last = await log.last(subject)
    events = []
    for number in numbers:
        time = MIDNIGHT + timedelta(minutes=number if minutes is None else minutes)
        event = {"id": "1", "type": "Deposited", "time": time.isoformat(), "data": {"cents": 5}, "sequence": number}
        events.append(event | fields)
    await log.append(subject, 0 if last is None else last.sequence, json.dumps(events).encode())


async def load(log: EventLog, at: int | datetime | None = None) -> tuple[int, int]:
    """Return version and balance."""
    loaded = await load_aggregate(log, ACCOUNT, "a", at)
    return loaded.version, loaded.state.balance


async def test_a_state_is_loaded_from_a_service_now_and_as_of_then(app_name: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with Service(bank(app_name), settings) as service, await Client.connect(service.app, settings) as client:
        moments = []
        for cents in (100, 20, 3):
            await client.execute(Account, "alice", Deposit(cents))
            moments.append(datetime.now(UTC))
        loaded = await client.load(Account, "alice")
        assert isinstance(loaded, LoadedAggregate)
        assert (type(loaded.state), loaded.state.id, loaded.state.balance) == (Account, "alice", 123)
        assert loaded.version == 3
        assert [(await client.load(Account, "alice", at=at)).state.balance for at in (0, 1, 2, 3, 99)] == [
            0, 100, 120, 123, 123,
        ]  # fmt: skip
        assert [(await client.load(Account, "alice", at=at)).version for at in moments] == [1, 2, 3]
        assert (await client.load(Account, "nobody")).version == 0
        loaded.state.balance = 0
        assert (await client.load(Account, "alice")).state.balance == 123
        with pytest.raises(NotDeclared, match="it has Account"):
            await client.load(Notebook, "alice")
        with pytest.raises(InvalidId, match="empty"):
            await client.load(Account, "")
        with pytest.raises(ValueError, match="at=-1"):
            await client.load(Account, "alice", at=-1)


def test_a_time_ends_the_history_where_the_clock_first_passes_it() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await store(log, 1, 2)
        await store(log, 3)
        await store(log, 4, minutes=1)  # of a worker whose clock is behind
        assert await load(log, MIDNIGHT) == (0, 0)
        assert await load(log, MIDNIGHT + timedelta(minutes=1)) == (1, 5)
        assert await load(log, MIDNIGHT + timedelta(minutes=2.5)) == (2, 10)
        assert await load(log, datetime(2026, 1, 31, 0, 3)) == (4, 20)  # UTC
        assert await load(log, datetime.fromisoformat("2026-01-31T01:02:00+01:00")) == (2, 10)

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"type": "Renamed"}, "it is of a newer program: Account has no event named 'Renamed'"),
        ({"dataversion": 2}, "it is of a newer program: "),
        ({"data": {"cents": "five"}}, "cents"),
        ({"sequence": 4}, "event 4 is stored there. Restore the log"),
        ({"time": "yesterday"}, "ValueError while it was folded"),
    ],
    ids=["unknown", "newer", "undecodable", "gap", "time"],
)
def test_a_history_that_can_not_be_read_says_where_and_how_far_it_can(fields: dict[str, object], says: str) -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await store(log, 1, 2)
        await store(log, 3, **fields)
        at = datetime.now(UTC) if "time" in fields else None
        with pytest.raises(UnreadableHistory) as raised:
            await load(log, at)
        assert (
            f"can't read event 3 of Account 'a', at stream sequence 2: {says}" in str(raised.value) or says == "cents"
        )
        assert says in str(raised.value)
        assert raised.value.version == 2
        assert await load(log, raised.value.version) == (2, 10)

    run(scenario())


def test_what_is_no_commit_is_passed_over_as_services_do() -> None:
    async def scenario() -> None:
        log = MemoryLog("bank")
        await store(log, 1)
        await log.append(log.subjects.address("Account", "a").subject, 1, b"no commit")
        await store(log, 2)
        assert await load(log) == (2, 10)

    run(scenario())
