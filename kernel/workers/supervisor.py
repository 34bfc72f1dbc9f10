"""The supervisor of several worker processes: it starts, restarts and stops them, and serves their HTTP pages."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from kernel.errors import WorkersFailed
from kernel.monitoring.http import HttpServer
from kernel.packages import environment
from kernel.runtime.directory import DataDirectory, running_as
from kernel.runtime.nats_server import SYNCED, EmbeddedServer, embedded_commits, end_with_parent, start_embedded
from kernel.settings import Settings
from kernel.settings.sources import changed
from kernel.workers.scrape import merge, scrape
from kernel.workers.worker import GAVE_UP, REFUSED, describe

logger = logging.getLogger("eskernel.workers")
FROZEN_S = 15.0
"""A worker without a heartbeat for this long is killed. Other workers have taken its partitions long before."""
START_S = 3600.0
"""Time limit for the first heartbeat: a worker that starts may be building tables."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 15.0
STEADY_S = 30.0
"""A worker that ran for this long is restarted with the shortest pause."""


@dataclass(slots=True)
class Worker:
    """One worker process, over its restarts.

    Attributes:
        heartbeat: the worker's last heartbeat, empty before the first.
        received: when the last message of the worker was received, in monotonic time.
        failed: the error that the worker reported.
        kinds: names of its classes.
        ready: set when the worker has started, or could not start.
    """

    number: int
    process: asyncio.subprocess.Process | None = None
    heartbeat: dict[str, Any] = field(default_factory=dict)
    received: float = 0.0
    failed: str = ""
    kinds: list[str] = field(default_factory=list)
    restarts: int = -1
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Runs an app in several worker processes.

    The supervisor holds the data directory and the embedded server. If the supervisor dies, its workers exit.
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
        """Start the server and the workers, and return when every worker is running.

        Raises:
            AlreadyRunning: another service holds the data directory.
            Unavailable: the embedded server did not start.
            WorkersFailed: a worker could not start.
            OSError: the HTTP port can't be opened, or a process can't be started.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()  # workers that have started already must drain
            raise

    async def _start(self) -> None:
        self.directory.hold()
        settings = embedded_commits(self.settings)
        self.nats_url = ",".join(settings.connection.servers)
        if settings.embedded:
            self._server, keeping = await start_embedded(self.directory.path, sync=settings.stream.sync)
            self._tasks.append(keeping)
            self.nats_url = self._server.url
        self.database_url = settings.database.url_in(self.directory.path)
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
                raise WorkersFailed(worker.failed, worker.kinds)
        self.durability = SYNCED if settings.stream.sync else self.workers[0].heartbeat.get("durability", "")
        await self.http.start()
        self.directory.describe(
            running_as(self.app, self._spec, self.settings, self.nats_url, self.database_url, self.http.url)
        )

    async def _keep(self, worker: Worker, order: bytes) -> None:
        """Run one worker, and restart it whenever it ends, until the supervisor stops."""
        pause = MIN_BACKOFF_S
        while not self._stopping:
            started = time.monotonic()
            code = await self._run(worker, order)
            if self._stopping:
                return
            if code == REFUSED and not worker.ready.is_set():
                worker.ready.set()  # the worker refuses to start: let `start` raise at once
                return
            if code == GAVE_UP:
                worker.ready.set()
                self.failure = worker.failed
                self.stopped.set()
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
        worker.failed, worker.heartbeat = "", {}
        worker.received = time.monotonic()
        process = worker.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # not from this folder: the user's own `kernel` may be here
            "-m",
            "kernel.workers.worker",
            str(worker.number),
            env=environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=_beginning(),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order + b"\n")
        while line := await process.stdout.readline():
            try:
                message = orjson.loads(line)
            except orjson.JSONDecodeError:
                sys.stdout.buffer.write(line)  # the app itself prints something
                continue
            worker.received = time.monotonic()
            if "failed" in message:
                worker.failed, worker.kinds = message["failed"], message.get("kinds", [])
            else:
                worker.heartbeat = message
                if message.get("started"):
                    worker.ready.set()
        return await process.wait()

    async def _watch(self) -> None:
        """Kill frozen workers, so that they are restarted."""
        while True:
            await asyncio.sleep(1.0)
            for worker in self.workers:
                patience = FROZEN_S if worker.heartbeat else START_S
                if worker.process is None or worker.process.returncode is not None:
                    continue
                if time.monotonic() - worker.received > patience:
                    logger.error("worker %d sent no heartbeat for %.0f s; killing it", worker.number, patience)
                    worker.process.kill()
                    worker.received = time.monotonic()

    async def stop(self) -> None:
        """Let every worker drain and exit; kill the workers that don't exit in time."""
        self._stopping = True
        deadline = time.monotonic() + self.settings.drain + 15.0
        for process in self._alive():
            process.terminate()
        while self._alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - no event covers them all
            await asyncio.sleep(0.02)
        if left := self._alive():
            logger.error("%d workers did not stop in time; killing them", len(left))
        await self._close()

    def _alive(self) -> list[asyncio.subprocess.Process]:
        processes = [worker.process for worker in self.workers]
        return [process for process in processes if process is not None and process.returncode is None]

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

    # the HTTP pages

    @property
    def ready(self) -> bool:
        """True if every worker is ready."""
        return all(self._is_ready(worker) for worker in self.workers)

    @property
    def alive(self) -> bool:
        """True while the supervisor restarts workers that die or freeze."""
        return not any(task.done() for task in self._tasks)

    def _is_ready(self, worker: Worker) -> bool:
        return bool(worker.heartbeat.get("ready")) and time.monotonic() - worker.received < FROZEN_S

    def report(self) -> dict[str, Any]:
        """Return the health of every worker."""
        return {
            "ready": self.ready,
            "workers": [
                {
                    "number": worker.number,
                    "worker": worker.heartbeat.get("worker", ""),
                    "ready": self._is_ready(worker),
                    "restarts": worker.restarts,
                    "heard": round(time.monotonic() - worker.received, 1),
                    "components": worker.heartbeat.get("health", {}),
                }
                for worker in self.workers
            ],
        }

    async def metrics(self) -> bytes:
        """Return the metrics of all workers. Each sample has its worker's number as a label."""
        pages = await asyncio.gather(*(scrape(worker.heartbeat.get("http", "")) for worker in self.workers))
        return merge({str(worker.number): page for worker, page in zip(self.workers, pages, strict=True) if page})


def _beginning() -> Callable[[], None]:
    """Return what a worker's process does before anything else."""
    # SIGKILL also ends a stopped or stuck worker; the next start recovers from any state that it leaves
    end = end_with_parent(signal.SIGKILL)

    def begin() -> None:
        # Ctrl-C in a terminal reaches the whole group, also a worker that is still importing: the parent decides
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if end is not None:
            end()

    return begin
