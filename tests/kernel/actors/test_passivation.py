"""Aggregates are activated on demand, and passivated when idle or too many, never while something is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from aggregates.cell import Cell
from kernel import Client, Service
from kernel.actors.mailbox import Loaded
from kernel.actors.residents import Residents
from kernel.actors.sizing import size_of
from kernel.actors.snapshots import NO_SNAPSHOTS
from kernel.commands.gateway import CommandGateway
from kernel.log import MemoryLog
from kernel.settings import Passivation
from kernel.transport.outbox import Outbox
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]


def residents(limit: int, idle: float, budget: int = 0) -> Residents:
    passivation = Passivation.model_construct(count=limit, idle=idle, memory=budget)
    gateway = CommandGateway(
        notebooks("books"), MemoryLog("books"), Outbox(Discard()), lambda _partition: True, passivation, NO_SNAPSHOTS
    )
    return gateway.residents


class Discard:
    def send(self, frames: bytes) -> None:
        pass

    def fits(self, *_message: bytes) -> bool:
        return True


def wake(of: Residents, *ids: int) -> list[Any]:
    subjects = MemoryLog("books").subjects
    return of.wake([subjects.address("Notebook", f"n{number}") for number in ids])


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
    # more actors than were ever live at once are made only where a partition had no spare one
    assert actors <= 64 * 4
    assert len(live) == 0


def fill(of: Residents, *found: Any, kilobytes: int = 1) -> None:
    """Give the aggregates states of this size."""
    declared = notebooks("books").types["Notebook"]
    messages = []
    for resident in found:
        cell = Cell(declared, resident.address.id)
        cell.state.much = [f"{resident.address.id} {number}".ljust(1000) for number in range(kilobytes)]  # type: ignore[attr-defined]
        messages.append((resident.actor, Loaded(cell)))
    of.actors.send(messages)


def measure_all(of: Residents) -> None:
    while of._changed:
        of.measure()


async def test_the_memory_of_some_aggregates_is_measured_and_the_others_are_estimated_from_it() -> None:
    live = residents(limit=10_000, idle=1000)
    found = wake(live, *range(100))
    fill(live, *found, kilobytes=20)
    measure_all(live)
    measured = live.memory
    assert 100 * 20_000 < measured < 100 * 30_000
    wake(live, *range(100, 200))
    assert live.memory == pytest.approx(2 * measured, rel=0.01)
    measure_all(live)
    assert live.memory == pytest.approx(measured, rel=0.2)


async def test_a_state_that_has_grown_is_measured_again_when_it_was_used() -> None:
    live = residents(limit=10_000, idle=1000)
    (resident,) = wake(live, 1)
    fill(live, resident, kilobytes=1)
    measure_all(live)
    before = live.memory
    wake(live, 1)
    fill(live, resident, kilobytes=30)
    measure_all(live)
    assert live.memory > before + 29_000
    wake(live, *range(2, 50))
    assert live.sweep() == 0


async def test_over_the_memory_budget_the_least_recently_used_go_until_it_is_kept() -> None:
    live = residents(limit=10_000, idle=1000, budget=10 * 21_500)
    found = wake(live, *range(30))
    fill(live, *found, kilobytes=20)
    measure_all(live)
    wake(live, 0)
    while live.sweep():
        pass
    assert live.memory <= live.budget
    left = [resident.address.id for resident in live.all()]
    assert 8 <= len(left) <= 10
    assert left == [f"n{number}" for number in range(31 - len(left), 30)] + ["n0"]


async def test_over_the_budget_busy_aggregates_stay_and_the_next_ones_go_instead() -> None:
    live = residents(limit=10_000, idle=1000, budget=1)
    found = wake(live, *range(300))
    fill(live, *found)
    measure_all(live)
    for resident in found[:200]:
        resident.busy = 1
    while live.sweep():
        pass
    assert {resident.address.id for resident in live.all()} == {resident.address.id for resident in found[:200]}


async def test_passivated_aggregates_are_no_longer_counted() -> None:
    live = residents(limit=0, idle=1000)
    for round_ in range(5):
        fill(live, *wake(live, *range(round_ * 100, round_ * 100 + 100)))
        live.measure()
        while live.sweep():
            pass
        assert live.memory == 0
        assert not live._changed


def test_the_size_of_objects_is_bounded_work_and_about_right() -> None:
    class Thing:
        def __init__(self, text: str) -> None:
            self.text = text
            self.same = Thing

    shared = "shared".ljust(10_000)
    assert 10_000 < size_of([[shared] * 10]) < 11_000
    assert 1_000 < size_of([Thing("x".ljust(1_000))]) < 1_300
    many = [Thing(f"{number}".ljust(1_000)) for number in range(20_000)]
    assert 20_000 * 1_000 < size_of([many]) < 20_000 * 1_400
    nested: dict[int, Any] = {n: {m: [float(m)] * 2 for m in range(1000, 1100)} for n in range(1000, 1100)}
    exact = size_of([nested], most=10**9)
    assert size_of([nested]) == pytest.approx(exact, rel=0.5)


@pytest.mark.setting("passivation.count")
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
                await service.parts.gateway.residents.passivate()

        await asyncio.gather(*(lane(start) for start in range(25)))
        pages = await client.query("select * from pages", after=receipts)
        assert len(pages) == 100
        assert {page["notes"] for page in pages} == {10}
        assert sum(page["total"] for page in pages) == sum(range(1000))
    await service.stop()


@pytest.mark.setting("passivation.idle")
async def test_an_idle_service_passivates_everything(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, idle=0.1))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
        await asyncio.gather(*(client.execute(Notebook, f"n{n}", Note("word")) for n in range(50)))
        await wait_until(lambda: len(service.parts.gateway.residents) == 0)
        again = await client.execute(Notebook, "n7", Note("word"))
        assert again.version == 2
        rows = await client.query("select notes from pages where notebook = 'n7'", after=again)
        assert rows == [{"notes": 2}]
    await service.stop()


@pytest.mark.setting("passivation.memory")
async def test_a_memory_budget_too_small_for_anything_keeps_every_number_right(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, passivation__memory=1))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
        receipts: list[Any] = []

        async def lane(start: int) -> None:
            for number in range(start, 600, 20):
                receipts.append(await client.execute(Notebook, f"n{number % 60}", Note("word", number)))
                await service.parts.gateway.residents.passivate()

        await asyncio.gather(*(lane(start) for start in range(20)))
        pages = await client.query("select * from pages", after=receipts)
        assert {page["notes"] for page in pages} == {10}
        assert sum(page["total"] for page in pages) == sum(range(600))
        status = service.status()
        assert status["memory"]["limit"] == 1
    await service.stop()


async def test_nothing_goes_while_it_is_loaded_waits_in_line_is_being_appended_or_written(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, max_actors=1, idle=0.001))
    await service.start()
    gate, writing, written = asyncio.Event(), asyncio.Event(), asyncio.Event()
    read, write = service.parts.log.read_subject, service.parts.projector.committer.write

    async def slow_read(subject: str, after: int = 0) -> Any:
        await gate.wait()
        return await read(subject, after)

    async def slow_write(writer: Any, batch: Any) -> None:
        writing.set()
        await written.wait()
        await write(writer, batch)

    monkeypatch.setattr(service.parts.log, "read_subject", slow_read)
    monkeypatch.setattr(service.parts.projector.committer, "write", slow_write)
    async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
        # one command loads the aggregate, the commands behind it are stashed
        sending = [asyncio.ensure_future(client.execute(Notebook, "busy", Note("a", n))) for n in range(5)]
        poisoned = asyncio.ensure_future(client.execute(Notebook, "bad", Note("poison row")))

        def live() -> set[str]:
            return {resident.address.id for resident in service.parts.gateway.residents.all()}

        await wait_until(lambda: live() == {"busy", "bad"})
        for _ in range(3):
            await service.parts.gateway.residents.passivate()
        assert live() == {"busy", "bad"}
        gate.set()
        receipts = [*await asyncio.gather(*sending), await poisoned]
        # folded, one aggregate parked, and not yet written
        await writing.wait()
        for _ in range(3):
            await service.parts.gateway.residents.passivate()
        assert "busy" in live()
        written.set()
        await client.query("select 1", after=receipts)
        assert await client.query("select notebook, notes from pages") == [{"notebook": "busy", "notes": 5}]
        await wait_until(lambda: not live())
        again = await client.execute(Notebook, "busy", Note("a"))
        assert again.version == 6
        assert await client.query("select notes from pages", after=again) == [{"notes": 6}]
    await service.stop()
