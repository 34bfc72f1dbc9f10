"""Single rows are compared with their aggregates' events: a sample by a person, and some rows all the time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from aggregates import Aggregate, applies
from kernel import App, Client, Service
from kernel.projector.sampling import TablePatrol, verify_sample
from kernel.telemetry.metrics import ROWS_COMPARED
from projections import Rows, SchemaError, dead_letters, exclusions
from projections.row_codec import RowCodec
from tests.apps import Note, Notebook, Noted, Page, Weigh, notebooks
from tests.conftest import settings_for
from tests.kernel.projector.test_table_verification import Running, running

Wait = Callable[..., Coroutine[Any, Any, None]]


@pytest.fixture
async def here(nats_url: str, database_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(notebooks(app_name), nats_url, database_url, tmp_path) as found:
        yield found


async def test_a_sample_finds_rows_that_are_not_what_the_log_says(here: Running) -> None:
    await here.note(100)
    pages = here.app.projection("Pages")
    table = await verify_sample(here.app, here.client.log, here.engine, pages, 15)
    assert (table.view, table.rows, table.differing) == ("pages", 15, 0)
    here.change("update pages__1 set notes = 3, total = 69 where notebook = 'n3'")
    with here.engine.begin() as connection:
        connection.execute(text("insert into pages__1 (notebook, notes, total) values ('nobody', 1, 1)"))
    table = await verify_sample(here.app, here.client.log, here.engine, pages, 100)
    assert (table.rows, table.changed, table.extra) == (21, 1, 1)
    found = {example.what: example for example in table.examples}
    assert found["changed"].key == {"notebook": "n3"}
    assert (found["changed"].stored, found["changed"].since) == ({"notes": 3, "total": 69}, 4)
    assert found["extra"].key == {"notebook": "nobody"}


async def test_each_row_is_compared_at_its_own_place(here: Running) -> None:
    await here.note(40)
    await here.note(1, "poison row", to="n3")
    await here.note(1, "more", to="n3")
    pages = here.app.projection("Pages")
    assert (await verify_sample(here.app, here.client.log, here.engine, pages, 100)).differing == 0
    plan = exclusions.plan_of(here.app.plan(here.engine.dialect), "Pages")
    dead_letters.skip(here.engine, plan, "Notebook", "n3", "test", "it can't be folded")
    dead_letters.retry(here.engine, plan, "Pages", "Notebook", "n3", None)
    assert (await verify_sample(here.app, here.client.log, here.engine, pages, 100)).differing == 0
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            await here.note(20)

    loading = asyncio.create_task(load())
    for _ in range(5):
        assert (await verify_sample(here.app, here.client.log, here.engine, pages, 20)).differing == 0
    stop.set()
    await loading


async def test_a_tally_can_not_be_sampled(here: Running) -> None:
    with pytest.raises(SchemaError, match="Words is a Tallies projection.*without --sample"):
        await verify_sample(here.app, here.client.log, here.engine, here.app.projection("Words"), 1)


async def test_the_patrol_comes_to_every_row_and_begins_again(here: Running) -> None:
    await here.note(100)
    here.change("update pages__1 set total = 7 where notebook = 'n7'")

    def counted(outcome: str) -> float:
        return ROWS_COMPARED.labels(projection="Pages", outcome=outcome)._value.get()

    patrol = TablePatrol(here.app, here.client.log, here.engine, 6)
    same, differs = counted("same"), counted("differs")
    for _ in range(4):
        await patrol.compare_rows()
    assert (counted("same") - same, counted("differs") - differs) == (19, 1)
    for _ in range(4):
        await patrol.compare_rows()
    assert (counted("same") - same, counted("differs") - differs) == (38, 2)


async def test_a_row_that_can_not_be_read_is_named_and_hides_no_other(
    here: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await here.note(100)
    real = RowCodec.stored

    def stored(codec: RowCodec, values: Sequence[Any]) -> Any:
        if values[0] == "n4":
            raise ValueError("no such moment")
        return real(codec, values)

    monkeypatch.setattr(RowCodec, "stored", stored)
    counted = ROWS_COMPARED.labels(projection="Pages", outcome="same")._value
    before = counted.get()
    patrol = TablePatrol(here.app, here.client.log, here.engine, 6)
    for _ in range(4):
        await patrol.compare_rows()
    assert counted.get() - before == 19
    assert "Pages: the row of Notebook n4 can't be read: ValueError: no such moment" in caplog.text
    with pytest.raises(SchemaError, match="the row of Notebook n4 can't be read"):
        await verify_sample(here.app, here.client.log, here.engine, here.app.projection("Pages"), 100)


async def test_a_row_that_a_newer_program_has_folded_is_no_difference(here: Running, app_name: str) -> None:
    await here.note(40)
    receipt = await here.client.execute(Notebook, "n3", Weigh("1"))
    await here.client.query("select 1", after=receipt)

    class Older(Aggregate, name="Notebook"):
        @applies
        def noted(self, event: Noted) -> None: ...

    class Pages(Rows[Page], of=Older):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            row.notes += 1
            row.total += event.number
            row.last = event.text

    old = App(app_name, aggregates=[Older], projections=[Pages])
    table = await verify_sample(old, here.client.log, here.engine, old.projection("Pages"), 100)
    assert (table.rows, table.differing) == (20, 0)


@pytest.mark.setting("verification.interval", "verification.rows")
@pytest.mark.parametrize(("interval", "found"), [(0.05, True), (0, False)])
async def test_the_service_compares_rows_all_the_time(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, caplog: pytest.LogCaptureFixture, interval: float,
    found: bool,
) -> None:  # fmt: skip
    settings = settings_for(tmp_path / "data", nats=nats_url, verification__interval=interval, verification__rows=2)
    async with Service(notebooks(app_name), settings) as service:
        async with await Client.connect(service.app, nats=nats_url, database=service.database_url) as client:
            receipts = [await client.execute(Notebook, f"n{number}", Note("a")) for number in range(5)]
            await client.query("select 1", after=receipts)
        counted = ROWS_COMPARED.labels(projection="Pages", outcome="same")._value
        if not found:
            assert "compare_rows" not in service.scheduler.jobs
            return
        job = service.scheduler.jobs["compare_rows"]
        runs, before = job.runs, counted.get()
        await wait_until(lambda: counted.get() - before > 5)
        # all five rows at each run, if the number were ignored
        assert counted.get() - before <= 2 * (job.runs + 1 - runs)
        with service.parts.engine.begin() as connection:
            connection.execute(text("update pages__1 set total = 7 where notebook = 'n4'"))
        await wait_until(lambda: "the row of Notebook n4 is not what the log says" in caplog.text)
        assert "`eskernel rebuild --aggregate Notebook/n4` makes this row again" in caplog.text
