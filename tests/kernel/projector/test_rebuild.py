"""Rebuilding by replay, beside a running service."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect

from kernel import Client, Service
from kernel.app import App
from kernel.projector.rebuild import Rebuild, clean_up
from kernel.projector.replay import RebuildProgress
from kernel.settings import DeadLetters
from projections import Rows, TooManyFailures, applies
from projections.database import open_database
from tests.apps import Lines, Note, Notebook, Noted, Page, Words, notebooks
from tests.conftest import settings_for

TABLES = {"Pages": "select * from pages order by 1", "Words": "select * from words order by 1",
          "Lines": "select * from lines order by 1, 2"}  # fmt: skip


async def start(nats_url: str, database_url: str, tmp_path: Path, app: App) -> Service:
    service = Service(app, settings_for(tmp_path / "data", nats=nats_url, database=database_url))
    await service.start()
    return service


async def fill(client: Client, count: int, text: str = "hello") -> list[object]:
    return await asyncio.gather(*(client.execute(Notebook, f"n{n % 20}", Note(text, n)) for n in range(count)))


@pytest.mark.parametrize("name", ["Pages", "Words", "Lines"])
async def test_a_rebuild_gives_the_same_rows(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, name: str
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    steps: list[RebuildProgress] = []
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        before = await client.query(TABLES[name], after=await fill(client, 500))  # type: ignore[arg-type]
        (built,) = await Rebuild(service.app, client.log, engine, [service.app.projection(name)], steps.append).run()
        assert await client.query(TABLES[name]) == before
        assert (built.generation, built.events, built.parked) == (2, 500, 0)
        assert steps[-1].done == steps[-1].total > 0
        assert steps[-1].events == 500
    engine.dispose()
    await service.stop()


async def test_a_build_that_fails_at_many_aggregates_changes_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        before = await client.query(TABLES["Pages"], after=await fill(client, 40))  # type: ignore[arg-type]

        class Pages(Rows[Page], of=Notebook, version=2):
            @applies
            def noted(self, page: Page, event: Noted) -> None:
                if event.number % 20 < 8:
                    raise ValueError(f"no page {event.number}")
                page.notes += 1

        bad = App(app_name, aggregates=[Notebook], projections=[Pages])
        limits = DeadLetters(pause_minimum=8, pause_above=0.25)
        passing = App(app_name, aggregates=[Notebook], projections=[Pages], transient=[ValueError])
        (built,) = await Rebuild(passing, client.log, engine, passing.projections, limits=limits).run()
        assert built.parked == 8
        before = await client.query(TABLES["Pages"])
        with pytest.raises(
            TooManyFailures, match=r"Pages fails at 8 of 20 aggregates, such as Notebook n\d: ValueError"
        ):
            await Rebuild(bad, client.log, engine, bad.projections, limits=limits).run()
        assert await client.query(TABLES["Pages"]) == before
        for more in (DeadLetters(pause_minimum=9, pause_above=0.25), DeadLetters(pause_minimum=8, pause_above=0.4)):
            (built,) = await Rebuild(bad, client.log, engine, bad.projections, limits=more).run()
            assert built.parked == 8
    engine.dispose()
    await service.stop()


async def test_the_service_goes_on_with_the_new_copy_after_the_cut_over(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        for round_ in range(1, 4):
            await fill(client, 100)
            for declared in service.app.projections:
                await Rebuild(service.app, client.log, engine, [declared]).run()
                clean_up(engine, declared)
            after = await fill(client, 100)
            pages = await client.query("select sum(notes) as n from pages", after=after)  # type: ignore[arg-type]
            words = await client.query("select times from words")
            lines = await client.query("select count(*) as n from lines")
            assert (pages[0]["n"], words[0]["times"], lines[0]["n"]) == (round_ * 200,) * 3
    engine.dispose()
    await service.stop()


async def test_a_rebuild_under_load_misses_and_doubles_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    sent = 0
    stop = asyncio.Event()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:

        async def load(lane: int) -> None:
            nonlocal sent
            while not stop.is_set():
                await client.execute(Notebook, f"n{lane}", Note("hello", 1))
                sent += 1

        async with asyncio.TaskGroup() as group:
            for lane in range(20):
                group.create_task(load(lane))
            for _ in range(2):
                await Rebuild(service.app, client.log, engine, service.app.projections).run()
            stop.set()
        last = await fill(client, 20)
        pages = await client.query("select sum(notes) as n from pages", after=last)  # type: ignore[arg-type]
        words = await client.query("select times from words")
        lines = await client.query("select count(*) as n from lines")
        assert (pages[0]["n"], words[0]["times"], lines[0]["n"]) == (sent + 20,) * 3
    engine.dispose()
    await service.stop()


def generations(engine: Engine, table: str) -> list[str]:
    return sorted(name for name in inspect(engine).get_table_names() if name.startswith(f"{table}__"))


async def test_a_raised_version_is_built_at_start_and_the_old_tables_are_kept_once(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await fill(client, 100))  # type: ignore[arg-type]
    await service.stop()

    class Longer(Rows[Page], of=Notebook, version=2, name="Pages"):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            row.notes += 10

    app = App(app_name, aggregates=[Notebook], projections=[Longer, Words, Lines])
    service = await start(nats_url, database_url, tmp_path, app)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        after = await fill(client, 1)
        rows = await client.query("select sum(notes) as n from pages", after=after)  # type: ignore[arg-type]
        assert rows[0]["n"] == 1010
    await service.stop()
    engine = open_database(database_url)
    assert generations(engine, "pages") == ["pages__1", "pages__2"]
    assert generations(engine, "words") == ["words__1"]
    engine.dispose()


async def test_a_new_projection_on_an_old_log_is_filled_at_start(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    first = App(app_name, aggregates=[Notebook], projections=[Words])
    service = await start(nats_url, database_url, tmp_path, first)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await fill(client, 100))  # type: ignore[arg-type]
    await service.stop()
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        assert (await client.query("select sum(notes) as n from pages"))[0]["n"] == 100
        assert (await client.query("select times from words"))[0]["times"] == 100
    await service.stop()


async def test_a_rebuild_parks_what_the_live_projection_parked(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await fill(client, 60)
        for kind in ("row", "tally", "sql"):
            await client.execute(Notebook, "n3", Note(f"poison {kind}"))
        last = await fill(client, 60)
        before = {name: await client.query(sql, after=last) for name, sql in TABLES.items()}
        for declared in service.app.projections:
            (built,) = await Rebuild(service.app, client.log, engine, [declared]).run()
            assert built.parked == 1
        after = {name: await client.query(sql) for name, sql in TABLES.items()}
        assert after == before
    engine.dispose()
    await service.stop()


async def test_a_rebuild_that_breaks_off_changes_nothing_and_the_next_one_cleans_up(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = await start(nats_url, database_url, tmp_path, notebooks(app_name))
    engine = open_database(database_url)
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        before = await client.query(TABLES["Pages"], after=await fill(client, 100))  # type: ignore[arg-type]

        def interrupt(_: RebuildProgress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await Rebuild(service.app, client.log, engine, [service.app.projection("Pages")], interrupt).run()
        assert await client.query(TABLES["Pages"]) == before
        await Rebuild(service.app, client.log, engine, [service.app.projection("Pages")]).run()
        assert await client.query(TABLES["Pages"]) == before
        assert generations(engine, "pages") == ["pages__1", "pages__2"]
    engine.dispose()
    await service.stop()
