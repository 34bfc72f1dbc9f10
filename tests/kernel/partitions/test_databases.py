"""One database for one log: workers with another database are refused, and a move to a new one works."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

import migrations
from examples.bank import Account, Deposit
from kernel import App, Client, Service
from kernel.errors import DatabaseMismatch
from kernel.partitions.bucket import bucket_of
from kernel.partitions.databases import check_database, differ, find_users
from kernel.partitions.leases import Leases
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from projections.database import open_database
from projections.identity import identify, read_identity
from tests.apps import bank
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]
ONE, TWO = {"name": "one", "id": "1"}, {"name": "two", "id": "2"}


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="databases")
    yield connected
    await connected.close()


@asynccontextmanager
async def worker(
    connection: NatsConnection, app: str, name: str, database: dict[str, str] | None, ttl: float = 1.2, **options: Any
) -> AsyncIterator[Leases]:
    leases = Leases(connection, app, name, 8, ttl=ttl, **options)
    await leases.start()
    leases.database = database
    try:
        await leases.join()
        yield leases
    finally:
        await leases.close()


@asynccontextmanager
async def renewing(leases: Leases) -> AsyncIterator[None]:
    async def renew() -> None:
        while True:
            await leases.renew()
            await asyncio.sleep(leases.ttl / 3)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# the identity of a database


def test_a_database_keeps_its_identity(database_url: str) -> None:
    first = open_database(database_url)
    assert read_identity(first)["id"] == ""
    migrations.upgrade(first)
    assert read_identity(first)["id"] == ""
    made = identify(first)
    assert made["id"]
    assert identify(first) == made == read_identity(first)
    first.dispose()
    second = open_database(database_url)
    assert read_identity(second) == made
    second.dispose()


def test_a_copy_of_a_database_is_another_one(database_url: str, tmp_path: Path, postgres_url: str) -> None:
    engine = open_database(database_url)
    migrations.upgrade(engine)
    ours = identify(engine)
    engine.dispose()
    if engine.dialect.name == "sqlite":
        (tmp_path / "copy").mkdir()
        shutil.copyfile(tmp_path / "projections.db", tmp_path / "copy" / "projections.db")
        copied = f"sqlite:///{tmp_path / 'copy' / 'projections.db'}"
    else:
        name = make_url(database_url).database
        copied = make_url(database_url).set(database=f"{name}c").render_as_string(hide_password=False)
        admin = open_database(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}c TEMPLATE {name}"))
    copy = open_database(copied)
    theirs = identify(copy)
    copy.dispose()
    assert theirs["id"] == ours["id"]
    assert differ(ours, theirs)
    if engine.dialect.name == "postgresql":
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}c WITH (FORCE)"))
        admin.dispose()


def test_two_schemas_of_a_database_are_two(fresh_postgres: str) -> None:
    engine = open_database(fresh_postgres)
    migrations.upgrade(engine)
    ours = identify(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA mine"))
        connection.execute(text("CREATE TABLE mine.eskernel_database AS SELECT * FROM eskernel_database"))
    engine.dispose()
    url = make_url(fresh_postgres).update_query_dict({"options": "-c search_path=mine"})
    other = open_database(url.render_as_string(hide_password=False))
    theirs = identify(other)
    other.dispose()
    assert differ(ours, theirs)
    assert theirs["name"].endswith(", schema mine")


def test_what_is_not_known_of_one_database_says_nothing() -> None:
    assert not differ({"name": "a", "id": "1"}, {"name": "b", "id": "1", "system": "7"})
    assert differ({"name": "a", "id": "1", "system": "8"}, {"name": "a", "id": "1", "system": "7"})


# workers


async def test_a_worker_with_another_database_is_refused_while_one_lives(
    connection: NatsConnection, app_name: str
) -> None:
    async with worker(connection, app_name, "a", ONE) as a, renewing(a):
        async with asyncio.timeout(5):
            with pytest.raises(DatabaseMismatch) as refused:
                await check_database(connection, bucket_of(app_name), TWO, wait=0.2)
        for part in ("the worker a", "the database one", "was given two", "stop all workers first"):
            assert part in str(refused.value)
        await check_database(connection, bucket_of(app_name), dict(ONE, name="another name"), wait=0.2)
        assert [user.worker for user in await find_users(connection, bucket_of(app_name))] == ["a"]
    await check_database(connection, bucket_of(app_name), TWO)


async def test_a_dead_worker_refuses_nobody(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a", ONE):
        # it renews nothing, as if it had been killed
        async with asyncio.timeout(5):
            await check_database(connection, bucket_of(app_name), TWO, wait=0.2)


async def test_a_worker_of_an_older_program_and_the_keys_of_others_say_nothing(
    connection: NatsConnection, app_name: str
) -> None:
    async with worker(connection, app_name, "old", None) as old, renewing(old):
        await connection.publish(f"$KV.{app_name}-leases.w.strange", b"not ours")
        await connection.publish(f"$KV.{app_name}-leases.w.list", b"[1]")
        await connection.publish(f"$KV.{app_name}-leases.w.text", b'{"database": "x"}')
        await connection.flush()
        await check_database(connection, bucket_of(app_name), TWO, wait=0.2)


async def test_of_two_that_join_at_once_with_two_databases_not_both_stay(
    connection: NatsConnection, app_name: str
) -> None:
    async def join(name: str, database: dict[str, str]) -> bool:
        try:
            async with worker(connection, app_name, name, database):
                await asyncio.sleep(0.3)
        except DatabaseMismatch:
            return False
        return True

    assert not all(await asyncio.gather(join("a", ONE), join("b", TWO)))


async def test_a_worker_that_thaws_after_the_others_have_moved_stops(
    connection: NatsConnection, app_name: str, wait_until: Wait
) -> None:
    reasons: list[str] = []
    async with worker(connection, app_name, "a", ONE, on_mismatch=reasons.append) as a:
        await check_database(connection, bucket_of(app_name), TWO, wait=0.2)
        async with worker(connection, app_name, "b", TWO) as b, renewing(b), renewing(a):
            await wait_until(lambda: reasons)
    assert "the worker b of this app projects into the database two" in reasons[0]


# services


async def start(app: App, data: Path, nats: str, database: str | None = None) -> Service:
    service = Service(app, settings_for(data, nats=nats, database=database, lease=1.5))
    await service.start()
    return service


async def test_a_second_service_with_another_database_is_refused_and_the_first_goes_on(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = bank(app_name)
    first = await start(app, tmp_path / "one", nats_url, database_url)
    with pytest.raises(DatabaseMismatch, match="two/.*projections.db on .*stop all workers first"):
        await start(app, tmp_path / "two", nats_url)
    other = open_database(f"sqlite:///{tmp_path / 'two' / app_name / 'projections.db'}")
    with other.connect() as connection:
        assert connection.scalar(text("select count(*) from sqlite_master")) == 0, "nothing is made in it"
    other.dispose()
    second = await start(app, tmp_path / "three", nats_url, database_url)
    async with await Client.connect(app, nats=nats_url, database=database_url) as client:
        receipts = await asyncio.gather(*(client.execute(Account, f"a{n}", Deposit(1)) for n in range(40)))
        assert await client.query("select count(*) as n from balances", after=receipts) == [{"n": 40}]
    await second.stop()
    await first.stop()


async def test_after_a_stop_another_database_is_taken_and_filled(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = bank(app_name)
    first = await start(app, tmp_path / "one", nats_url)
    async with await Client.connect(app, nats=nats_url) as client:
        for number in range(5):
            await client.execute(Account, f"a{number}", Deposit(1))
    await first.stop()
    for url in (database_url, f"sqlite:///{tmp_path / 'third.db'}", database_url):
        service = await start(app, tmp_path / "two", nats_url, url)
        async with await Client.connect(app, nats=nats_url, database=url) as client:
            receipt = await client.execute(Account, "a0", Deposit(1))
            assert await client.query("select count(*) as n from balances", after=receipt) == [{"n": 5}]
        await service.stop()


async def test_an_app_without_projections_may_have_any_databases(nats_url: str, app_name: str, tmp_path: Path) -> None:
    app = App(app_name, aggregates=[Account])
    first = await start(app, tmp_path / "one", nats_url)
    second = await start(app, tmp_path / "two", nats_url)
    await second.stop()
    await first.stop()
