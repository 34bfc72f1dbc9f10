"""An outage of the database or the server loses nothing and parks no aggregate."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, func, select, text
from sqlalchemy.engine import make_url

from kernel import Client, Service
from kernel.runtime.nats_server import EmbeddedServer
from projections.database import open_database
from projections.tables import dead_letter
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for
from tests.kernel.runtime.test_embedded_server import servers_on

Wait = Callable[..., Coroutine[Any, Any, Any]]


async def test_a_database_that_refuses_connections_is_waited_for(
    nats_url: str, postgres_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, database=fresh_postgres))
    await service.start()
    name = make_url(fresh_postgres).database
    admin = create_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    async with await Client.connect(service.app, nats=nats_url, database=fresh_postgres) as client:
        first = await asyncio.gather(*(client.execute(Notebook, f"n{n % 9}", Note("a")) for n in range(90)))
        await client.query("select 1", after=first)
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
        # commands need no database: they continue
        second = await asyncio.gather(*(client.execute(Notebook, f"n{n % 9}", Note("b")) for n in range(90)))
        await wait_until(lambda: service.parts.projector.state == "waiting for the database")
        await service.parts.probes.probe()
        assert not service.health.ready
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        rows = await client.query("select sum(notes) as n from pages", after=second, timeout=30)
        assert rows[0]["n"] == 180
        assert (await client.query("select count(*) as n from lines"))[0]["n"] == 180
        assert (await client.query("select sum(times) as n from words"))[0]["n"] == 180
    await service.stop()
    admin.dispose()
    engine = open_database(fresh_postgres)
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(dead_letter)) == 0
    engine.dispose()


async def test_a_killed_server_that_comes_back_loses_nothing(database_url: str, app_name: str, tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    url = await server.start()
    service = Service(notebooks(app_name), settings_for(tmp_path / "data", nats=url, database=database_url))
    await service.start()
    stop = asyncio.Event()
    sent = [0] * 20
    async with await Client.connect(service.app, nats=url, database=database_url) as client:

        async def lane(number: int) -> None:
            while not stop.is_set():
                receipt = await client.execute(
                    Notebook, f"n{number}", Note("word"), command_id=f"{number}-{sent[number]}", timeout=60
                )
                sent[number] += 1
                assert receipt.version == sent[number]

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(lane(number))
            for _ in range(3):
                wanted = sum(sent) + 200
                while sum(sent) < wanted:
                    await asyncio.sleep(0.001)
                os.kill(server.pid, signal.SIGKILL)
                while server.pid:
                    await asyncio.sleep(0.001)
                assert await server.start() == url
            wanted = sum(sent) + 200
            while sum(sent) < wanted:
                await asyncio.sleep(0.001)
            stop.set()
        last = [await client.execute(Notebook, f"n{n}", Note("word")) for n in range(20)]
        pages = await client.query("select * from pages", after=last, timeout=30)
        assert {page["notebook"]: page["notes"] for page in pages} == {
            f"n{n}": count + 1 for n, count in enumerate(sent)
        }
        assert (await client.query("select times from words"))[0]["times"] == sum(sent) + 20
    await service.stop()
    await server.stop()


async def test_the_embedded_server_is_started_again_when_it_dies(app_name: str, tmp_path: Path) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path))
    await service.start()
    async with await Client.connect(service.app, data=tmp_path) as client:
        await client.execute(Notebook, "n", Note("a"))
        (pid,) = servers_on(service.directory.path / "nats")
        os.kill(pid, signal.SIGKILL)
        receipt = await client.execute(Notebook, "n", Note("b"), timeout=60)
        assert receipt.version == 2
        assert await client.query("select notes from pages", after=receipt, timeout=30) == [{"notes": 2}]
    await service.stop()
    assert servers_on(service.directory.path / "nats") == []
