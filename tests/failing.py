"""Helpers for the tests of failure modes: a server that can be reconfigured and restored, a service, its metrics."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select

from kernel import Client, Service
from kernel.errors import LogError
from kernel.runtime.nats_server import end_with_parent, find_binary
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api
from projections import SchemaError
from projections.database import open_database, reads
from projections.tables import dead_letter
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]
NAME_VARIABLE = "FAILING_APP"
ROOT = Path(__file__).parent.parent

# for `eskernel run tests.failing:app`
app = notebooks(os.environ.get(NAME_VARIABLE, "failing"))


def free_port() -> int:
    """Return a free port that the system doesn't give to outgoing connections: it must stay ours while unused."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """A nats-server on a fixed port whose configuration and store can be changed.

    Attributes:
        password: the password that clients need; none if empty.
        jetstream, more: lines of its configuration, inside and outside the `jetstream` block.
        prefix: a command that starts the server, with its arguments appended.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.store = directory, directory / "store"
        self.port = free_port()
        self.password = self.jetstream = self.more = ""
        self.prefix: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        user = f"user:{self.password}@" if self.password else ""
        return f"nats://{user}127.0.0.1:{self.port}"

    def _configure(self) -> Path:
        config = self.directory / "nats.conf"
        users = f'authorization {{ user: user, password: "{self.password}" }}\n' if self.password else ""
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\n{users}{self.more}\n'
            f'jetstream {{ store_dir: "{self.store}"\n{self.jetstream}\n}}\n'
        )
        return config

    async def start(self) -> str:
        config = self._configure()
        with (self.directory / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, find_binary(), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                assert self.process.poll() is None, (self.directory / "nats.log").read_text()
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            else:
                writer.close()
                return self.url

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def stop(self, how: int = signal.SIGTERM) -> None:
        self.send(how)
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def reload(self) -> None:
        """Let the server read its changed configuration."""
        self._configure()
        self.send(signal.SIGHUP)

    async def back_up(self) -> Path:
        """Stop the server, copy its store, and start it again."""
        await self.stop()
        copy = self.directory / f"backup-{time.monotonic_ns()}"
        shutil.copytree(self.store, copy)
        await self.start()
        return copy

    def put_back(self, backup: Path) -> None:
        """Put a copy in place of the stopped server's store."""
        shutil.rmtree(self.store)
        shutil.copytree(backup, self.store)

    async def restore(self, backup: Path) -> None:
        """Stop the server, put a copy in place of its store, and start it again."""
        await self.stop()
        self.put_back(backup)
        await self.start()


@asynccontextmanager
async def server(directory: Path, **options: Any) -> AsyncIterator[Server]:
    made = Server(directory / "nats")
    for name, value in options.items():
        setattr(made, name, value)
    await made.start()
    try:
        yield made
    finally:
        made.send(signal.SIGCONT)
        await made.stop(signal.SIGKILL)


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[tuple[list[str], Path]]:
    """Mount a small file system in its own mount namespace, which ends with this context.

    Yields a prefix for commands that are to run inside, and the file system's path from outside.
    """
    place.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs {place} && echo mounted && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", mount],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
    )
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip("a small file system can't be mounted here")
        yield (
            ["nsenter", f"--wd={ROOT}", "--mount", "--target", str(holder.pid)],
            Path(f"/proc/{holder.pid}/root{place}"),
        )
    finally:
        holder.kill()
        holder.communicate()


def fill(file: Path) -> None:
    """Write until the file system is full."""
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(descriptor, bytes(4096)):
            pass
    except OSError:
        pass
    finally:
        os.close(descriptor)


@dataclass
class Running:
    """A service in this process, a client with its own connection, and the acknowledged commands."""

    service: Service
    client: Client
    acknowledged: dict[str, int] = field(default_factory=dict)

    async def note(self, count: int, ids: int = 10, text: str = "a", timeout: float = 20) -> list[Any]:
        """Send commands and count the acknowledged ones."""

        async def one(number: int) -> Any:
            name = f"n{number % ids}"
            receipt = await self.client.execute(Notebook, name, Note(text), timeout=timeout)
            self.acknowledged[name] = self.acknowledged.get(name, 0) + 1
            return receipt

        return await asyncio.gather(*(one(number) for number in range(count)))

    async def component(self, name: str) -> dict[str, Any]:
        """Return what /readyz reports about a component, after a fresh probe."""
        await self.service.parts.probes.probe()
        async with aiohttp.ClientSession() as http, http.get(f"{self.service.http.url}/readyz") as answer:
            report = await answer.json()
            assert answer.status == (200 if report["ready"] else 503)
        found: dict[str, Any] = report["components"][name]
        return found

    async def check(self) -> None:
        """Check that all acknowledged events are in the log and in the tables, and that nothing is parked."""
        receipts = await self.note(10)
        pages = await self.client.query("select notebook, notes from pages", after=receipts, timeout=30)
        assert {page["notebook"]: page["notes"] for page in pages} == self.acknowledged
        total = sum(self.acknowledged.values())
        assert (await self.client.query("select count(*) as n from lines"))[0]["n"] == total
        assert (await self.client.query("select sum(times) as n from words"))[0]["n"] == total
        assert parked(self.service.database_url) == 0
        assert self.service.failure == ""


@asynccontextmanager
async def running(
    name: str, directory: Path, nats: str, database: str = "", client: str = "", **more: Any
) -> AsyncIterator[Running]:
    """Run a service.

    Args:
        client: URL for the client, if it differs from the service's.
    """
    database = database or f"sqlite:///{directory / 'projections.db'}"
    service = Service(
        notebooks(name), settings_for(directory / "data", nats=nats, database=database, drain=2.0, **more)
    )
    await service.start()
    try:
        async with await Client.connect(
            service.app, service.settings, nats=client or nats, database=database
        ) as connected:
            yield Running(service, connected)
    finally:
        async with asyncio.timeout(20):
            await service.stop()


async def refused(name: str, directory: Path, nats: str) -> str:
    """Start a service that must refuse to start; return its message."""
    with pytest.raises((SchemaError, LogError, ConnectionError)) as error:
        async with running(name, directory, nats):
            pass
    return str(error.value)


async def filled(name: str, directory: Path, nats: str, count: int = 20) -> dict[str, int]:
    """Run a service, send commands, and stop; return the number of acknowledged commands."""
    async with running(name, directory, nats) as here:
        await here.client.query("select 1", after=await here.note(count))
        return here.acknowledged


async def stopped(here: Running, *words: str) -> None:
    """Wait until the service has stopped by itself, with a reason."""
    async with asyncio.timeout(15):
        await here.service.stopped.wait()
    assert all(word in here.service.failure for word in words), here.service.failure


def parked(database: str) -> int:
    """Return the number of dead letters."""
    engine = open_database(database, read_only=True)
    try:
        with reads(engine).connect() as connection:
            return connection.scalar(select(func.count()).select_from(dead_letter)) or 0
    finally:
        engine.dispose()


def metric(name: str, **labels: str) -> float:
    """Return a metric's value in this process."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def warned(caplog: pytest.LogCaptureFixture, *words: str) -> bool:
    """Return whether a warning, or worse, contains all these words."""
    return any(
        record.levelname in ("WARNING", "ERROR") and all(word in record.getMessage() for word in words)
        for record in caplog.records
    )


@asynccontextmanager
async def api(url: str) -> AsyncIterator[Callable[..., Coroutine[Any, Any, dict[str, Any]]]]:
    """Yield a function that calls JetStream's API, as an operator's tools do."""
    connection: NatsConnection = await connect(url, name="operator")

    async def call(subject: str, body: object = None) -> dict[str, Any]:
        return await call_api(connection, subject, body)

    try:
        yield call
    finally:
        await connection.close()


async def change_stream(url: str, stream: str, **config: Any) -> None:
    """Change a stream's configuration, as an operator does."""
    async with api(url) as call:
        found = (await call(f"STREAM.INFO.{stream}"))["config"]
        await call(f"STREAM.UPDATE.{stream}", {**found, **config})


class Process:
    """The service in its own process, started as a user does."""

    def __init__(self, name: str, directory: Path, nats: str, database: str, *more: str) -> None:
        self.log = directory / "service.log"
        self._name = name
        self._arguments = [sys.executable, "-m", "kernel.cli", "run", "tests.failing:app", "--nats", nats]
        self._arguments += ["--database", database, "--data", str(directory / "data"), *more]
        self.process: subprocess.Popen[bytes] | None = None

    def wrap(self, command: list[str]) -> None:
        """Let another command start the service."""
        self._arguments = [*command, *self._arguments]

    async def start(self) -> None:
        """Start the service and wait until it reports that it is running."""
        self.launch()
        assert self.process is not None
        while "is running" not in self.output():
            assert self.process.poll() is None, self.output()
            await asyncio.sleep(0.02)

    def launch(self) -> None:
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments,
                cwd=ROOT,
                env={**os.environ, NAME_VARIABLE: self._name, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def wait(self, timeout: float = 20) -> int:
        """Wait until the process ends; return its exit code."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, timeout)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
