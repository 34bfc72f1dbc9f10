"""Two programs over one log: what the older one cannot read waits, in both services, over restarts and rebuilds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kernel import Client, Rebuild, Service
from kernel.errors import CommandError
from tests.conftest import settings_for
from tests.programs import Close, Deposit, Program, program


@pytest.fixture
def run(nats_url: str, database_url: str, tmp_path: Path) -> Callable[..., Service]:
    """Make a service of a program; all of them have the same log and the same database."""

    def make(given: Program, place: str = "data") -> Service:
        return Service(
            given.app,
            settings_for(tmp_path / place, nats=nats_url, database=database_url, partitions=8, retry_after=0.1),
        )

    return make


def metric(name: str) -> float | None:
    return REGISTRY.get_sample_value(name)


async def connected(service: Service) -> Client:
    return await Client.connect(service.app, nats=service.nats_url, database=service.database_url)


async def execute(service: Service, given: Program, aggregate_id: str, command: Any, timeout: float = 15.0) -> Any:
    async with await connected(service) as client:
        return await client.execute(given.account, aggregate_id, command, timeout=timeout)


async def everything(service: Service, after: Any = None) -> list[Any]:
    async with await connected(service) as client:
        return [
            [tuple(row.values()) for row in await client.query(sql, after=after)]
            for sql in (
                "SELECT account, amount FROM balances ORDER BY account",
                "SELECT amount, times FROM amounts ORDER BY amount",
                "SELECT account, sequence, amount FROM lines ORDER BY account, sequence",
                "SELECT aggregate_id, sequence FROM eskernel_dead_letter",
            )
        ]


NEW = {"version": 2, "closes": True}


async def test_an_older_program_waits_with_what_it_cannot_read_and_a_newer_one_goes_on(
    run: Callable[..., Service], app_name: str, caplog: pytest.LogCaptureFixture, wait_until: Any
) -> None:
    old, new, unprojected = program(app_name), program(app_name, **NEW), program(app_name, projected=False, **NEW)
    async with run(old) as service:
        await execute(service, old, "a", Deposit(1))
    # a newer program decides while an older one projects, as in a rolling update
    async with run(unprojected, "newer") as service:
        for name in ("a", "b"):
            await execute(service, unprojected, name, Deposit(2))
            await execute(service, unprojected, name, Close())
    for _restart in range(2):
        async with run(old) as service:
            await wait_until(lambda: service.status()["waiting_aggregates"])
            ((waiting),) = service.status()["waiting_aggregates"]
            assert (waiting["aggregate"], waiting["aggregates"]) == ("Account", 2)
            assert "Deposited has schema version 2" in waiting["why"]
            with pytest.raises(CommandError, match="newer program") as refused:
                await execute(service, old, "a", Deposit(9), timeout=0.5)
            assert (refused.value.type, bool(refused.value.retry_after)) == ("unavailable", True)
            last = await execute(service, old, "c", Deposit(3))  # no other command waits
            assert (await everything(service, last))[0] == [("a", 1), ("c", 3 if not _restart else 6)]
            assert metric("eskernel_parked_aggregates") == 0
            await wait_until(lambda: metric("eskernel_waiting_aggregates") == 2)
            assert service.health.ready
    assert len([line for line in caplog.messages if "wait for a program that can read" in line]) == 2  # one each start
    ours = [record for record in caplog.records if record.name.startswith("eskernel")]
    assert not [record for record in ours if record.levelno >= logging.ERROR]
    async with run(new) as service:
        last = await execute(service, new, "a", Deposit(4))
        assert await everything(service, last) == [
            [("a", 7), ("b", 2), ("c", 6)],
            [(1, 1), (2, 2), (3, 2), (4, 1)],
            [("a", 1, 1), ("a", 2, 2), ("a", 4, 4), ("b", 1, 2), ("c", 1, 3), ("c", 2, 3)],
            [],
        ]
        await wait_until(lambda: metric("eskernel_waiting_aggregates") == 0)
        assert service.status()["waiting_aggregates"] == []


async def test_a_rebuild_by_an_older_program_waits_too_and_one_by_a_newer_program_does_not(
    run: Callable[..., Service], app_name: str
) -> None:
    old, new = program(app_name), program(app_name, **NEW)
    async with run(new) as service:
        await execute(service, new, "b", Deposit(7))
        await execute(service, new, "a", Close())
        last = await execute(service, new, "a", Deposit(2))
        whole = await everything(service, last)
        parts = service.parts
        for app, parked in ((old.app, 0), (new.app, 0)):
            built = await Rebuild(app, parts.log, parts.engine, app.projections).run()
            assert [made.parked for made in built] == [parked] * 3
        assert (await everything(service))[:3] == whole[:3]
    async with run(old) as service:
        await Rebuild(old.app, service.parts.log, service.parts.engine, old.app.projections).run()
        assert (await everything(service))[:3] == [[], [], []]
    async with run(new) as service:
        last = await execute(service, new, "b", Deposit(1))
        assert (await everything(service, last))[0] == [("a", 2), ("b", 8)]


async def test_a_rolling_update_moves_the_partitions_to_the_newer_program(
    run: Callable[..., Service], app_name: str, wait_until: Any
) -> None:
    old, new = program(app_name), program(app_name, **NEW)
    older, newer = run(old), run(new, "newer")
    names = [f"a{number}" for number in range(16)]
    await older.start()
    async with await connected(older) as client:
        for name in names:
            await client.execute(old.account, name, Deposit(1))
        await newer.start()
        await wait_until(lambda: len(older.partitions) == len(newer.partitions) == 4)
        for name in names:
            if newer.parts.log.subjects.partition("Account", name) in newer.partitions:
                await client.execute(new.account, name, Deposit(2))
        await newer.stop()
        # taken back for a moment: the older program has all partitions again, and waits for some aggregates
        await wait_until(lambda: len(older.partitions) == 8)
        log = older.parts.log
        own = [name for name in names if len(await log.read_subject(log.subjects.address("Account", name).subject)) > 1]
        assert 0 < len(own) < len(names)
        again = run(new, "newer")
        await again.start()
        await older.stop()
        await wait_until(lambda: len(again.partitions) == 8)
        last = [await client.execute(new.account, name, Deposit(3)) for name in names]
        assert (await everything(again, last))[0] == sorted((name, 6 if name in own else 4) for name in names)
        assert (await everything(again))[3] == []
    await again.stop()
