"""Many timers, whose owner is killed again and again while it fires them by a clock that was moved: each fires once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from sqlalchemy import Engine

from kernel import Client
from kernel.log import find_log
from kernel.reactions import timers
from kernel.transport.dial import connect
from tests.conftest import settings_for
from tests.kernel.reactions import firing_process
from tests.kernel.reactions.conftest import events_of
from tests.shops import Order, Place, shop

TIMERS = int(os.environ.get("TEST_TIMERS", "1500"))
KILLS = int(os.environ.get("TEST_KILLS", "3"))
HOUR = 3600.0
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.kernel.reactions.firing_process"])


class Running:
    """A process that runs the shop."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    async def kill(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join, 20)

    async def stop(self) -> None:
        if self._process.is_alive():
            self._pipe.send("stop")
            await asyncio.to_thread(self._process.join, 30)


async def start(nats: str, database: str, name: str, folder: Path, ahead: float) -> Running:
    ours, theirs = processes.Pipe()
    arguments = nats, database, name, str(folder), ahead, theirs
    process = processes.Process(target=firing_process.serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    assert await asyncio.to_thread(ours.recv) == "ready"
    return Running(process, ours)


def pending(engine: Engine) -> int:
    return timers.counts(engine, 0).get("Fulfilment", (0, 0, 0))[0]


@contextmanager
def seeded() -> Iterator[random.Random]:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    yield random.Random(seed)


@pytest.mark.timeout(1800)
async def test_many_timers_fire_once_each_however_often_their_owner_is_killed(
    nats_url: str, database_url: str, engine: Engine, app_name: str, tmp_path: Path
) -> None:
    app = shop(app_name, orders=False)
    running = await start(nats_url, database_url, app_name, tmp_path / "data", 0.0)
    async with await Client.connect(app, nats=nats_url) as client:
        at_once = asyncio.Semaphore(500)

        async def place(number: int) -> None:
            async with at_once:
                await client.execute(Order, f"o{number}", Place(expires=HOUR), timeout=60)

        await asyncio.gather(*(place(number) for number in range(TIMERS)))
        while await asyncio.to_thread(pending, engine) < TIMERS:
            await asyncio.sleep(0.05)
        await running.kill()
        with seeded() as chance:
            for goal in sorted((chance.randrange(1, TIMERS) for _ in range(KILLS)), reverse=True):
                running = await start(nats_url, database_url, app_name, tmp_path / "data", HOUR + 60)
                while await asyncio.to_thread(pending, engine) > goal:
                    await asyncio.sleep(chance.uniform(0, 0.02))
                await running.kill()
        running = await start(nats_url, database_url, app_name, tmp_path / "data", HOUR + 60)
        while await asyncio.to_thread(pending, engine):
            await asyncio.sleep(0.05)
        await running.stop()
    connection = await connect(nats_url, name="reading")
    log = await find_log(connection, app_name, settings_for(tmp_path), worker="reading")
    fired = Counter(order for _, order, event in await events_of(log) if event.type == "Expired")
    await log.close()
    await connection.close()
    assert len(fired) == TIMERS
    assert set(fired.values()) == {1}
