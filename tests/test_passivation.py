"""Aggregates come to life when needed, and go when idle or too many, never with something under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from kernel import Client, Service
from kernel.actors import Actors
from kernel.commands import CommandGateway
from kernel.log import MemoryLog
from kernel.residents import Residents
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]


def residents(limit: int, idle: float) -> Residents:
    log = MemoryLog("books")
    gateway = CommandGateway(
        notebooks("books"), log, log.subjects, lambda *_message: None, 100, lambda _partition: True
    )
    gateway.actors = Actors(gateway)
    gateway.residents = Residents(gateway.actors, limit, idle)
    return gateway.residents


def wake(of: Residents, *ids: int) -> list[Any]:
    subjects = MemoryLog("books").subjects
    return of.wake([subjects.address("Notebook", f"n{one}") for one in ids])


async def test_over_the_limit_the_least_recently_used_go_first() -> None:
    live = residents(limit=2, idle=1000)
    wake(live, 1, 2, 3)
    wake(live, 1)
    assert live.sweep() == 1
    assert [resident.address.id for resident in live.all()] == ["n3", "n1"]


async def test_idle_aggregates_go_and_used_ones_stay() -> None:
    live = residents(limit=100, idle=1000)
    first, _second = wake(live, 1, 2)
    first.used = time.monotonic() - 2000
    assert live.sweep() == 1
    assert [resident.address.id for resident in live.all()] == ["n2"]


async def test_a_busy_aggregate_never_goes() -> None:
    live = residents(limit=0, idle=0)
    (busy, _) = wake(live, 1, 2)
    busy.busy = 1
    live.sweep()
    assert live.all() == [busy]
    busy.busy = 0
    live.sweep()
    assert live.all() == []


async def test_actors_are_used_again_so_that_memory_does_not_grow() -> None:
    live = residents(limit=0, idle=1000)
    for round_ in range(50):
        wake(live, *range(round_ * 20, round_ * 20 + 20))
        while live.sweep():
            pass
    actors = sum(len(empty) for empty in live._empty.values())
    # one more than ever were alive at once is made only where a partition had none to spare
    assert actors <= 64 * 4
    assert len(live) == 0


async def test_with_hardly_any_room_every_number_is_right(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(
        notebooks(app_name), settings_for(tmp_path, nats=nats_url, database=database_url, max_actors=3, idle=0.01)
    )
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        receipts: list[Any] = []

        async def lane(start: int) -> None:
            for number in range(start, 1000, 25):
                receipts.append(await client.execute(Notebook, f"n{number % 100}", Note("word", number)))
                await service._passivate()

        await asyncio.gather(*(lane(start) for start in range(25)))
        pages = await client.query("select * from pages", after=receipts)
        assert len(pages) == 100
        assert {page["notes"] for page in pages} == {10}
        assert sum(page["total"] for page in pages) == sum(range(1000))
    await service.stop()


async def test_an_idle_service_passivates_everything(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, idle=0.1))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
        await asyncio.gather(*(client.execute(Notebook, f"n{n}", Note("word")) for n in range(50)))
        await wait_until(lambda: len(service.residents) == 0)
        again = await client.execute(Notebook, "n7", Note("word"))
        assert again.version == 2
        rows = await client.query("select notes from pages where notebook = 'n7'", after=again)
        assert rows == [{"notes": 2}]
    await service.stop()
