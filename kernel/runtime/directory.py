"""The data directory of a service: it contains the service's description and a lock file for each live worker."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

import orjson

from kernel.errors import AlreadyRunning
from kernel.runtime.running import Running, is_locked
from kernel.settings import Settings
from kernel.settings.sources import changed, written


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
        return [path.name for path in self._workers.glob("[!.]*") if is_locked(path) is False]

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
