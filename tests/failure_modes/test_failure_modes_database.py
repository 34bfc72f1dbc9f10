"""A database that is unreachable, locked, full, frozen or read-only: projections wait, report it, and lose nothing.

Commands continue: they need no database.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from kernel import Client
from projections.database import is_infrastructure, open_database
from tests.apps import Note, Notebook, notebooks
from tests.failing import Process, Running, Wait, fill, metric, parked, running, small_disk, warned


class Admin:
    """A superuser's connection to the test's PostgreSQL server."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")

    def do(self, *statements: str) -> None:
        with self.engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def backends(self, database: str) -> list[int]:
        """Return the process ids behind a database's connections."""
        with self.engine.connect() as connection:
            query = text("SELECT pid FROM pg_stat_activity WHERE datname = :name")
            return list(connection.execute(query, {"name": database}).scalars())

    def disconnect(self, database: str, but: int = 0) -> None:
        self.do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{database}' AND backend_type = 'client backend' AND pid <> {but}"
        )


@pytest.fixture
def admin(postgres_url: str) -> Iterator[Admin]:
    made = Admin(postgres_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def role(admin: Admin) -> Iterator[str]:
    """A role that is not a superuser."""
    name = f"r{uuid.uuid4().hex[:12]}"
    admin.do(f"CREATE ROLE {name} LOGIN")
    yield name
    admin.do(f"DROP ROLE {name}")


@pytest.fixture
def owned(role: str, fresh_postgres: str, admin: Admin) -> str:
    """The URL of a database that the role owns; the database is dropped before the role."""
    admin.do(f"ALTER DATABASE {name_of(fresh_postgres)} OWNER TO {role}")
    return make_url(fresh_postgres).set(username=role).render_as_string(hide_password=False)


def name_of(url: str) -> str:
    return make_url(url).database or ""


@contextmanager
def locked_tables(url: str, *tables: str) -> Iterator[None]:
    """Lock tables as a migration tool or a forgotten transaction does."""
    holder = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with holder.connect() as connection:
        for table in tables:
            connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield
    holder.dispose()


async def behind(here: Running, count: int = 30) -> None:
    """Send commands that the projections can't project now."""
    await here.note(count)
    assert here.service.failure == ""


async def until_shown(here: Running, name: str, wait_until: Wait, *words: str, timeout: float = 15) -> None:
    """Wait until /readyz reports that a component fails, with this reason."""

    async def shown() -> bool:
        found = await here.component(name)
        return not found["ok"] and any(word in found["detail"] for word in words)

    await wait_until(shown, timeout=timeout)


# PostgreSQL


async def test_an_unreachable_database_is_reported_with_the_reason(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, admin: Admin, wait_until: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        await here.client.query("select 1", after=await here.note(20))
        admin.do(f"ALTER DATABASE {name_of(fresh_postgres)} ALLOW_CONNECTIONS false")
        admin.disconnect(name_of(fresh_postgres))
        await behind(here)
        await until_shown(here, "database", wait_until, "not currently accepting connections")
        await until_shown(here, "projection", wait_until, "waiting for the database")
        await here.service.parts.detector.detect_backlog()
        assert metric("eskernel_projection_lag_commits") > 0
        await wait_until(lambda: warned(caplog, "database", "not currently accepting connections"))
        admin.do(f"ALTER DATABASE {name_of(fresh_postgres)} ALLOW_CONNECTIONS true")
        await here.check()
        assert (await here.component("database"))["ok"]


async def test_a_database_that_is_unreachable_at_start_is_named(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, admin: Admin
) -> None:
    admin.do(f"ALTER DATABASE {name_of(fresh_postgres)} ALLOW_CONNECTIONS false")
    with pytest.raises(SQLAlchemyError, match="not currently accepting connections"):
        async with running(app_name, tmp_path, nats_url, fresh_postgres):
            pass


async def test_a_locked_table_is_reported_and_waited_for(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        await here.client.query("select 1", after=await here.note(20))
        with locked_tables(fresh_postgres, "words__1"):
            await behind(here)
            await until_shown(here, "projection", wait_until, "waiting for the database")
            assert warned(caplog, "database", "lock timeout")
        await here.check()


async def test_connections_that_others_have_used_up_are_waited_for(
    nats_url: str, role: str, owned: str, app_name: str, tmp_path: Path, admin: Admin, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, owned) as here:
        await here.note(20)
        hog = create_engine(make_url(owned).set(drivername="postgresql+psycopg"))
        with hog.connect() as taken:
            admin.do(f"ALTER ROLE {role} CONNECTION LIMIT 1")
            admin.disconnect(name_of(owned), but=taken.scalar(text("SELECT pg_backend_pid()")))
            await behind(here)
            await until_shown(here, "database", wait_until, "too many connections")
            admin.do(f"ALTER ROLE {role} CONNECTION LIMIT -1")
            await here.check()
        hog.dispose()


async def test_a_database_that_takes_no_writes_is_waited_for_and_parks_no_aggregate(
    nats_url: str, role: str, owned: str, app_name: str, tmp_path: Path, admin: Admin, wait_until: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As after a failover to a replica, or when the provider makes a full database read-only."""
    async with running(app_name, tmp_path, nats_url, owned) as here:
        await here.client.query("select 1", after=await here.note(20))
        admin.do(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        admin.disconnect(name_of(owned))
        await behind(here)
        await wait_until(lambda: "read-only transaction" in caplog.text)
        admin.do(f"ALTER ROLE {role} RESET default_transaction_read_only")
        admin.disconnect(name_of(owned))
        assert "parked" not in caplog.text
        assert warned(caplog, "database", "read-only transaction")
        await here.check()


async def test_a_revoked_privilege_is_waited_for_and_parks_no_aggregate(
    nats_url: str, role: str, owned: str, app_name: str, tmp_path: Path, admin: Admin, wait_until: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    superuser = Admin(make_url(owned).set(username=admin.engine.url.username).render_as_string(hide_password=False))
    async with running(app_name, tmp_path, nats_url, owned) as here:
        await here.client.query("select 1", after=await here.note(20))
        superuser.do("ALTER TABLE words__1 OWNER TO CURRENT_USER")
        await behind(here)
        await wait_until(lambda: "permission denied" in caplog.text)
        superuser.do(f"ALTER TABLE words__1 OWNER TO {role}")
        superuser.engine.dispose()
        assert "parked" not in caplog.text
        assert warned(caplog, "database", "permission denied")
        await here.check()


async def test_a_database_that_does_not_answer_is_shown_and_waited_for(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, admin: Admin, wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The database's processes are stopped: connections stay open, and no answer comes."""
    monkeypatch.setattr("kernel.monitoring.probes.PROBE_S", 0.5)
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        await here.client.query("select 1", after=await here.note(20))
        frozen = admin.backends(name_of(fresh_postgres))
        assert frozen

        async def no_answer() -> bool:
            # a probe may have opened a connection of its own meanwhile
            for pid in set(admin.backends(name_of(fresh_postgres))) - set(frozen):
                os.kill(pid, signal.SIGSTOP)
                frozen.append(pid)
            await here.service.parts.probes.probe()
            return "no answer" in here.service.health.components["database"].detail

        try:
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
            await behind(here)
            await wait_until(no_answer)
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
        await here.check()


async def test_an_exhausted_pool_is_waited_for(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, database_url) as here:
        await here.client.query("select 1", after=await here.note(20))
        engine = here.service.parts.engine
        engine.pool._timeout = 0.2  # type: ignore[attr-defined]
        taken = [engine.raw_connection() for _ in range(10 - engine.pool.checkedout())]  # type: ignore[attr-defined]
        await behind(here)
        await until_shown(here, "projection", wait_until, "waiting for the database")
        for connection in taken:
            connection.close()
        await here.check()


async def test_a_stop_keeps_its_deadline_while_the_database_is_locked(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path
) -> None:
    process = Process(app_name, tmp_path, nats_url, fresh_postgres, "--drain", "1")
    await process.start()
    try:
        async with await Client.connect(notebooks(app_name), nats=nats_url) as client:
            with locked_tables(fresh_postgres, "words__1"):
                for n in range(5):
                    await client.execute(Notebook, "n0", Note("a"), command_id=f"{n}")
                process.process.terminate()  # type: ignore[union-attr]
                assert await process.wait(10) == 0
                assert "next start goes on from its checkpoint" in process.output()
    finally:
        process.close()
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        here.acknowledged["n0"] = 5
        await here.check()


# SQLite


@contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Let another process hold the write lock."""
    program = (
        f"import sqlite3, sys; c = sqlite3.connect({str(file)!r}, timeout=20, isolation_level=None)\n"
        "c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read(); c.execute('ROLLBACK')"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield
    finally:
        holder.communicate()


async def test_a_file_that_another_process_locks_is_shown_and_waited_for(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel.monitoring.progress.WRITE_S", 0.5)
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        with locked_file(tmp_path / "projections.db"):
            await behind(here)
            await until_shown(here, "projection", wait_until, "writing a batch for", "waiting for the database")
        await here.check()


async def test_a_full_disk_is_waited_for(nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait) -> None:
    file = tmp_path / "small" / "p.db"
    process = Process(app_name, tmp_path, nats_url, f"sqlite:///{file}")
    program = (
        f"import sqlite3; c = sqlite3.connect({str(file)!r})\n"
        "query = 'select (select sum(notes) from pages), (select count(*) from eskernel_dead_letter)'\n"
        "print(*c.execute(query).fetchone())"
    )
    with small_disk(file.parent, 4) as (inside, seen):
        process.wrap(inside)
        await process.start()
        try:
            async with await Client.connect(notebooks(app_name), nats=nats_url) as client:
                for n in range(20):
                    await client.execute(Notebook, f"n{n % 10}", Note("a"))
                fill(seen / "filler")
                for n in range(100):
                    await client.execute(Notebook, f"n{n % 10}", Note("a" * 200))
                await wait_until(
                    lambda: "database or disk is full" in process.output() or "disk I/O" in process.output()
                )
                (seen / "filler").unlink()

                def found() -> str:
                    query = [*inside, sys.executable, "-c", program]
                    return subprocess.run(query, capture_output=True, text=True, check=False).stdout

                await wait_until(lambda: found() == "120 0\n")
        finally:
            process.close()


async def test_a_file_that_may_not_grow_is_waited_for(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    process = Process(app_name, tmp_path, nats_url, f"sqlite:///{tmp_path / 'p.db'}")
    await process.start()
    try:
        pid = process.process.pid  # type: ignore[union-attr]
        async with await Client.connect(
            notebooks(app_name), nats=nats_url, database=f"sqlite:///{tmp_path / 'p.db'}"
        ) as client:
            await client.query("select 1", after=await client.execute(Notebook, "n", Note("a")))
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            size = (tmp_path / "p.db-wal").stat().st_size
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
            for _ in range(5):
                last = await client.execute(Notebook, "n", Note("a" * 5000))
            await wait_until(lambda: "database: " in process.output())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
            rows = await client.query("select notes from pages", after=last)
            assert rows == [{"notes": 6}]
        assert parked(f"sqlite:///{tmp_path / 'p.db'}") == 0
    finally:
        process.close()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_deleted_or_replaced_is_noticed_and_built_again_at_the_next_start(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, replaced: bool
) -> None:
    file = tmp_path / "p.db"
    url = f"sqlite:///{file}"
    async with running(app_name, tmp_path / "data", nats_url, url) as here:
        for number in range(20):
            last = await here.client.execute(Notebook, f"n{number}", Note("a"))
        await here.client.query("select 1", after=last)
        for path in tmp_path.glob("p.db*"):
            path.rename(path.with_name(f"old{path.name}"))
        if replaced:
            shutil.copyfile(tmp_path / "oldp.db", file)
        await here.client.execute(Notebook, "n0", Note("b"))
        await wait_until(lambda: not here.service.health.ready)
        await here.service.parts.probes.probe()
        detail = here.service.health.components["database"].detail
        assert ("replaced by another file" if replaced else "was deleted") in detail
        assert "restart the service" in detail
        await here.client.execute(Notebook, "n1", Note("c"))
    assert file.exists() == replaced
    async with running(app_name, tmp_path / "data", nats_url, url) as here:
        last = await here.client.execute(Notebook, "n2", Note("d"))
        assert await here.client.query("select sum(notes) as n from pages", after=last) == [{"n": 23}]
    assert parked(url) == 0


def test_a_damaged_file_is_the_databases_fault_and_parks_no_aggregate(tmp_path: Path) -> None:
    file = tmp_path / "p.db"
    file.write_bytes(b"SQLite format 3\0" + b"nonsense" * 1000)
    engine = open_database(f"sqlite:///{file}")
    with pytest.raises(DatabaseError) as failed, engine.connect() as connection:
        connection.execute(text("select * from anything"))
    assert is_infrastructure(failed.value)


@pytest.mark.parametrize(
    "statement",
    [
        "select json('{')",
        "select abs(-9223372036854775808)",
        "selekt",
        "select * from no",
    ],
)
def test_a_statement_that_sqlite_refuses_is_the_handlers_fault(statement: str) -> None:
    """Retrying would hold up every other aggregate without end."""
    engine = create_engine("sqlite://")
    with pytest.raises(SQLAlchemyError) as failed, engine.connect() as connection:
        connection.execute(text(statement))
    assert not is_infrastructure(failed.value)


async def test_a_key_that_no_index_takes_stops_no_other_aggregate(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path
) -> None:
    """PostgreSQL reports a program limit (54000), but the data is to blame."""
    async with running(app_name, tmp_path, nats_url, fresh_postgres) as here:
        await here.client.execute(Notebook, "bad", Note(random.Random(1).randbytes(20_000).hex()))
        last = await here.note(20)
        rows = await here.client.query("select times from words where word = 'a'", after=last, timeout=5)
        assert rows == [{"times": 20}]
        assert parked(fresh_postgres) > 0


async def test_a_database_restored_from_an_older_backup_catches_up(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    file, backup = tmp_path / "projections.db", tmp_path / "backup.db"
    acknowledged: dict[str, int] = {}
    for part in range(3):
        async with running(app_name, tmp_path, nats_url) as here:
            here.acknowledged = acknowledged
            await here.client.query("select 1", after=await here.note(50))
        if part == 0:
            shutil.copy(file, backup)
        elif part == 1:
            shutil.copy(backup, file)
    async with running(app_name, tmp_path, nats_url) as here:
        here.acknowledged = acknowledged
        await here.check()
