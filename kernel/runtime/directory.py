"""The data directory of a service: it contains the service's description and a lock file for each live worker."""

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
    """The description of a running service.

    Attributes:
        app: name of the app.
        spec: the app's place, as `eskernel run` got it, such as `examples.bank:app`.
        directory: working directory of the service, from which the spec is imported.
        pid: process id.
        nats: URLs of the NATS servers, separated by commas.
        database: URL of the database.
        http: URL of the HTTP pages.
        settings: the settings that are not defaults, with secrets.
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
        """Return the settings of the service, with the URLs of its server and its database."""
        return Settings.model_validate(self.settings)


def running_as(app: str, spec: str, settings: Settings, nats: str, database: str, http: str) -> Running:
    """Return the description of this process, with which other processes connect to the same server and database."""
    places = {"connection.servers": nats, "database.url": database, "stream.sync": False}
    known = written(changed(settings, places))
    return Running(app, spec, str(Path.cwd()), os.getpid(), nats, database, http, known)


def worker_name() -> str:
    """Return a unique name for a worker."""
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
        """Lock the folder. The operating system releases the lock when the process ends, however it ends.

        Raises:
            AlreadyRunning: another service holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise AlreadyRunning(
                f"another service is running on {self.path}; stop it, or choose another directory with --data"
            ) from None
        self._lock = lock

    def describe(self, running: Running) -> None:
        """Write the description of the service, atomically."""
        temporary = self.path / f"service.json.{os.getpid()}"
        temporary.touch(mode=0o600)  # the description contains secrets
        temporary.write_bytes(orjson.dumps(asdict(running), option=orjson.OPT_INDENT_2))
        temporary.replace(self.path / "service.json")

    def mark(self, worker: str) -> None:
        """Create a file with the worker's name, locked until the worker's process ends, however it ends."""
        self._workers.mkdir(parents=True, exist_ok=True)
        unlocked = self._workers / f".{worker}"
        mark = unlocked.open("w")
        fcntl.flock(mark, fcntl.LOCK_EX)
        # renamed only when it is locked: a file with the worker's name is never found unlocked while the worker lives
        self._mark = unlocked.rename(self._workers / worker), mark

    def dead(self) -> list[str]:
        """Return the workers that are certainly dead: their files exist, and nothing holds the locks any more."""
        return [path.name for path in self._workers.glob("[!.]*") if _is_locked(path) is False]

    def forget(self, workers: Iterable[str]) -> None:
        """Remove the files of dead workers."""
        for worker in workers:
            (self._workers / worker).unlink(missing_ok=True)

    def release(self) -> None:
        """Release the folder, and remove this process's files."""
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
    """Return the running service of the data directory.

    Args:
        app: name of the app; it may be omitted if only one app is running.

    Raises:
        NotRunning: no service is running, or several are and no app is given.
    """
    found = []
    for path in sorted(data.glob("*/service.json")):
        try:
            running = msgspec.json.decode(path.read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            continue
        if _is_locked(path.with_name("lock")) and app in (None, running.app):
            found.append(running)
    if len(found) == 1:
        return found[0]
    if not found:
        which = f"app {app!r} is running" if app else "service is running"
        raise NotRunning(f"no {which} in {data}; start one with `eskernel run package.module:app`, or give --data")
    apps = ", ".join(running.app for running in found)
    raise NotRunning(f"several apps are running in {data}: {apps}; choose one with --app")


def _is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock of a file, or None if it can't be found out."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
