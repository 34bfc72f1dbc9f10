"""The connection of a verification's temporary tables: nobody else gets it, nothing real is written on it."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from kernel.projector import verification
from kernel.projector.verification import Verification
from projections import SchemaError
from projections.database import open_database
from projections.shadow import open_shadow
from tests.apps import notebooks
from tests.kernel.projector.test_table_verification import Running, running
from tests.poolers import pooler
from tests.projections.test_database import with_query


@pytest.fixture
async def here(nats_url: str, database_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(notebooks(app_name), nats_url, database_url, tmp_path) as found:
        await found.note(20)
        yield found


@pytest.fixture
async def on_postgres(nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(notebooks(app_name), nats_url, fresh_postgres, tmp_path) as found:
        await found.note(20)
        yield found


def shadows(engine: Engine) -> int:
    """Return how many of an engine's connections, and of the database's tables, have a verification's checkpoints."""
    connections = [engine.connect() for _ in range(5)]
    found = 0
    for connection in connections:
        found += connection.execute(text("select count(*) from eskernel_checkpoint where generation = 0")).scalar() or 0
        connection.close()
    return found


async def test_a_verification_that_is_cancelled_while_it_begins_leaves_no_connection_behind(
    here: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def cancel() -> None:
        verifying.cancel()
        cancelled.set()

    opened: list[Any] = []

    def open_and_be_cancelled(*arguments: Any, **options: Any) -> Any:
        opened.append(open_shadow(*arguments, **options))
        loop.call_soon_threadsafe(cancel)
        assert cancelled.wait(10)
        return opened[0]

    monkeypatch.setattr(verification, "open_shadow", open_and_be_cancelled)
    work = Verification(here.app, here.client.log, here.engine, here.app.projections)
    verifying = asyncio.create_task(work.run())
    with pytest.raises(asyncio.CancelledError):
        await verifying
    assert opened[0].connection.closed
    assert shadows(here.engine) == 0


async def test_a_connection_with_temporary_tables_never_gets_back_into_the_pool(here: Running) -> None:
    plan = here.app.plan(here.engine.dialect)
    shadow = open_shadow(here.engine, plan, here.app.projections, same=True, end={})
    shadow.connection.close()  # as a lost reference does
    assert shadows(here.engine) == 0


async def test_a_search_path_that_names_temporary_tables_last_does_not_lead_to_the_real_ones(
    on_postgres: Running, fresh_postgres: str
) -> None:
    url = with_query(fresh_postgres, options="-c search_path=public,pg_temp")
    engine = open_database(url)
    work = Verification(on_postgres.app, on_postgres.client.log, engine, on_postgres.app.projections)
    try:
        assert [each.differing for each in await work.run()] == [0, 0, 0]
    finally:
        engine.dispose()
        assert shadows(on_postgres.engine) == 0


async def test_behind_a_pooler_nothing_is_made_that_another_client_would_find(
    on_postgres: Running, fresh_postgres: str
) -> None:
    with pooler(fresh_postgres, "ignore") as (_, url):
        engine = open_database(url)
        work = Verification(on_postgres.app, on_postgres.client.log, engine, on_postgres.app.projections)
        with pytest.raises(SchemaError, match="a pooler gives each transaction another session.*--database"):
            await work.run()
        engine.dispose()


async def test_a_user_who_may_not_create_temporary_tables_is_told_what_to_grant(on_postgres: Running) -> None:
    role = f"reader_{uuid.uuid4().hex[:12]}"
    with on_postgres.engine.begin() as connection:
        database = connection.scalar(text("select current_database()"))
        connection.execute(text(f"REVOKE TEMPORARY ON DATABASE {database} FROM public"))
        connection.execute(text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"))
    url = on_postgres.engine.url.set(username=role, password=None)
    engine = open_database(url.render_as_string(hide_password=False))
    try:
        work = Verification(on_postgres.app, on_postgres.client.log, engine, on_postgres.app.projections)
        with pytest.raises(SchemaError, match=f'GRANT TEMPORARY ON DATABASE "{database}" TO "{role}"'):
            await work.run()
    finally:
        engine.dispose()
        with on_postgres.engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))
