"""What a running service leaves in its data directory: its description, and a mark of each worker that is alive."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import orjson

from kernel.errors import AlreadyRunning, NotRunning
from kernel.settings import Settings
from kernel.settings.sources import changed, written


@dataclass(frozen=True, slots=True)
class Running:
    """Where a running service is.

    Attributes:
        spec: what `eskernel run` was given, such as `examples.bank:app`.
        directory: the folder it was started from: the spec is imported from there.
        settings: what is not a default, secrets included.
    """

    app: str
    spec: str
    directory: str
    pid: int
    nats: str
    database: str
    http: str
    settings: dict[str, Any]

    def as_settings(self) -> Settings:
        """Return the settings that the service runs with, its server and database named."""
        return Settings.model_validate(self.settings)


def running_as(app: str, spec: str, settings: Settings, nats: str, database: str, http: str) -> Running:
    """Return the description of this process, for others to connect to the same places in the same way."""
    places = {"connection.servers": nats, "database.url": database, "stream.sync": False}
    known = written(changed(settings, places))
    return Running(app, spec, str(Path.cwd()), os.getpid(), nats, database, http, known)


def worker_name() -> str:
    """Return a name for a worker that no other has or had."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40].strip("-")
    return f"{host or 'host'}-{os.getpid()}-{secrets.token_hex(3)}"


class DataDirectory:
    """An app's folder in the data directory, held by one service at a time."""

    def __init__(self, data: Path, app: str) -> None:
        self.path = (data / app).resolve()
        self._lock: IO[str] | None = None
        self._workers = self.path / "workers"
        self._mark: tuple[Path, IO[str]] | None = None

    def hold(self) -> None:
        """Take the folder; the operating system gives it back when the process is gone, however it went.

        Raises:
            AlreadyRunning: a service has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise AlreadyRunning(
                f"a service is running on {self.path}; stop it, or choose another directory with --data"
            ) from None
        self._lock = lock

    def describe(self, running: Running) -> None:
        """Say where the service is, in one step that readers never see half done."""
        temporary = self.path / f"service.json.{os.getpid()}"
        temporary.touch(mode=0o600)  # its URLs may hold passwords
        temporary.write_bytes(orjson.dumps(asdict(running), option=orjson.OPT_INDENT_2))
        temporary.replace(self.path / "service.json")

    def mark(self, worker: str) -> None:
        """Leave a file with the worker's name, locked for as long as the worker lives, however it ends."""
        self._workers.mkdir(parents=True, exist_ok=True)
        unlocked = self._workers / f".{worker}"
        mark = unlocked.open("w")
        fcntl.flock(mark, fcntl.LOCK_EX)
        # nobody ever finds it under the worker's name and without its lock
        self._mark = unlocked.rename(self._workers / worker), mark

    def dead(self) -> list[str]:
        """Return the workers that left a mark here and are gone for sure: the operating system has their locks back."""
        return [path.name for path in self._workers.glob("[!.]*") if _is_free(path)]

    def forget(self, workers: Iterable[str]) -> None:
        """Remove the marks of dead workers."""
        for worker in workers:
            (self._workers / worker).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the folder back."""
        if self._mark is not None:
            path, mark = self._mark
            path.unlink(missing_ok=True)
            mark.close()
            self._mark = None
        if self._lock is not None:
            (self.path / "service.json").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def find_running(data: Path, app: str | None = None) -> Running:
    """Return the running service of the data directory; of this app, if one is named.

    Raises:
        NotRunning: none, or several and no app named.
    """
    found = []
    for path in sorted(data.glob("*/service.json")):
        try:
            running = msgspec.json.decode(path.read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            continue
        if _is_held(path.with_name("lock")) and app in (None, running.app):
            found.append(running)
    if len(found) == 1:
        return found[0]
    if not found:
        which = f"app {app!r} is running" if app else "service is running"
        raise NotRunning(f"no {which} in {data}; start one with `eskernel run package.module:app`, or give --data")
    raise NotRunning(f"several apps are running in {data}: {', '.join(one.app for one in found)}; choose with --app")


def _is_free(lock: Path) -> bool:
    """Say whether nobody holds the lock: what can't be told is taken for held."""
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
