"""A new worker whose projections are not built yet: how soon it takes commands, and how soon readers see the tables."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import DEVNULL
from datetime import date
from pathlib import Path
from statistics import median

from benchmarks import backlog, places
from benchmarks.places import Postgres
from benchmarks.report import Row
from examples.flights import Aircraft, Cancel
from examples.flights import app as flights
from kernel import Client
from kernel.errors import CommandError, CommandTimeout
from kernel.log import open_log
from kernel.settings.sources import settings_of
from kernel.transport.dial import connect
from migrations import upgrade
from projections.database import open_database
from projections.standing import read_standing

AIM_S = 2.0
CANCELLED = Cancel("a flight that does not take place", "JFK", date(2014, 1, 1))


async def measure(path: Path, pg: Postgres, months: int) -> list[Row]:
    """Start a service with a build of these months' flights before it, on both databases."""
    rows = []
    async with places.nats(path / "nats") as url:
        connection = await connect(url, name="bench")
        log = await open_log(connection, flights.name, settings_of({"jetstream.group_commit": "never"}))
        count = await backlog.fill(flights, log, backlog.flight_commands(months))
        await log.close()
        await connection.close()
        imports = await _import()
        for name, database in (
            ("SQLite", f"sqlite:///{path / 'projections.db'}"),
            ("PostgreSQL", pg.database("deploying")),
        ):
            _migrate(database)
            taken, shown = await _start(url, database, path / name)
            rows.append(
                Row(
                    f"new worker on {name} with a build of {count:,} events before it: until a command was answered",
                    "ms",
                    1000 * taken,
                    aim=f"<= {AIM_S:g} s",
                    met=taken <= AIM_S,
                    extra={
                        "of_it_python_and_imports_ms": round(1000 * imports),
                        "built_verified_and_shown_s": round(shown, 1),
                    },
                )
            )
    return rows


async def _start(nats: str, database: str, data: Path) -> tuple[float, float]:
    """Return the seconds from a process's start until it answers a command, and until readers see the tables."""
    options = ["--nats", nats, "--database", database, "--data", str(data)]
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kernel.cli", "run", "examples.flights:app", *options, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        async with await Client.connect(flights, nats=nats) as client:
            await _command(client, f"new-{data.name}")
            taken = time.perf_counter() - started
        while not await asyncio.to_thread(_is_shown, database):  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.05)
        return taken, time.perf_counter() - started
    finally:
        process.terminate()
        await process.wait()


def _migrate(database: str) -> None:
    """Make the kernel's own tables, which the database of an app in use has."""
    engine = open_database(database)
    upgrade(engine)
    engine.dispose()


async def _import() -> float:
    """Return the seconds that a process takes to import what a service needs."""
    took = []
    for _ in range(3):
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import kernel.cli.run, kernel.service")
        await process.wait()
        took.append(time.perf_counter() - started)
    return median(took)


async def _command(client: Client, tail: str) -> None:
    """Send a command again and again until it is answered: the client itself waits longer and longer between tries."""
    while True:
        try:
            await client.execute(Aircraft, tail, CANCELLED, command_id="the same", timeout=0.1)
        except (CommandError, CommandTimeout):
            await asyncio.sleep(0.02)
        else:
            return


def _is_shown(database: str) -> bool:
    engine = open_database(database)
    try:
        with engine.connect() as connection:
            found = read_standing(connection)
    finally:
        engine.dispose()
    return len(found) == len(flights.projections) and all(
        any(made["state"] == "live" for made in generations) for generations in found.values()
    )
