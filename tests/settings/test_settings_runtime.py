"""The settings of the service take effect: batches, database, HTTP, workers, leases, stopping, dead letters."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from aggregates import applies
from kernel import App, Client, Service
from kernel.governance.pace import unpaced
from kernel.log.base import LogReader
from kernel.partitions.bucket import bucket_of
from kernel.projector import retries as automatic
from kernel.projector.reading import read_batch
from kernel.projector.session import Session
from kernel.settings import Batch, Database
from kernel.transport.dial import dial
from kernel.workers.supervisor import Supervisor
from projections import Rows
from projections.database import open_database
from tests.apps import Note, Notebook, Noted, Page, notebooks
from tests.commands import eskernel
from tests.conftest import open_log, settings_for
from tests.failing import NAME_VARIABLE, ROOT, api, running

Wait = Callable[..., Any]
BACKLOG = 4_000


# batches


@pytest.fixture(scope="module")
def backlog() -> dict[str, str]:
    """The name of a stream with a backlog, by the server's URL."""
    return {}


@asynccontextmanager
async def behind(url: str, backlog: dict[str, str], name: str) -> AsyncIterator[LogReader]:
    """A reader before a backlog, of which a single read returns little."""
    connection = await dial(settings_for(Path(), nats=url), name="test")
    log = await open_log(connection, backlog.setdefault(url, name), consumer__window=100)
    try:
        if not (await log.info()).commits:
            subjects = [log.subjects.address("Notebook", f"n{n}").subject for n in range(BACKLOG)]
            await asyncio.gather(*(log.append(subject, 0, subject.encode()) for subject in subjects))
        yield await log.read(0)
    finally:
        await log.close()
        await connection.close()


@pytest.mark.setting("batch.events", "batch.bytes", "batch.time")
@pytest.mark.parametrize(
    ("batch", "least", "most"),
    [
        (Batch(), 1000, BACKLOG),
        (Batch(events=150), 1, 150),
        (Batch(events=1500), 1400, 1500),
        # one read of the window's size, or two
        (Batch(bytes=1), 1, 200),
        (Batch(time=0), 1, 200),
    ],
)
async def test_a_batch_of_a_backlog_is_as_wide_as_it_may_be(
    nats_url: str, app_name: str, backlog: dict[str, str], batch: Batch, least: int, most: int
) -> None:
    async with behind(nats_url, backlog, app_name) as reader:
        read = await read_batch(reader, batch, unpaced())
        assert least <= len(read.commits) <= most


@pytest.mark.setting("batch.events")
async def test_a_service_writes_no_wider_batches(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url, batch__events=3) as service:
        widest: list[int] = []
        project = Session._project

        async def watched(session: Session, batch: Any) -> None:
            widest.append(len(batch.commits))
            await project(session, batch)

        monkeypatch.setattr(Session, "_project", watched)
        await service.note(60, ids=30)
        await service.check()
        assert max(widest) <= 3


# the database


def at_once(engine: Engine, count: int) -> list[Any]:
    """Take this many connections."""
    return [engine.connect() for _ in range(count)]


@pytest.mark.setting("database.pool_size", "database.max_overflow", "database.pool_timeout", on="")
def test_the_pool_keeps_and_lends_the_set_number_of_connections_and_waits_for_more(database_url: str) -> None:
    settings = Database(pool_size=2, max_overflow=1, pool_timeout=0.05)
    engine = open_database(database_url, **settings.options())
    lent = at_once(engine, 3)
    with pytest.raises(PoolTimeout, match="timeout 0.05"):
        engine.connect()
    for connection in lent:
        connection.close()
    assert engine.pool.checkedin() == 2  # type: ignore[attr-defined]
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            count = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            while connection.scalar(count) != 2:  # the third one's process takes a moment to end
                pass
    engine.dispose()


@pytest.mark.setting("database.pool_recycle", on="")
def test_an_old_connection_is_replaced(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for recycle, replaced in ((5, True), (-1, False)):
        engine = open_database(database_url, **Database(pool_recycle=recycle).options())
        with engine.connect() as connection:
            first = connection.connection.dbapi_connection
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10)
        with engine.connect() as connection:
            assert (connection.connection.dbapi_connection is not first) == replaced
        monkeypatch.undo()
        engine.dispose()


@pytest.mark.setting("database.connect_timeout", on="")
def test_a_database_that_says_nothing_is_given_up(fresh_postgres: str) -> None:
    del fresh_postgres  # the setting is for PostgreSQL
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        url = f"postgresql://u@127.0.0.1:{listening.getsockname()[1]}/x"
        engine = open_database(url, **Database(connect_timeout=2).options())
        failed: list[Exception] = []

        def connect() -> None:
            try:
                engine.connect()
            except OperationalError as error:
                failed.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(8)  # the default is longer
        assert "timeout" in str(failed[0])
        engine.dispose()


@pytest.mark.setting("database.lock_timeout", on="")
def test_a_foreign_lock_is_waited_for_until_the_set_timeout(database_url: str) -> None:
    engine = open_database(database_url, **Database(lock_timeout=0.1).options())
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
    with engine.begin() as first:
        if engine.dialect.name == "postgresql":
            first.execute(text("LOCK TABLE t"))
        with pytest.raises(OperationalError, match=r"lock"):
            with engine.begin() as second:
                second.execute(text("INSERT INTO t VALUES (1)"))
    engine.dispose()


@pytest.mark.setting("database.url", "database.pool_size")
async def test_a_service_and_its_clients_use_the_database_as_set(
    nats_url: str, app_name: str, tmp_path: Path, database_url: str
) -> None:
    values: dict[str, Any] = {"database__pool_size": 3, "database__max_overflow": 1, "database__lock_timeout": 1.5}
    async with running(app_name, tmp_path, nats_url, database_url, **values) as service:
        await service.note(20)
        await service.check()
        for engine in (service.service.parts.engine, service.client._engine):
            assert engine.pool.size() == 3  # type: ignore[attr-defined]
            assert engine.pool._max_overflow == 1  # type: ignore[attr-defined]
            with engine.connect() as connection:
                if engine.dialect.name == "postgresql":
                    assert connection.scalar(text("SHOW lock_timeout")) == "1500ms"
                else:
                    assert connection.scalar(text("PRAGMA busy_timeout")) == 1500


# HTTP


async def get(url: str, token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


@pytest.mark.setting("http.host", "http.port")
async def test_http_listens_on_the_set_address(nats_url: str, app_name: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    async with running(app_name, tmp_path, nats_url, host="127.0.0.2", port=port) as service:
        assert service.service.http.url == f"http://127.0.0.2:{port}"
        assert (await get(f"http://127.0.0.2:{port}/healthz"))[0] == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await get(f"http://127.0.0.1:{port}/healthz")
    async with running(app_name, tmp_path, nats_url) as service:
        assert service.service.http.url.startswith("http://127.0.0.1:")


@pytest.mark.setting("http.token")
async def test_a_token_is_needed_for_metrics_and_details(nats_url: str, app_name: str, tmp_path: Path) -> None:
    async with running(app_name, tmp_path, nats_url, http__token="right") as service:
        url = service.service.http.url
        assert (await get(f"{url}/metrics"))[0] == 401
        assert (await get(f"{url}/metrics", "wrong"))[0] == 401
        assert (await get(f"{url}/metrics", "right"))[0] == 200
        assert (await get(f"{url}/healthz"))[0] == 200
        status, plain = await get(f"{url}/readyz")
        assert status == 200
        assert "components" not in plain
        assert "components" in (await get(f"{url}/readyz", "right"))[1]


# workers


@pytest.mark.setting("workers", "http.token", "drain")
async def test_the_set_number_of_workers_runs_and_their_metrics_need_the_token(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    monkeypatch.setenv(NAME_VARIABLE, app_name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    database = f"sqlite:///{tmp_path / 'projections.db'}"
    settings = settings_for(tmp_path, nats=nats_url, database=database, workers=2, http__token="right", drain=3.0)
    supervisor = Supervisor(app_name, "tests.failing:app", settings)
    await supervisor.start()
    try:
        assert len({worker.process.pid for worker in supervisor.workers if worker.process is not None}) == 2
        await wait_until(
            lambda: all(len(worker.heartbeat.get("partitions", ())) == 32 for worker in supervisor.workers), 30
        )
        assert (await get(f"{supervisor.http.url}/metrics"))[0] == 401
        status, page = await get(f"{supervisor.http.url}/metrics", "right")
        assert status == 200
        assert 'worker="2"' in page
    finally:
        await supervisor.stop()


@pytest.mark.setting("stream.sync", "workers")
async def test_several_workers_say_that_their_embedded_server_syncs(
    app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME_VARIABLE, app_name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    supervisor = Supervisor(app_name, "tests.failing:app", settings_for(tmp_path, workers=2, sync=True, drain=3.0))
    await supervisor.start()
    try:
        assert supervisor.durability == "acknowledged events are on disk: they survive a power cut"
        assert "sync_interval: always" in (tmp_path / app_name / "nats" / "nats.conf").read_text()
        async with await Client.connect(notebooks(app_name), data=tmp_path) as client:
            await client.execute(Notebook, "n", Note("a"))
    finally:
        await supervisor.stop()


@pytest.mark.setting("lease")
async def test_leases_last_for_the_set_time(nats_url: str, app_name: str, tmp_path: Path) -> None:
    async with running(app_name, tmp_path, nats_url, lease=7.5) as service:
        async with api(nats_url) as call:
            config = (await call(f"STREAM.INFO.KV_{bucket_of(app_name)}"))["config"]
        assert config["max_age"] == 7_500_000_000
        assert service.service.scheduler.jobs["renew_leases"].interval == 2.5


@pytest.mark.setting("drain")
@pytest.mark.parametrize("drain", [0.0, 0.7])
async def test_a_stop_waits_for_commands_for_the_set_time(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: float
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, drain=drain))
    await service.start()
    admission = service.parts.admission
    waited: list[float] = []
    drained = admission.stop

    async def noted(seconds: float) -> bool:
        waited.append(seconds)
        return bool(await drained(seconds))

    monkeypatch.setattr(admission, "stop", noted)
    await service.stop()
    assert waited == [drain]


@pytest.mark.setting("commands.pending")
async def test_no_more_commands_than_set_are_taken_at_once(nats_url: str, app_name: str, tmp_path: Path) -> None:
    most = 0
    async with running(app_name, tmp_path, nats_url, commands__pending=5) as service:
        pending, receive = service.service.parts.gateway.pending, service.service.parts.admission.receive

        def watched(*message: Any) -> None:
            nonlocal most
            receive(*message)
            most = max(most, pending.total)

        service.service.parts.connection.listeners = {
            key: watched if listener == receive else listener
            for key, listener in service.service.parts.connection.listeners.items()
        }
        service.service.parts.connection._ps.nc.listeners = service.service.parts.connection.listeners
        await service.note(100, ids=50)
        assert 1 <= most <= 5


# dead letters


class Unsure(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        if event.text == "unsure":
            raise TimeoutError("not now")
        row.notes += 1


@pytest.mark.setting("dead_letters.retries", "dead_letters.retry_after")
@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_a_transient_failure_is_retried_as_often_as_set_with_growing_pauses(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    app = App(app_name, aggregates=[Notebook], projections=[Unsure])
    values: dict[str, Any] = {"nats": nats_url, "retries": retries, "retry_after": 0.01, "drain": 2.0}
    service = Service(app, settings_for(tmp_path, **values))
    pauses: list[float | None] = []
    retry_all = automatic.retry_all  # type: ignore[attr-defined]

    def noted(engine: Engine, plan: Any, due: Any, pause: Callable[[int], float | None]) -> Any:
        def pause_after(attempts: int) -> float | None:
            pauses.append(pause(attempts))
            return pauses[-1]

        return retry_all(engine, plan, due, pause_after)

    monkeypatch.setattr(automatic, "retry_all", noted)
    await service.start()
    try:
        engine, letters = service.parts.engine, service.parts.retries
        async with await Client.connect(app, service.settings) as client:
            await client.execute(Notebook, "n", Note("unsure"))

        def left_to_people() -> bool:
            with engine.connect() as connection:
                found = connection.execute(text("SELECT next_attempt FROM eskernel_dead_letter")).first()
                return found is not None and found[0] is None

        await wait_until(left_to_people)
        await letters.retry_dead_letters()
        assert len(pauses) == retries
        if retries:
            assert pauses[-1] is None
            waits = [pause for pause in pauses[:-1] if pause is not None]
            assert waits == [0.01 * 2 ** (n + 1) for n in range(retries - 1)]
    finally:
        await service.stop()


@pytest.mark.setting("data")
async def test_everything_is_kept_in_the_data_directory(tmp_path: Path, app_name: str) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path / "here", drain=2.0))
    await service.start()
    kept = {path.name for path in (tmp_path / "here" / app_name).iterdir()}
    assert {"nats", "projections.db", "service.json", "lock"} <= kept
    assert service.database_url == f"sqlite:///{tmp_path / 'here' / app_name / 'projections.db'}"
    await service.stop()


async def test_a_client_finds_a_service_that_was_given_relative_paths(
    tmp_path: Path, app_name: str, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_for(Path("data"), nats=nats_url, database="sqlite:///here.db", drain=2.0)
    service = Service(notebooks(app_name), settings)
    await service.start()
    try:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        async with await Client.connect(service.app, data=tmp_path / "data") as client:
            receipt = await client.execute(Notebook, "n", Note("a"))
            assert await client.query("select notes from pages", after=receipt) == [{"notes": 1}]
        assert list((tmp_path / "elsewhere").iterdir()) == []
    finally:
        await service.stop()


def test_a_service_that_can_not_start_for_its_settings_says_all_of_them(tmp_path: Path) -> None:
    wrong = ["--set", "stream.replica=3", "--workers", "0"]
    done = eskernel("run", "tests.failing:app", *wrong, folder=tmp_path)
    assert done.returncode == 2
    assert "stream.replica: no such setting" in done.stderr
    assert "workers:" in done.stderr
