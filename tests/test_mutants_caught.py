"""Promises that no other test guards: `python -m tests.mutants` breaks them one by one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from aggregates.commit import Decision
from examples.bank import Account, Deposit, Deposited, Withdraw
from kernel import App, Client, Service
from kernel.errors import Conflict, Unavailable
from kernel.log import find_log
from kernel.log.base import Stored
from kernel.partitions.leases import Leases, Members
from kernel.projector.rebuild import Rebuild
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from projections.checkpoints import reached
from projections.database import open_database
from projections.unit_of_work import Write, Writer
from tests.apps import Note, Notebook, Noted, Page, notebooks
from tests.conftest import ReadSide, envelopes, open_log, settings_for
from tests.histories import encode


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="caught")
    yield connected
    await connected.close()


@asynccontextmanager
async def running(app: App, nats: str, tmp_path: Path) -> AsyncIterator[tuple[Service, Client]]:
    service = Service(app, settings_for(tmp_path, nats=nats))
    await service.start()
    try:
        async with await Client.connect(app, nats=nats, database=service.database_url) as client:
            yield service, client
    finally:
        await service.stop()


# commands


async def test_a_command_is_answered_when_its_append_is_acknowledged_and_not_before(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(notebooks(app_name), nats_url, tmp_path) as (service, client):
        log = service.parts.log
        held: asyncio.Future[asyncio.Future[int]] = asyncio.get_running_loop().create_future()
        append = log.append

        def hold(subject: str, expected: int, payload: bytes, links: bytes) -> asyncio.Future[int]:
            if b'"held"' not in payload or held.done():
                return append(subject, expected, payload, links)
            held.set_result(asyncio.get_running_loop().create_future())
            return held.result()

        monkeypatch.setattr(log, "append", hold)
        command = asyncio.create_task(client.execute(Notebook, "n", Note("held")))
        acknowledgement = await held
        for n in range(5):  # an answer to the held command would have come before each of these answers
            await client.execute(Notebook, f"other-{n}", Note("passes"))
        assert not command.done(), "there is nothing in the log yet"
        acknowledgement.set_exception(Unavailable("the log is full"))
        receipt = await command  # the client sends it again
        (stored,) = await client.log.read_subject(client.log.subjects.address("Notebook", "n").subject)
        assert (receipt.version, receipt.sequence) == (1, stored.sequence)


@pytest.mark.parametrize("taken", ["ours", "theirs"])
async def test_a_conflict_of_an_append_that_was_sent_twice_is_looked_into(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """The append is still on its way when the read-back finds nothing, and arrives before it is sent again."""
    log, beside = await open_log(connection, app_name, partitions=4), await find_log(connection, app_name)
    subject = log.subjects.address("Notebook", "n").subject
    sent, arrived = asyncio.Event(), False
    with monkeypatch.context() as lost:
        lost.setattr(connection, "send", lambda _frames: sent.set())
        future = log.append(subject, 0, b"ours")
        await sent.wait()
    find_last = log.appender._settler._last

    async def late(of: str) -> Stored | None:
        nonlocal arrived
        if arrived:
            return await find_last(of)
        arrived = True
        await beside.append(subject, 0, taken.encode())
        return None  # the state of the subject a moment before

    monkeypatch.setattr(log.appender._settler, "_last", late)
    log.appender._lost_connection()
    if taken == "ours":
        sequence = await future
        assert await beside.read_subject(subject) == [Stored(sequence, subject, b"ours")]
    else:
        with pytest.raises(Conflict) as conflict:
            await future
        assert conflict.value.uncertain
    await beside.close()
    await log.close()


# leases


@pytest.fixture
async def leases(connection: NatsConnection, app_name: str) -> AsyncIterator[Leases]:
    made = Leases(connection, app_name, "a", 4, ttl=5.0)
    await made.start()
    await made.join()
    yield made
    await made.close()


async def test_the_deadline_of_a_lease_just_taken_counts_from_before_the_request(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, put = 1_000.0, leases._put

    async def slow(key: str, expected: int) -> int:
        nonlocal now
        revision = await put(key, expected)
        now += 3.0  # the answer is late: the bucket has counted from the request
        return revision

    monkeypatch.setattr("kernel.partitions.leases.clock", lambda: now)
    monkeypatch.setattr(leases, "_put", slow)
    asked = now
    assert len(await leases.acquire(Members(("a",), frozenset()))) == 4
    assert all(lease.deadline <= asked + leases.ttl for lease in leases._held.values())


# hand-overs


async def test_what_was_known_of_a_partition_is_forgotten_when_it_is_lost(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    """No conflict reveals the stale state, because it refuses a command that the present state accepts."""
    app = App(app_name, aggregates=[Account], projections=[])
    async with running(app, nats_url, tmp_path) as (service, client):
        first = await client.execute(Account, "alice", Deposit(500))
        address = client.log.subjects.address("Account", "alice")
        ownership = service.parts.ownership
        await ownership._lose([address.partition])
        theirs = encode(
            f"/{app_name}/Account",
            "alice",
            {Deposited: ("Deposited", 1)},
            [Decision("theirs", [Deposited(300)])],
            first.version,
            "2013-01-01T00:00:00Z",
        )
        await client.log.append(address.subject, first.sequence, theirs)
        await ownership._assign([address.partition])
        assert (await client.execute(Account, "alice", Withdraw(700))).version == 3


async def test_a_lease_is_given_back_when_the_projection_has_let_go_and_not_before(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Writer.commit
    writing, go_on = threading.Event(), threading.Event()

    def later(self: Writer, write: Write) -> None:
        writing.set()
        assert go_on.wait(20)
        commit(self, write)

    async with running(notebooks(app_name), nats_url, tmp_path) as (service, client):
        leases = service.parts.leases
        monkeypatch.setattr(Writer, "commit", later)
        receipt = await client.execute(Notebook, "n", Note("one"))
        assert await asyncio.to_thread(writing.wait, 20)
        giving = asyncio.create_task(service.parts.ownership._revoke(frozenset({receipt.partition})))
        try:
            for _ in range(5):
                assert receipt.partition in (await leases.members()).held
            assert not giving.done()
        finally:
            go_on.set()
        await giving
        assert receipt.partition not in (await leases.members()).held
        with service.parts.engine.connect() as connection:
            assert min(reached(connection, receipt.partition).values()) == receipt.sequence


async def test_a_lease_is_given_back_when_its_commands_are_answered_and_not_before(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(notebooks(app_name), nats_url, tmp_path) as (service, client):
        address, leases, log = client.log.subjects.address("Notebook", "n"), service.parts.leases, service.parts.log
        append, appending = log.append, asyncio.Event()
        go_on: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def later(subject: str, expected: int, payload: bytes, links: bytes) -> asyncio.Future[int]:
            async def wait() -> int:
                await go_on
                return await append(subject, expected, payload, links)

            appending.set()
            return asyncio.ensure_future(wait())

        monkeypatch.setattr(log, "append", later)
        command = asyncio.create_task(client.execute(Notebook, "n", Note("one")))
        await appending.wait()
        giving = asyncio.create_task(service.parts.ownership._revoke(frozenset({address.partition})))
        try:
            for _ in range(5):
                assert address.partition in (await leases.members()).held
            assert not giving.done()
        finally:
            go_on.set_result(None)
        await giving
        assert (await command).version == 1
        assert address.partition not in (await leases.members()).held


# copies of what was folded


async def test_a_projection_that_is_behind_the_others_is_folded_alone(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    """This happens after the cut-over of one projection, which may be ahead of the others."""
    app = notebooks(app_name)
    async with running(app, nats_url, tmp_path) as (service, client):
        receipts = [await client.execute(Notebook, "n", Note("word")) for _ in range(5)]
        await client.query("select 1", after=receipts)
        database = service.database_url
    engine = open_database(database)
    with engine.begin() as connection:
        connection.execute(text("UPDATE eskernel_checkpoint SET sequence = 0 WHERE projection = 'Words'"))
        connection.execute(text("DELETE FROM words__1"))
    engine.dispose()
    async with running(app, nats_url, tmp_path) as (_service, client):
        receipts.append(await client.execute(Notebook, "n", Note("word")))
        assert await client.query("select times from words", after=receipts, projections=["Words"]) == [{"times": 6}]
        assert await client.query("select notes from pages", after=receipts) == [{"notes": 6}]
        assert await client.query("select count(*) as n from lines") == [{"n": 6}]
        assert await client.query("select * from eskernel_dead_letter") == []


async def test_at_a_cut_over_the_new_copy_has_what_the_old_one_had(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(notebooks(app_name), nats_url, tmp_path) as (service, client):
        await client.query("select 1", after=[await client.execute(Notebook, "n", Note("before"))])
        projector, cut_over = service.parts.projector, Rebuild._cut_over

        async def late(rebuild: Rebuild, *given: Any) -> None:
            # the live copy goes on meanwhile, and then stops, so that nothing repairs what the new copy lacks
            await client.query("select 1", after=[await client.execute(Notebook, "n", Note("meanwhile"))])
            projector.assign(frozenset())
            await projector.released()
            await cut_over(rebuild, *given)

        monkeypatch.setattr(Rebuild, "_cut_over", late)
        await Rebuild(service.app, client.log, service.parts.engine, service.app.projections).run()
        assert await client.query("select notes, last from pages") == [{"notes": 2, "last": "meanwhile"}]
        assert await client.query("select count(*) as n from lines") == [{"n": 2}]


# the database


def test_a_disk_that_was_full_is_not_blamed_on_an_aggregate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    side = ReadSide(engine, notebooks("books"))
    batch = [(1, "Notebook", "n", envelopes(Notebook, [Noted("word", 1)]))]
    write = side.freeze(batch, side.fold(batch))
    driver: Any = engine.dialect.loaded_dbapi
    if engine.dialect.name == "postgresql":
        full = driver.errors.DiskFull("no space left on device")
    else:
        full = driver.OperationalError("database or disk is full")
        full.sqlite_errorcode = 13

    def insert(*_: object) -> None:
        monkeypatch.undo()  # from now on there is room
        raise DBAPIError.instance("INSERT", None, full, driver.Error, dialect=engine.dialect)

    monkeypatch.setattr(side.writer, "insert", insert)
    with pytest.raises(DBAPIError, match="full|no space left"):
        side.writer.commit(write)
    assert side.writer.commit(write) == []
    assert [(page.notebook, page.notes) for page in side.rows(Page)] == [("n", 1)]


def test_a_database_that_takes_no_writes_is_not_blamed_on_an_aggregate(engine: Engine) -> None:
    side = ReadSide(engine, notebooks("books"))
    batch = [(1, "Notebook", "n", envelopes(Notebook, [Noted("word", 1)]))]
    write = side.freeze(batch, side.fold(batch))
    side.writer.engine = open_database(engine.url.render_as_string(hide_password=False), read_only=True)
    with pytest.raises(DBAPIError, match=r"read-?only|not authorized"):
        side.writer.commit(write)
    side.writer.engine.dispose()
    side.writer.engine = engine
    side.writer.commit(write)
    assert [(page.notebook, page.notes) for page in side.rows(Page)] == [("n", 1)]
