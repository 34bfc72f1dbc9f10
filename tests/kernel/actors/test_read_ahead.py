"""What is read in one go after a take-over spares cold aggregates their round trips, and is never out of date."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from aggregates import Context
from aggregates.cell import Cell
from aggregates.commit import Decision, encode, timestamp
from aggregates.context import uuid7
from aggregates.declaration import declare
from kernel.actors import read_ahead
from kernel.actors.histories import Histories
from kernel.actors.mailbox import Loaded
from kernel.actors.snapshots import SnapshotKeeper
from kernel.log import JetStreamLog, open_log
from kernel.log.reader import GENTLE
from kernel.log.snapshots import SnapshotStore, open_snapshots, snapshots_of
from kernel.log.subjects import Address
from kernel.settings.sources import settings_of
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api
from tests.apps import Note, Notebook

ALL = frozenset(range(4))
TYPE = declare(Notebook)


class Loader:
    """Loads aggregates as a worker does, and counts what it asks the stream for."""

    def __init__(self, log: JetStreamLog, store: SnapshotStore | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.round_trips = log, 0
        self._loaded: asyncio.Queue[Loaded] = asyncio.Queue()
        self.keeper = SnapshotKeeper(store, 10, 0.0)
        self.histories = Histories(log, lambda _, message: self._loaded.put_nowait(message), self.keeper)
        self.ahead = self.histories.ahead
        by_sequence, batch = log._gets.by_sequence, log._gets.batch

        def counted(ask: Any) -> Any:
            async def call(*arguments: Any) -> Any:
                self.round_trips += 1
                return await ask(*arguments)

            return call

        monkeypatch.setattr(log._gets, "by_sequence", counted(by_sequence))
        monkeypatch.setattr(log._gets, "batch", counted(batch))
        if store is not None:
            monkeypatch.setattr(store, "read", counted(store.read))

    def address(self, name: str) -> Address:
        return self.log.subjects.address("Notebook", name)

    async def load(self, name: str) -> Cell[Notebook]:
        self.histories.load(TYPE, self.address(name))
        loaded = await self._loaded.get()
        assert loaded.cell is not None, loaded.error
        return loaded.cell

    async def read_ahead(self, *takeovers: frozenset[int]) -> None:
        for partitions in takeovers or (ALL,):
            self.ahead.begin(partitions)
        await self.ready()

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            while not self.ahead._ready:
                await asyncio.sleep(0.01)

    async def append(self, cell: Cell[Notebook], text: str, *, snapshot: bool = False) -> None:
        command_id = uuid7()
        events = cell.decide(Note(text), Context(command_id))
        payload = encode("/t/Notebook", cell.state.id, [Decision(command_id, events)], cell.version, timestamp())
        address = self.address(cell.state.id)
        cell.evolve(events)
        position = await self.log.append(address.subject, cell.position, payload, cell.links)
        cell.advance(position)
        cell.remember(command_id, cell.version, position)
        if snapshot:
            cell.due = 0
            self.keeper._next = 0.0
            self.keeper.offer(address, cell, payload)

    async def fill(self, name: str, commits: int, snapshot_at: int = 0) -> Cell[Notebook]:
        cell = Cell(TYPE, name)
        for number in range(1, commits + 1):
            await self.append(cell, f"{name}-{number}", snapshot=number == snapshot_at)
        return cell


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="test")
    yield connected
    await connected.close()


@pytest.fixture
async def loader(connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Loader]:
    monkeypatch.setattr(read_ahead, "LEAST", 1)
    log = await open_log(connection, app_name, settings_of({"stream.partitions": len(ALL)}))
    store = await open_snapshots(connection, log.stream, log.subjects, "memory", 1)
    made = Loader(log, store, monkeypatch)
    yield made
    made.ahead.close()
    made.keeper.forget()
    await log.close()


async def stored(loader: Loader, snapshots: int) -> None:
    store = loader.keeper.store
    assert store is not None
    async with asyncio.timeout(10):
        while store.written < snapshots:
            await asyncio.sleep(0.01)


def same(one: Cell[Notebook], other: Cell[Notebook]) -> bool:
    return (one.state, one.version, one.position, one.commands) == (
        other.state, other.version, other.position, other.commands,
    )  # fmt: skip


async def test_a_cold_aggregate_is_loaded_with_one_question_to_the_leader(loader: Loader) -> None:
    snapshotted, short = await loader.fill("snapshotted", 30, snapshot_at=20), await loader.fill("short", 5)
    await stored(loader, 1)
    await loader.read_ahead()
    assert same(await loader.load("snapshotted"), snapshotted)
    assert same(await loader.load("short"), short)
    assert loader.round_trips == 0


async def test_what_began_before_the_end_that_was_read_is_asked_for(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "COMMITS", 8)
    bare, snapshotted = await loader.fill("bare", 20), await loader.fill("snapshotted", 30, snapshot_at=12)
    await loader.append(bare, "more")
    await stored(loader, 1)
    await loader.read_ahead()
    assert same(await loader.load("bare"), bare)
    assert same(await loader.load("snapshotted"), snapshotted)
    assert loader.round_trips > 0


async def test_what_another_worker_appended_since_is_loaded_as_well(loader: Loader) -> None:
    cell, short = await loader.fill("snapshotted", 30, snapshot_at=20), await loader.fill("short", 5)
    await stored(loader, 1)
    await loader.read_ahead()
    for late in (cell, short):
        await loader.append(late, "late")
        await loader.append(late, "later")
        assert same(await loader.load(late.state.id), late)


async def test_a_command_does_not_wait_behind_all_that_is_read_ahead(
    loader: Loader, connection: NatsConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loader.fill("snapshotted", 30, snapshot_at=20)
    await stored(loader, 1)
    asked: list[tuple[str, int]] = []
    send = connection.send

    def noted(frame: bytes) -> None:
        if found := re.match(rb"PUB \S+\.CONSUMER\.MSG\.NEXT\.(\S+)\.\S+ .*\r\n(.*)\r\n", frame):
            asked.append((found[1].decode(), orjson.loads(found[2])["batch"]))
        send(frame)

    monkeypatch.setattr(connection, "send", noted)
    await loader.read_ahead()
    assert {stream for stream, _ in asked} == {loader.log.stream, snapshots_of(loader.log.stream)}
    assert max(commits for _, commits in asked) <= GENTLE


async def test_an_aggregate_that_was_loaded_is_not_loaded_from_it_again(loader: Loader) -> None:
    cell = await loader.fill("n", 5)
    await loader.read_ahead()
    assert loader.ahead.take(loader.address("n").subject).commits
    assert loader.ahead.take(loader.address("n").subject) == read_ahead.NOTHING
    assert same(await loader.load("n"), cell)


async def test_an_aggregate_that_was_loaded_while_it_was_read_is_left_out(loader: Loader) -> None:
    await loader.fill("n", 5)
    await loader.fill("m", 5)
    loader.ahead.begin(ALL)
    await loader.load("n")
    await loader.ready()
    assert loader.ahead.take(loader.address("n").subject) == read_ahead.NOTHING
    assert loader.ahead.take(loader.address("m").subject).commits


async def test_nothing_is_kept_of_partitions_that_are_not_ours_or_no_longer(loader: Loader) -> None:
    names = [f"n{number}" for number in range(8)]
    for name in names:
        await loader.fill(name, 2)
    lost, never = sorted({loader.address(name).partition for name in names})[:2]
    await loader.read_ahead(ALL - {never})
    loader.ahead.forget({lost})
    for name in names:
        address = loader.address(name)
        known = loader.ahead.take(address.subject)
        assert bool(known.commits) == (address.partition not in (lost, never))


async def test_partitions_that_come_later_are_read_with_those_that_were_there(loader: Loader) -> None:
    names = [f"n{number}" for number in range(8)]
    for name in names:
        await loader.fill(name, 2)
    await loader.read_ahead(frozenset({0, 1}), frozenset({2, 3}))
    assert all(loader.ahead.take(loader.address(name).subject).commits for name in names)


async def test_two_workers_read_the_snapshots_at_the_same_time(
    loader: Loader, connection: NatsConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loader.fill("n", 12, snapshot_at=12)
    await stored(loader, 1)
    store = loader.keeper.store
    assert store is not None
    other = SnapshotStore(connection, loader.log.stream, loader.log.subjects)
    monkeypatch.setattr("kernel.log.reader._numbers", itertools.repeat(1))  # other processes count from 1 as well
    readers = [await one.read_latest(10) for one in (store, other)]
    first, second = (reader for reader in readers if reader is not None)
    assert len((await first.next(10, 5.0)).commits) == len((await second.next(10, 5.0)).commits) == 1
    for reader in (first, second):
        await reader.close()


async def test_no_consumer_outlives_the_end(
    loader: Loader, connection: NatsConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loader.fill("n", 12, snapshot_at=12)
    await stored(loader, 1)
    creating = asyncio.Event()
    call = loader.log._call

    async def report(subject: str, body: object) -> dict[str, Any]:
        if subject.startswith("CONSUMER.CREATE"):
            creating.set()
        return await call(subject, body)

    monkeypatch.setattr(loader.log, "_call", report)
    loader.ahead.begin(ALL)
    await creating.wait()
    loader.ahead.begin(ALL)  # which ends the first
    creating.clear()
    await creating.wait()
    await loader.ahead.stop()
    for stream in (loader.log.stream, f"{loader.log.stream}-snapshots"):
        answer = await call_api(connection, f"CONSUMER.NAMES.{stream}", {"offset": 0})
        assert answer["consumers"] in (None, [])


async def test_more_than_fits_is_not_kept(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 1_000)
    cell = await loader.fill("n", 20)
    await loader.read_ahead()
    assert loader.ahead.take(loader.address("n").subject) == read_ahead.NOTHING
    assert same(await loader.load("n"), cell)


async def test_a_snapshot_for_which_there_was_no_time_is_taken_later(loader: Loader) -> None:
    cell, gone_on = await loader.fill("n", 12), await loader.fill("m", 12)
    failed = await loader.fill("o", 12)
    loader.keeper._next = asyncio.get_running_loop().time() + 1e6  # no time at all
    for late in (cell, gone_on, failed):
        loader.keeper.offer(loader.address(late.state.id), late, b"last commit")
    gone_on.evolve(gone_on.decide(Note("more"), Context(uuid7())))
    failed.due = 2**63
    loader.keeper._next = 0.0
    loader.keeper._take_late()
    await stored(loader, 1)
    while loader.keeper._late:
        await asyncio.sleep(0.01)
    store = loader.keeper.store
    assert store is not None
    names = {subject.rsplit(".", 1)[-1] for subject in await store.subjects()}
    assert names == {"n"}


async def test_snapshots_that_wait_for_their_time_are_taken_one_after_the_other(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [await loader.fill(f"n{number}", 11) for number in range(12)]
    loop, timers = asyncio.get_running_loop(), 0
    call_later = loop.call_later

    def count(*arguments: Any) -> asyncio.TimerHandle:
        nonlocal timers
        timers += arguments[1] == loader.keeper._take_late
        return call_later(*arguments)

    monkeypatch.setattr(loop, "call_later", count)
    for cell in cells:
        cell.due = 0
        loader.keeper.offer(loader.address(cell.state.id), cell, b"last commit")
    loader.keeper._next += 0.02  # another one takes the place of the first that waits
    await stored(loader, len(cells))
    assert timers <= len(cells) + 1


async def test_no_snapshot_is_taken_after_the_end(loader: Loader) -> None:
    cell = await loader.fill("n", 12)
    loader.keeper._next = time.perf_counter() + 0.01
    loader.keeper.offer(loader.address("n"), cell, b"last commit")
    timer = loader.keeper._timer
    assert timer is not None
    loader.keeper.forget()
    assert timer.cancelled()
