"""Events of aggregates that the program does not declare are passed over; a renamed class is refused at start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregates import Aggregate, DeclarationError
from kernel import Client, Rebuild, Service
from kernel.log import MemoryLog
from kernel.projector.unknown import UnknownAggregates
from tests.conftest import settings_for
from tests.programs import Deposit, Program, program


@pytest.fixture
def run(nats_url: str, database_url: str, tmp_path: Path) -> Callable[[Program], Any]:
    """Make a service of a program; all of them have the same log and the same database."""

    def make(given: Program) -> Service:
        return Service(given.app, settings_for(tmp_path / "data", nats=nats_url, database=database_url))

    return make


async def execute(service: Service, aggregate: type[Aggregate] | None, aggregate_id: str, amount: int) -> None:
    assert aggregate is not None
    async with await Client.connect(service.app, nats=service.nats_url, database=service.database_url) as client:
        receipt = await client.execute(aggregate, aggregate_id, Deposit(amount))
        await client.query("SELECT 1", after=receipt)


async def rows(service: Service, sql: str) -> list[tuple[Any, ...]]:
    async with await Client.connect(service.app, nats=service.nats_url, database=service.database_url) as client:
        return [tuple(row.values()) for row in await client.query(sql)]


def warnings(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [message for message in messages if word in message]


async def test_a_renamed_class_is_refused_at_start_and_goes_on_under_its_stored_name(
    run: Callable[[Program], Service], app_name: str
) -> None:
    async with run(program(app_name)) as service:
        await execute(service, program(app_name).account, "alice", 500)
    with pytest.raises(DeclarationError) as refused:
        await run(program(app_name, class_name="BankAccount")).start()
    assert "class BankAccount(Aggregate, name='Account')" in str(refused.value)
    assert "retired=['Account']" in str(refused.value)
    renamed = program(app_name, class_name="BankAccount", stored_as="Account")
    async with run(renamed) as service:
        await execute(service, renamed.account, "alice", 200)
        assert await rows(service, "SELECT account, amount FROM balances") == [("alice", 700)]


async def test_an_aggregate_that_is_retired_is_passed_over_without_a_word(
    run: Callable[[Program], Service], app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with run(program(app_name)) as service:
        await execute(service, program(app_name).account, "alice", 500)
    other = program(app_name, class_name="Other", retired=["Account"])
    async with run(other) as service:
        await execute(service, other.account, "alice", 3)
        assert service.status()["unknown_aggregates"] == []
    assert warnings(caplog, "Account") == []


async def test_a_program_that_is_rolled_back_passes_over_the_aggregates_that_it_does_not_know(
    run: Callable[[Program], Service], app_name: str, caplog: pytest.LogCaptureFixture, wait_until: Any
) -> None:
    old, new = program(app_name), program(app_name, loans=True)
    async with run(old) as service:
        await execute(service, old.account, "alice", 500)
    # a new aggregate is no renamed one: the program knows all that the log has
    async with run(new) as service:
        for name in ("a", "b", "c"):
            await execute(service, new.loan, name, 3)
    async with run(old) as service:
        assert service.status()["unknown_aggregates"] == [{"aggregate": "Loan", "commits": 3}]
        log = service.parts.log
        address = log.subjects.address("Loan", "a")
        (first,) = await log.read_subject(address.subject)
        await log.append(address.subject, first.sequence, first.payload)
        await wait_until(lambda: service.status()["unknown_aggregates"] == [{"aggregate": "Loan", "commits": 4}])
        await execute(service, old.account, "alice", 200)
        assert await rows(service, "SELECT account, amount FROM balances") == [("alice", 700)]
        assert await rows(service, "SELECT * FROM eskernel_dead_letter") == []
    assert len(warnings(caplog, "Loan")) == 1


async def test_an_empty_log_and_a_new_aggregate_are_taken_as_they_are() -> None:
    log = MemoryLog("bank")
    app = program("bank", loans=True).app
    await UnknownAggregates(app).survey(log)
    await log.append(log.subjects.address("Account", "alice").subject, 0, b"[]")
    await UnknownAggregates(app).survey(log)


async def test_messages_that_are_of_no_aggregate_are_none() -> None:
    log = MemoryLog("bank", partitions=64)
    wrong = (log.subjects.partition("Nobody", "alice") + 1) % 64
    for subject in ("bank.evt.noise", f"bank.evt.{wrong}.Nobody.alice", "bank.evt.0.a.b.c"):
        await log.append(subject, 0, b"[]")
    unknown = UnknownAggregates(program("bank").app)
    await unknown.survey(log)
    assert unknown.report() == []


async def test_every_declared_aggregate_without_events_is_named() -> None:
    log = MemoryLog("bank")
    await log.append(log.subjects.address("Konto", "alice").subject, 0, b"[]")
    with pytest.raises(DeclarationError) as refused:
        await UnknownAggregates(program("bank", loans=True).app).survey(log)
    account, loan = refused.value.problems
    assert "none of Account" in account
    assert "class Account(Aggregate, name='Konto')" in account
    assert "none of Loan" in loan


async def test_a_renamed_class_empties_no_projection_by_a_rebuild(
    run: Callable[[Program], Service], app_name: str
) -> None:
    renamed = program(app_name, class_name="BankAccount").app
    async with run(program(app_name)) as service:
        await execute(service, program(app_name).account, "alice", 500)
        parts = service.parts
        with pytest.raises(DeclarationError, match="name='Account'"):
            await Rebuild(renamed, parts.log, parts.engine, renamed.projections).run()
        assert await rows(service, "SELECT account, amount FROM balances") == [("alice", 500)]
