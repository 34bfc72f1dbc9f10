"""A cut-over waits for its locks without holding up anybody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from kernel import Client, Service
from kernel.app import App
from kernel.projector import rebuild
from kernel.projector.cut_over import is_locked, take_over
from kernel.projector.rebuild import Rebuild, clean_up
from projections import Fenced, SchemaError
from projections.checkpoints import claim
from projections.database import open_database
from projections.generations import FENCE, create, numbers
from projections.tables import checkpoint
from tests.apps import Note, Notebook, notebooks
from tests.conftest import ReadSide, settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]


@pytest.fixture
def postgres(fresh_postgres: str) -> Iterator[Engine]:
    engine = open_database(fresh_postgres)
    yield engine
    engine.dispose()


def service_of(app: App, nats_url: str, database: str, tmp_path: Path) -> Service:
    return Service(app, settings_for(tmp_path / "data", nats=nats_url, database=database))


async def test_an_open_reader_delays_only_the_cut_over(
    nats_url: str,
    fresh_postgres: str,
    postgres: Engine,
    app_name: str,
    tmp_path: Path,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(rebuild, "PAUSE_S", 0.05)
    app = notebooks(app_name)
    async with (
        service_of(app, nats_url, fresh_postgres, tmp_path),
        await Client.connect(app, nats=nats_url, database=fresh_postgres) as client,
    ):
        await client.query("select 1", after=[await client.execute(Notebook, "n", Note("a")) for _ in range(5)])
        with postgres.connect() as reader, caplog.at_level(logging.WARNING, "eskernel.projector"):
            reader.execute(text("SELECT count(*) FROM pages"))
            task = asyncio.create_task(Rebuild(app, client.log, postgres, app.projections).run())
            await wait_until(lambda: "waits for a lock" in caplog.text)
            for _ in range(3):
                # the live projections go on, and so do queries
                after = await client.execute(Notebook, "n", Note("b"))
                found = await client.query("select notes from pages", after=after, timeout=10)
            assert found == [{"notes": 8}]
            assert not task.done()
            assert "pages: process" in caplog.text
            assert "idle in transaction" in caplog.text
        assert {built.generation for built in await asyncio.wait_for(task, 30)} == {2}
        after = await client.execute(Notebook, "n", Note("c"))
        assert await client.query("select notes, total from pages", after=after) == [{"notes": 9, "total": 9}]
        assert (await client.query("select count(*) as n from lines"))[0]["n"] == 9


def test_a_cut_over_without_its_locks_changes_nothing(postgres: Engine) -> None:
    side = ReadSide(postgres, notebooks("books"))
    with postgres.begin() as connection:
        made = [create(connection, declared, range(4)) for declared in side.app.projections]
    with postgres.connect() as reader, postgres.connect() as connection:
        reader.execute(text("SELECT count(*) FROM words"))
        with pytest.raises(Exception, match="lock timeout") as refused:
            take_over(connection, made, 0)
        assert is_locked(refused.value)  # type: ignore[arg-type]
        connection.rollback()
        assert numbers(connection, "Pages", "live") == [1]
        reader.rollback()
        take_over(connection, made, 0)
        assert connection.scalar(text("SHOW lock_timeout")) == "5s"
        connection.commit()
        assert numbers(connection, "Pages", "live") == [2]


def test_a_claim_that_waits_for_a_cut_over_does_not_take_the_retired_generation(postgres: Engine) -> None:
    side = ReadSide(postgres, notebooks("books"))
    with postgres.begin() as connection:
        made = [create(connection, declared, range(4)) for declared in side.app.projections]
    with ThreadPoolExecutor(1) as pool, postgres.connect() as connection, postgres.connect() as watcher:
        take_over(connection, made, 0)
        claimed = pool.submit(claim, postgres, "books", side.app.projections, range(4))
        waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        while watcher.scalar(waits) == 0:
            watcher.rollback()
        connection.commit()
        with pytest.raises(Fenced):
            claimed.result(30)
        epochs = select(checkpoint.c.epoch).where(checkpoint.c.generation == 1).distinct()
        assert connection.scalars(epochs).all() == [FENCE]
    assert {live.number for live in claim(postgres, "books", side.app.projections, range(4)).generations} == {2}


async def test_what_others_have_built_stops_a_rebuild_before_it_begins(
    nats_url: str, fresh_postgres: str, postgres: Engine, app_name: str, tmp_path: Path
) -> None:
    app = notebooks(app_name)
    async with (
        service_of(app, nats_url, fresh_postgres, tmp_path),
        await Client.connect(app, nats=nats_url, database=fresh_postgres) as client,
    ):
        with postgres.begin() as connection:
            connection.execute(text("CREATE VIEW seen AS SELECT last, notes FROM pages"))
        await Rebuild(app, client.log, postgres, app.projections).run()  # the same columns: the view is not in the way
        with postgres.begin() as connection:
            connection.execute(text("CREATE OR REPLACE VIEW pages AS SELECT *, 1 AS strange FROM pages__2"))
            connection.execute(text("CREATE VIEW odd AS SELECT strange FROM pages"))
        steps: list[object] = []
        with pytest.raises(SchemaError, match=r"view pages can't be replaced: it loses .*strange.*view odd"):
            await Rebuild(app, client.log, postgres, app.projections, steps.append).run()
        assert steps == []


def test_a_generation_on_which_others_have_built_is_kept_with_a_warning(
    postgres: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    side = ReadSide(postgres, notebooks("books"))
    (declared, *_) = side.app.projections
    for _ in range(2):
        with postgres.begin() as connection:
            made = create(connection, declared, range(4))
        with postgres.connect() as connection:
            take_over(connection, [made], 0)
            connection.commit()
    with postgres.begin() as connection:
        connection.execute(text("CREATE VIEW direct AS SELECT notes FROM pages__1"))
    assert clean_up(postgres, declared) == []
    assert "pages__1 can't be dropped; these depend on it: view direct" in caplog.text
    with postgres.begin() as connection:
        connection.execute(text("DROP VIEW direct"))
    assert clean_up(postgres, declared) == [1]


async def test_rebuilds_that_begin_together_leave_one_live_generation(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = notebooks(app_name)
    engine = open_database(database_url)
    async with (
        service_of(app, nats_url, database_url, tmp_path),
        await Client.connect(app, nats=nats_url, database=database_url) as client,
    ):
        await client.query("select 1", after=[await client.execute(Notebook, "n", Note("a")) for _ in range(5)])
        rebuilds = (Rebuild(app, client.log, engine, app.projections).run() for _ in range(3))
        ended = await asyncio.gather(*rebuilds, return_exceptions=True)
        failed = [end for end in ended if isinstance(end, BaseException)]
        assert len(failed) < 3
        assert all(isinstance(end, SchemaError) and "took over" in str(end) for end in failed), failed
        after = await client.execute(Notebook, "n", Note("b"))
        assert await client.query("select notes from pages", after=after) == [{"notes": 6}]
        with engine.connect() as connection:
            assert len(numbers(connection, "Pages", "live")) == 1
            assert numbers(connection, "Pages", "building") == []
    engine.dispose()
