"""The rows about several workers: a backlog for one and for two, and the time until a killed worker is replaced."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from functools import partial
from pathlib import Path
from statistics import median

from sqlalchemy import text

import migrations
from benchmarks import backlog, places, poisoned
from benchmarks.places import Postgres
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded
from examples.bank import Account, Deposit
from examples.bank import app as bank
from examples.flights import app as flights
from kernel import Client, Settings
from kernel.app import App
from kernel.log import JetStreamLog, StreamInfo, open_log
from kernel.partitions.leases import Leases
from kernel.settings.sources import settings_of
from kernel.transport.dial import connect
from kernel.workers.supervisor import Supervisor
from projections import generations
from projections.database import open_database, reads
from projections.origin import register

KILLS = 5
AIM_S = 5.0


async def measure(path: Path, pg: Postgres, months: int) -> list[Row]:
    """Measure projecting by one worker and by two, and the time until a killed worker's partitions move again."""
    return [
        await _backlog(path / "backlog", pg, months),
        await _shared_keys(path / "keys", pg),
        await _killed(path / "killed"),
    ]


async def _backlog(path: Path, pg: Postgres, months: int) -> Row:
    async with places.nats(path / "nats") as url:
        connection = await connect(url, name="bench")
        never = settings_of({"jetstream.group_commit": "never"})
        log = await open_log(connection, flights.name, never)
        try:
            count = await backlog.fill(flights, log, backlog.flight_commands(months))
            info = await log.info()
            numbers = itertools.count()

            async def by(workers: int) -> float:
                database = pg.database(f"sharing{next(numbers)}", relaxed=True)
                settings = settings_of(
                    {
                        "data": path / f"data{next(numbers)}",
                        "connection.servers": url,
                        "database.url": database,
                        "workers": workers,
                        "logging.level": "error",
                    }
                )
                return count / await _project(flights, "examples.flights:app", settings, log, info)

            figures = await in_turns("workers", {"one": lambda: by(1), "two": lambda: by(2)})
        finally:
            await log.close()
            await connection.close()
    return Row(
        f"live projection from a backlog by 2 worker processes on PostgreSQL: {count:,} events",
        "events/s",
        median(figures["two"]),
        limit=median(figures["one"]),
        aim="(none: what 2 cores allow)",
        limit_is="1 worker process; nats-server, PostgreSQL and the workers share the machine's cores, which bounds it",
        durability="process crash; after a power cut the rest is folded again (synchronous_commit=off)",
        extra={"rounds": rounded(figures)},
    )


async def _shared_keys(path: Path, pg: Postgres) -> Row:
    """Project a backlog whose aggregates all add to the same hundred tallies, by more and more workers."""
    async with places.nats(path / "nats") as url:
        connection = await connect(url, name="bench")
        log = await open_log(connection, poisoned.app.name, settings_of({}))
        try:
            await poisoned.fill(log)
            info = await log.info()
            numbers = itertools.count()
            deadlocks: dict[int, int] = {}

            async def by(workers: int) -> float:
                name = f"keys{next(numbers)}"
                settings = settings_of(
                    {
                        "data": path / name,
                        "connection.servers": url,
                        "database.url": pg.database(name, relaxed=True),
                        "workers": workers,
                        "logging.level": "error",
                    }
                )
                took = await _project(poisoned.app, "benchmarks.poisoned:app", settings, log, info)
                deadlocks[workers] = deadlocks.get(workers, 0) + pg.deadlocks(name)
                return info.commits / took

            figures = await in_turns(
                "shared keys", {f"{workers} workers": partial(by, workers) for workers in (1, 2, 4, 8)}
            )
        finally:
            await log.close()
            await connection.close()
    found = medians(figures)
    return Row(
        f"live projection by 8 worker processes that add to the same tallies on PostgreSQL: {info.commits:,} events",
        "events/s",
        found["8 workers"],
        limit=found["1 workers"],
        aim="no deadlock",
        met=not any(deadlocks.values()),
        limit_is="1 worker process; nats-server, PostgreSQL and the workers share the machine's cores",
        durability="process crash; after a power cut the rest is folded again (synchronous_commit=off)",
        extra={"rounds": rounded(figures), "deadlocks": {str(workers): found for workers, found in deadlocks.items()}},
    )


async def _project(app: App, spec: str, settings: Settings, log: JetStreamLog, info: StreamInfo) -> float:
    """Return the seconds from the release of all workers until everything is projected."""
    assert settings.database.url is not None
    engine = open_database(settings.database.url)
    migrations.upgrade(engine)
    register(engine, app.name, info.created, info.partitions, info.last)
    with engine.begin() as connection:
        for declared in app.projections:
            # live though empty: a service would build an empty projection by replay
            generations.show(connection, generations.create(connection, declared, range(info.partitions)))
    leases = Leases(log._connection, app.name, "bench", info.partitions, ttl=settings.lease)
    await leases.start()
    supervisor = Supervisor(app.name, spec, settings)
    try:
        async with leases.alone("start"):
            # all workers have loaded the app and wait for the lease under which one of them migrates the tables
            starting = asyncio.create_task(supervisor.start())
            while not all(worker.heartbeat for worker in supervisor.workers):
                assert not starting.done()
                await asyncio.sleep(0.01)
            await asyncio.sleep(2.0)  # they connect meanwhile
        begin = time.perf_counter()
        query = text("SELECT count(*) FROM eskernel_checkpoint WHERE sequence < :last")
        while True:
            with reads(engine).connect() as connection:
                if not connection.scalar(query, {"last": info.last}):
                    break
            await asyncio.sleep(0.01)
        took = time.perf_counter() - begin
        await starting
        return took
    finally:
        await supervisor.stop()
        await leases.close()
        engine.dispose()


async def _killed(path: Path) -> Row:
    """Kill a worker, and wait for an answer from one of its partitions."""
    settings = settings_of({"data": path, "workers": 2, "logging.level": "error"})
    supervisor = Supervisor(bank.name, "examples.bank:app", settings)
    await supervisor.start()
    took: list[float] = []
    try:
        async with await Client.connect(
            bank, nats=supervisor.nats_url, database=supervisor.database_url, data=path
        ) as client:
            for number in range(KILLS):
                await _settled(supervisor)
                victim = supervisor.workers[number % 2]
                owned = set(victim.heartbeat["partitions"])
                name = next(
                    name
                    for name in map(str, itertools.count())
                    if client.log.subjects.partition("Account", name) in owned
                )
                await client.execute(Account, name, Deposit(1))
                assert victim.process is not None
                os.kill(victim.process.pid, signal.SIGKILL)
                begin = time.perf_counter()
                await client.execute(Account, name, Deposit(1), timeout=60)
                took.append(time.perf_counter() - begin)
    finally:
        await supervisor.stop()
    return Row(
        f"a killed worker's partitions answer again: median of {KILLS} kills, leases of {settings.lease:g} s",
        "ms",
        median(took) * 1e3,
        aim=f"< {AIM_S:g} s",
        met=median(took) < AIM_S,
        durability="SIGKILL of one of two workers",
        extra={"longest_ms": max(took) * 1e3, "shortest_ms": min(took) * 1e3},
    )


async def _settled(supervisor: Supervisor) -> None:
    """Wait until the workers report to their parent that the partitions are shared evenly."""
    while True:
        shares = [worker.heartbeat.get("partitions", []) for worker in supervisor.workers]
        if sorted(map(len, shares)) == [32, 32] and not set(shares[0]) & set(shares[1]):
            return
        await asyncio.sleep(0.05)
