"""The parent of several workers: starts them, starts them again, stops them, and speaks for them over HTTP."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from kernel.errors import WorkersFailed
from kernel.monitoring.http import HttpServer
from kernel.packages import environment
from kernel.runtime.directory import DataDirectory, running_as
from kernel.runtime.nats_server import SYNCED, EmbeddedServer, embedded_commits, end_with_parent
from kernel.settings import Settings
from kernel.settings.sources import changed
from kernel.workers.scrape import merge, scrape
from kernel.workers.worker import REFUSED, describe

logger = logging.getLogger("eskernel.workers")
FROZEN_S = 15.0
"""A worker whose loop has not turned for so long is killed: its partitions have moved on long before."""
START_S = 3600.0
"""But one that starts may be building tables."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 15.0
STEADY_S = 30.0
"""A worker that ran for so long starts again at once."""


@dataclass(slots=True)
class Worker:
    """One worker process, over its restarts.

    Attributes:
        told: its last heartbeat.
        heard: when that came.
        failed: what it said went wrong.
    """

    number: int
    process: asyncio.subprocess.Process | None = None
    told: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    failed: str = ""
    restarts: int = -1
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Runs an app in several worker processes.

    The parent holds the data directory and the embedded server, and nothing that a worker needs while it works: when
    it dies its workers die with it.
    """

    def __init__(self, app: str, spec: str, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.directory = DataDirectory(settings.data, app)
        self.workers = [Worker(number) for number in range(1, settings.workers + 1)]
        self.http = HttpServer(self, settings.http)
        self.nats_url = self.database_url = self.durability = ""
        self._spec = spec
        self._server: EmbeddedServer | None = None
        self.stopped = asyncio.Event()
        self.failure = ""
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start everything; when it returns, every worker is running.

        Raises:
            AlreadyRunning, ConnectionError, OSError, WorkersFailed: what stands in the way.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()  # workers that are there already drain as ever
            raise

    async def _start(self) -> None:
        self.directory.hold()
        settings = embedded_commits(self.settings)
        self.nats_url = await self._start_server() if settings.embedded else ",".join(settings.connection.servers)
        self.database_url = settings.database.url or f"sqlite:///{self.directory.path / 'projections.db'}"
        order = describe(
            self._spec,
            str(Path.cwd()),
            changed(
                settings,
                {
                    "connection.servers": self.nats_url,
                    "database.url": self.database_url,
                    "http.port": 0,
                    "http.host": "127.0.0.1",
                    "http.token": None,
                    "stream.sync": False,
                },
            ),
        )
        self._tasks += [asyncio.create_task(self._keep(worker, order)) for worker in self.workers]
        self._tasks.append(asyncio.create_task(self._watch()))
        for worker in self.workers:
            await worker.ready.wait()
            if worker.failed:
                raise WorkersFailed(worker.failed)
        self.durability = SYNCED if settings.stream.sync else self.workers[0].told.get("durability", "")
        await self.http.start()
        self.directory.describe(
            running_as(self.app, self._spec, self.settings, self.nats_url, self.database_url, self.http.url)
        )

    async def _start_server(self) -> str:
        self._server = EmbeddedServer(self.directory.path / "nats", sync=self.settings.stream.sync)
        url = await self._server.start()
        self._tasks.append(asyncio.create_task(self._server.keep()))
        return url

    async def _keep(self, worker: Worker, order: bytes) -> None:
        """Run one worker, again and again, until the stop."""
        pause = MIN_BACKOFF_S
        while not self._stopping:
            started = time.monotonic()
            code = await self._run(worker, order)
            if self._stopping:
                return
            if code == REFUSED and not worker.ready.is_set():
                worker.ready.set()  # it never worked: whoever starts us should know at once
                return
            steady = time.monotonic() - started > STEADY_S
            pause = MIN_BACKOFF_S if steady else min(pause * 2, MAX_BACKOFF_S)
            logger.error(
                "worker %d ended (%s)%s; starting it again in %.1f s",
                worker.number,
                f"signal {-code}" if code < 0 else f"exit code {code}",
                f": {worker.failed}" if worker.failed else "",
                pause,
            )
            await asyncio.sleep(pause)

    async def _run(self, worker: Worker, order: bytes) -> int:
        worker.restarts += 1
        worker.failed, worker.told = "", {}
        worker.heard = time.monotonic()
        process = worker.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # not from this folder: the user's own `kernel` may be here
            "-m",
            "kernel.workers.worker",
            str(worker.number),
            env=environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # even one that is stopped or stuck: it leaves nothing that the next start does not mend
            preexec_fn=end_with_parent(signal.SIGKILL),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order + b"\n")
        while line := await process.stdout.readline():
            try:
                told = orjson.loads(line)
            except orjson.JSONDecodeError:
                sys.stdout.buffer.write(line)  # the app itself prints something
                continue
            worker.heard = time.monotonic()
            if "failed" in told:
                worker.failed = told["failed"]
            else:
                worker.told = told
                if told.get("started"):
                    worker.ready.set()
        return await process.wait()

    async def _watch(self) -> None:
        """Kill workers that are frozen: nobody else would start them again."""
        while True:
            await asyncio.sleep(1.0)
            for worker in self.workers:
                patience = FROZEN_S if worker.told else START_S
                if worker.process is None or worker.process.returncode is not None:
                    continue
                if time.monotonic() - worker.heard > patience:
                    logger.error("worker %d has not answered for %.0f s; killing it", worker.number, patience)
                    worker.process.kill()
                    worker.heard = time.monotonic()

    async def stop(self) -> None:
        """Have every worker drain; kill those that don't come to an end."""
        self._stopping = True
        deadline = time.monotonic() + self.settings.drain + 15.0
        for worker in self._alive():
            worker.terminate()
        while self._alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - no event covers them all
            await asyncio.sleep(0.02)
        if left := self._alive():
            logger.error("%d workers did not stop in time; killing them", len(left))
        await self._close()

    def _alive(self) -> list[asyncio.subprocess.Process]:
        return [one.process for one in self.workers if one.process is not None and one.process.returncode is None]

    async def _close(self) -> None:
        self._stopping = True
        for process in self._alive():
            process.kill()
            await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.http.stop()
        if self._server is not None:
            await self._server.stop()
        self.directory.release()

    # what HTTP shows

    @property
    def ready(self) -> bool:
        """Whether every worker is."""
        return all(one.told.get("ready") and self._fresh(one) for one in self.workers)

    @property
    def alive(self) -> bool:
        """Whether the parent still looks after its workers: it starts again what dies or freezes."""
        return not any(task.done() for task in self._tasks)

    def _fresh(self, worker: Worker) -> bool:
        return time.monotonic() - worker.heard < FROZEN_S

    def report(self) -> dict[str, Any]:
        """Return the health of every worker."""
        return {
            "ready": self.ready,
            "workers": [
                {
                    "number": one.number,
                    "worker": one.told.get("worker", ""),
                    "ready": bool(one.told.get("ready")) and self._fresh(one),
                    "restarts": one.restarts,
                    "heard": round(time.monotonic() - one.heard, 1),
                    "components": one.told.get("health", {}),
                }
                for one in self.workers
            ],
        }

    async def metrics(self) -> bytes:
        """Return the metrics of all workers, each sample with its worker's number."""
        pages = await asyncio.gather(*(scrape(one.told.get("http", "")) for one in self.workers))
        return merge({str(one.number): page for one, page in zip(self.workers, pages, strict=True) if page})
