"""One run: start everything, load and faults, heal, stop, check."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.clients import Load
from tests.faults.ending import CheckedRun, Result
from tests.faults.faults import Faults
from tests.faults.places import NatsServer, Postgres, Service, Sqlite, free_port
from tests.faults.proxy import Proxy
from tests.faults.schedule import Fault


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        workers: 0 starts the service without `--workers`: its process is the worker.
        postgres: URL of a PostgreSQL server; SQLite without it.
        snapshots: events of an aggregate after which a snapshot is taken.
        pausing: let projections pause at a bad deploy; otherwise its aggregates are parked.
        consumers: wait until consumers of killed workers are gone, too.
        keep: keep the directory even if every promise holds.
    """

    workers: int = 2
    postgres: str = ""
    snapshots: int = 100
    pausing: bool = False
    consumers: bool = False
    keep: bool = False


class Run(CheckedRun):
    """A run of one schedule in a directory of its own."""

    def __init__(self, seed: int, schedule: list[Fault], options: Options, report: Callable[[str], None]) -> None:
        app = f"f{seed}-{os.getpid()}-{int(time.time() * 1000) % 10_000_000}"
        result = Result(seed, "postgresql" if options.postgres else "sqlite", options.workers)
        super().__init__(app, f"eskernel-faults-{seed}-", result, report)
        self.schedule = schedule
        self.in_use, self.consumers, self.keep = bool(options.workers), options.consumers, options.keep
        self.server = NatsServer(self.directory / "nats")
        self.url = self.server.url
        self.proxy = Proxy(free_port(), self.server.port)
        database = self.database = (
            Postgres(options.postgres, self.app.replace("-", "_")) if options.postgres else Sqlite(self.directory)
        )
        more = ["--set", f"snapshots.every={options.snapshots}"]
        if options.pausing:
            more += ["--set", "dead_letters.pause_above=0.02", "--set", "dead_letters.pause_minimum=4"]
        service = self.service = Service(self.app, self.proxy.url, database.url, self.directory, options.workers, more)
        self.services = [service]
        self.load: Load = Load(self.app, self.url, self.proxy.url, seed)
        self.faults: Faults = Faults(service, self.server, self.proxy, database, self.load, report)

    async def _run(self) -> None:
        await self.server.start()
        await self.proxy.start()
        self.service.start()
        await self.load.start()
        await self.faults.settle("the start")
        await self.faults.run(self.schedule)
        self.report("healing")
        await self.proxy.heal()
        await self.faults.settle("everything was healed")
        await self.load.stop()
        await self._finish()

    async def _close(self) -> None:
        await self.faults.close()
        await self.load.close()
        await self.service.close()
        await self.proxy.stop()
        await self.server.kill()
        if self.database is not None:
            await asyncio.to_thread(self.database.drop)
