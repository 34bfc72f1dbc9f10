"""Several workers share the partitions; a frozen, killed or replaced worker can do no damage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.bank import Account, Deposit
from examples.bank import app as bank
from kernel import Client, Service
from kernel.errors import CommandError, Conflict, WorkersFailed
from kernel.transport.dial import connect
from kernel.workers.supervisor import Supervisor
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]


@asynccontextmanager
async def workers(
    count: int, tmp_path: Path, nats: str, database: str, app: str, wait_until: Wait, lease: float = 5.0, **more: Any
) -> AsyncIterator[list[Service]]:
    """Services that share the partitions evenly, in this process.

    Args:
        lease: seconds; short only where a test waits for its end, because a busy machine delays renewals by a second.
    """
    services = [
        Service(notebooks(app), settings_for(tmp_path / str(n), nats=nats, database=database, lease=lease, **more))
        for n in range(count)
    ]
    try:
        for service in services:
            await service.start()
        share = 64 // count
        await wait_until(lambda: all(abs(len(service.status()["partitions"]) - share) <= 1 for service in services))
        yield services
    finally:
        for service in services:
            await service.stop()


def owner(services: list[Service], aggregate_id: str) -> Service:
    partition = services[0].parts.log.subjects.partition("Notebook", aggregate_id)
    (holder,) = [service for service in services if partition in service.status()["partitions"]]
    return holder


async def freeze(service: Service) -> None:
    """Have the same effect as SIGSTOP, seen from outside: the service renews no lease and notices no change."""
    service.scheduler.stop()
    ownership = service.parts.ownership
    ownership._leaving = True


async def test_each_partition_has_one_owner_and_all_work(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with workers(3, tmp_path, nats_url, database_url, app_name, wait_until) as services:
        owned = [set(service.status()["partitions"]) for service in services]
        assert set.union(*owned) == set(range(64))
        assert sum(map(len, owned)) == 64
        async with await Client.connect(services[0].app, nats=nats_url, database=database_url) as client:
            receipts = await asyncio.gather(*(client.execute(Notebook, f"n{n % 50}", Note("a")) for n in range(500)))
            rows = await client.query("select notes from pages", after=receipts)
        assert [row["notes"] for row in rows] == [10] * 50
        assert all(service.status()["actors"] > 0 for service in services)


async def test_a_command_that_does_not_know_its_partition_reaches_the_owner(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    database = f"sqlite:///{tmp_path / 'p.db'}"
    async with workers(2, tmp_path, nats_url, database, app_name, wait_until):
        connection = await connect(nats_url, name="anybody")
        for n in range(40):
            request = b'{"aggregate":"Notebook","id":"n%d","command":"Note","data":{"text":"a"}}' % n
            answer = await connection.request(f"{app_name}.cmd", request, timeout=5)
            assert b'"ok"' in answer.data
        await connection.close()


async def test_partitions_move_under_load_without_a_command_lost_or_refused(
    nats_url: str,
    database_url: str,
    app_name: str,
    tmp_path: Path,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a command that is lost on the way now fails, because the client does not send it again
    monkeypatch.setattr("kernel.transport.sender.RESEND_S", 600.0)
    async with workers(1, tmp_path, nats_url, database_url, app_name, wait_until) as services:
        stop = asyncio.Event()
        sent = [0] * 20
        async with await Client.connect(services[0].app, nats=nats_url, database=database_url) as client:

            async def lane(number: int) -> None:
                while not stop.is_set():
                    receipt = await client.execute(Notebook, f"n{number}", Note("a"))
                    sent[number] += 1
                    assert receipt.version == sent[number]
                    assert not receipt.duplicate

            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(lane(number))
                second = Service(
                    services[0].app, settings_for(tmp_path / "2", nats=nats_url, database=database_url, lease=5.0)
                )
                await second.start()
                await wait_until(lambda: len(second.status()["partitions"]) == 32)
                enough = sum(sent) + 500
                await wait_until(lambda: sum(sent) > enough)
                await second.stop()
                await wait_until(lambda: len(services[0].status()["partitions"]) == 64)
                enough = sum(sent) + 500
                await wait_until(lambda: sum(sent) > enough)
                stop.set()
            last = [await client.execute(Notebook, f"n{n}", Note("a")) for n in range(20)]
            pages = await client.query("select * from pages", after=last, timeout=30)
        expected = {f"n{n}": count + 1 for n, count in enumerate(sent)}
        assert {page["notebook"]: page["notes"] for page in pages} == expected


async def test_the_partitions_of_a_silent_worker_move_within_seconds(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with workers(2, tmp_path, nats_url, database_url, app_name, wait_until, lease=1.0) as (first, second):
        await freeze(second)
        await wait_until(lambda: len(first.status()["partitions"]) == 64, timeout=5)


async def test_a_killed_worker_that_is_started_again_takes_over_from_itself_at_once(
    tmp_path: Path, wait_until: Wait
) -> None:
    supervisor = Supervisor(
        "bank", "examples.bank:app", settings_for(tmp_path, lease=60.0, workers=2, logging__level="error")
    )
    await supervisor.start()
    try:
        workers = supervisor.workers
        await wait_until(
            lambda: all(len(worker.heartbeat.get("partitions", ())) == 32 for worker in workers), timeout=30
        )
        before, process = workers[1].heartbeat["worker"], workers[1].process
        assert process is not None
        process.kill()
        await wait_until(lambda: workers[1].heartbeat.get("worker", before) != before, timeout=30)
        await wait_until(
            lambda: all(len(worker.heartbeat.get("partitions", ())) == 32 for worker in workers), timeout=30
        )
        async with await Client.connect(bank, data=tmp_path) as client:
            await asyncio.gather(*(client.execute(Account, f"a{n}", Deposit(1)) for n in range(100)))
    finally:
        await supervisor.stop()


async def test_a_thawed_worker_refuses_commands_and_can_write_nothing(
    nats_url: str,
    database_url: str,
    app_name: str,
    tmp_path: Path,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with workers(2, tmp_path, nats_url, database_url, app_name, wait_until, lease=1.0) as services:
        aggregate = next(f"n{n}" for n in range(100) if owner(services, f"n{n}") is services[1])
        first, frozen = services
        async with await Client.connect(first.app, nats=nats_url, database=database_url) as client:
            await client.execute(Notebook, aggregate, Note("before"))
            await freeze(frozen)
            await wait_until(lambda: len(first.status()["partitions"]) == 64, timeout=5)
            address = client.log.subjects.address("Notebook", aggregate)
            answers: list[bytes] = []
            monkeypatch.setattr(frozen.parts.outbox, "publish", lambda _subject, payload: answers.append(payload))
            # a command that it had received before, to be decided on a state that another worker has changed since
            receipts = [await client.execute(Notebook, aggregate, Note("after"), timeout=10)]
            assert receipts[0].version == 2
            frozen.parts.admission.assign(frozenset({address.partition}))
            request = b'{"aggregate":"Notebook","id":"%s","command":"Note","data":{"text":"stale"}}'
            frozen.parts.admission.receive(address.subject.encode(), b"somewhere", request % aggregate.encode(), None)
            await wait_until(lambda: answers)
            assert b'"unavailable"' in answers[0]
            stored = await client.log.read_subject(address.subject)
            assert len(stored) == 2
            # the log itself refuses a commit on a stale state
            with pytest.raises(Conflict):
                await frozen.parts.log.append(address.subject, stored[0].sequence, b"[stale]")
            rows = await client.query("select notes from pages where notebook = :n", {"n": aggregate}, after=receipts)
            assert rows == [{"notes": 2}]


async def test_a_partition_that_comes_back_is_decided_on_what_others_have_written(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with workers(1, tmp_path, nats_url, database_url, app_name, wait_until) as services:
        async with await Client.connect(services[0].app, nats=nats_url, database=database_url) as client:
            for n in range(30):
                await client.execute(Notebook, f"n{n}", Note("one"))
            second = Service(
                services[0].app, settings_for(tmp_path / "2", nats=nats_url, database=database_url, lease=5.0)
            )
            await second.start()
            await wait_until(lambda: len(second.status()["partitions"]) == 32)
            assert [(await client.execute(Notebook, f"n{n}", Note("two"))).version for n in range(30)] == [2] * 30
            await second.stop()
            await wait_until(lambda: len(services[0].status()["partitions"]) == 64)
            conflicts = services[0].parts.log.appender.read_backs
            three = [await client.execute(Notebook, f"n{n}", Note("three")) for n in range(30)]
            assert [receipt.version for receipt in three] == [3] * 30
            assert services[0].parts.log.appender.read_backs == conflicts
            rows = await client.query("select notes from pages", after=three)
            assert [row["notes"] for row in rows] == [3] * 30


async def test_a_foreign_writer_is_noticed_and_caught_up_with(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with workers(1, tmp_path, nats_url, database_url, app_name, wait_until) as (service,):
        async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
            receipt = await client.execute(Notebook, "n", Note("a"))
            address = client.log.subjects.address("Notebook", "n")
            (stored,) = await client.log.read_subject(address.subject)
            theirs = stored.payload.replace(b'"sequence":1', b'"sequence":2').replace(b'"text":"a"', b'"text":"b"')
            sequence = await client.log.append(address.subject, stored.sequence, theirs)
            await wait_until(lambda: service.status()["projection"]["position"] >= sequence)
            resident = service.parts.gateway.residents.find(address.subject)
            assert resident is not None
            receipt = await client.execute(Notebook, "n", Note("c"))
            assert receipt.version == 3
            rows = await client.query("select notes, last from pages", after=receipt)
            assert rows == [{"notes": 3, "last": "c"}]


async def test_workers_that_start_at_once_build_the_tables_once(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    services = [
        Service(notebooks(app_name), settings_for(tmp_path / str(n), nats=nats_url, database=database_url))
        for n in range(3)
    ]
    await asyncio.gather(*(service.start() for service in services))
    async with await Client.connect(services[0].app, nats=nats_url, database=database_url) as client:
        built = await client.query("select name, generation, state from eskernel_projection order by name")
        assert [(generation["name"], generation["generation"], generation["state"]) for generation in built] == [
            (name, 1, "live") for name in ("Lines", "Pages", "Words")
        ]
    for service in services:
        await service.stop()


async def test_a_stopping_worker_says_when_to_try_again(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    database = f"sqlite:///{tmp_path / 'p.db'}"
    async with workers(1, tmp_path, nats_url, database, app_name, wait_until) as (service,):
        async with await Client.connect(service.app, nats=nats_url) as client:
            await client.execute(Notebook, "n", Note("a"))
            service.parts.admission._stopping = True
            with pytest.raises(CommandError) as refused:
                await client.execute(Notebook, "n", Note("b"), timeout=0.1)
            assert refused.value.type == "overloaded"
            assert refused.value.retry_after
            assert "stopping" in refused.value.message


async def test_a_worker_that_cannot_start_gives_its_reason_and_is_not_started_again(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    """Its start sets `stopped` before it has closed what it had opened, which must not hide the reason."""
    settings = settings_for(
        tmp_path, nats=nats_url, database=f"sqlite:///{tmp_path / 'p.db'}", workers=2,
        stream__existing="validate", stream__name=app_name,
    )  # fmt: skip
    supervisor = Supervisor("bank", "examples.bank:app", settings)
    async with asyncio.timeout(60):
        with pytest.raises(WorkersFailed, match="never creates it"):
            await supervisor.start()
    assert {worker.restarts for worker in supervisor.workers} == {0}
