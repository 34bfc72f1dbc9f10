"""The whole path on real servers: commands in, rows out, restarts between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from kernel import Client, Receipt, Service, Settings
from kernel.errors import AlreadyRunning, QueryTimeout, Unavailable
from projections import SchemaError
from projections.database import open_database
from projections.tables import dead_letter, stream
from tests.apps import Note, Notebook, Page, bank, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]


def settings(tmp_path: Path, nats_url: str, database_url: str, **more: object) -> Settings:
    return settings_for(tmp_path / "data", nats=nats_url, database=database_url, **more)  # type: ignore[arg-type]


async def note(client: Client, count: int, notebooks: int = 10, text: str = "hello") -> list[Receipt]:
    return await asyncio.gather(*(client.execute(Notebook, f"n{n % notebooks}", Note(text, n)) for n in range(count)))


async def test_rows_tallies_and_statements_follow_the_commands(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        receipts = await note(client, 300)
        pages = await client.query("select * from pages order by notebook", after=receipts)
        assert [page["notes"] for page in pages] == [30] * 10
        assert sum(page["total"] for page in pages) == sum(range(300))
        assert await client.query("select word, times from words") == [{"word": "hello", "times": 300}]
        assert (await client.query("select count(*) as n from lines"))[0]["n"] == 300
    await service.stop()


async def test_projections_are_ordinary_tables_for_sqlalchemy(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await note(client, 20))
    await service.stop()
    engine = open_database(database_url, read_only=True)
    with Session(engine) as session:
        page = session.scalars(select(Page).where(Page.notebook == "n3")).one()
        assert (page.notes, page.total, page.last) == (2, 3 + 13, "hello")
    engine.dispose()


async def test_a_restart_goes_on_where_the_service_stopped(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    for _ in range(3):
        service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
        await service.start()
        async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
            await client.query("select 1", after=await note(client, 100))
            last = await client.query("select sum(notes) as n from pages")
        await service.stop()
    assert last[0]["n"] == 300


async def test_a_query_after_a_receipt_says_how_far_the_projection_got(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        receipt = await client.execute(Notebook, "n", Note("one"))
        future = Receipt(99, receipt.sequence + 1000, receipt.partition, "")
        with pytest.raises(QueryTimeout, match=rf"Pages at {receipt.sequence}"):
            await client.query("select 1", after=future, timeout=0.5)
    await service.stop()


async def test_a_query_cannot_write(nats_url: str, database_url: str, app_name: str, tmp_path: Path) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        with pytest.raises(Exception, match=r"read-?only"):
            await client.query("delete from eskernel_checkpoint")
    await service.stop()


@pytest.mark.parametrize("poison", ["poison row", "poison tally", "poison sql"])
async def test_a_poisoned_aggregate_waits_alone_and_only_for_that_projection(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, poison: str
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        first = await note(client, 50)
        bad = await client.execute(Notebook, "n3", Note(poison))
        after = await note(client, 50)
        counts = {}
        for table, count in (("pages", "sum(notes)"), ("words", "sum(times)"), ("lines", "count(*)")):
            rows = await client.query(f"select {count} as n from {table}", after=[*first, bad, *after])
            counts[table] = rows[0]["n"]
    await service.stop()
    # n3 misses the bad event and the 5 behind it in the poisoned projection; the other projections miss nothing
    missing = {"poison row": "pages", "poison tally": "words", "poison sql": "lines"}[poison]
    assert counts == {table: 101 - (6 if table == missing else 0) for table in counts}
    engine = open_database(database_url, read_only=True)
    with engine.connect() as connection:
        letters = connection.execute(select(dead_letter).order_by(dead_letter.c.sequence)).all()
    engine.dispose()
    assert [letter.aggregate_id for letter in letters] == ["n3"] * 6
    assert [letter.sequence for letter in letters] == list(range(6, 12))
    assert "no such" in letters[0].error
    assert poison.encode() in letters[0].payload


@pytest.mark.parametrize("poison", ["zero \0 word", "zero row"])
async def test_a_row_that_the_database_refuses_stops_no_other_aggregate(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, poison: str
) -> None:
    """A tally's key, and an error's text, with a character that no database accepts."""
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        bad = [await client.execute(Notebook, f"bad{n}", Note(poison)) for n in range(2)]
        after = await note(client, 50)
        assert (await client.query("select times from words where word = 'hello'", after=[*bad, *after])) == [
            {"times": 50}
        ]
        assert (await client.query("select sum(notes) as n from pages where notebook like 'n%'"))[0]["n"] == 50
    assert service.parts.projector.state == "running"
    await service.stop()


async def test_a_tally_that_overflows_parks_the_aggregate_that_caused_it(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, fresh_postgres))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=fresh_postgres) as client:
        bad = [await client.execute(Notebook, f"bad{n}", Note("heavy word")) for n in range(3)]
        after = await note(client, 50)
        words = await client.query("select word, times from words order by word", after=[*bad, *after])
        assert {"word": "hello", "times": 50} in words
    await service.stop()


async def test_quiet_partitions_move_up_under_steady_load(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    stop = asyncio.Event()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:

        async def load() -> None:
            while not stop.is_set():
                await client.execute(Notebook, "always the same", Note("hello"))

        async def lowest() -> bool:
            rows = await client.query("select min(sequence) as n from eskernel_checkpoint")
            return rows[0]["n"] > 100

        loading = asyncio.create_task(load())
        await wait_until(lowest, timeout=30)
        stop.set()
        await loading
    await service.stop()


async def test_parked_aggregates_stay_parked_over_a_restart(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    for text in ("poison row", "fine"):
        service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
        await service.start()
        async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
            receipts = [await client.execute(Notebook, "bad", Note(text)), *await note(client, 10)]
            pages = await client.query("select * from pages where notebook = 'bad'", after=receipts)
        await service.stop()
    assert pages == []
    engine = open_database(database_url, read_only=True)
    with engine.connect() as connection:
        letters = connection.execute(
            select(dead_letter.c.sequence, dead_letter.c.error).order_by(dead_letter.c.id)
        ).all()
    engine.dispose()
    # the second one waits behind the first one, and not because it does not follow on what is in the table
    assert [tuple(letter) for letter in letters] == [(1, "ValueError: no such page"), (2, "ValueError: no such page")]


async def test_garbage_on_the_stream_is_kept_aside_and_stops_nothing(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.log.append(client.log.subjects.address("Notebook", "x").subject, 0, b"\x00garbage")
        await client.log.append(f"{app_name}.evt.1.Nobody.x", 0, b"[]")
        receipts = await note(client, 20)
        rows = await client.query("select sum(notes) as n from pages", after=receipts)
        assert rows[0]["n"] == 20
    await service.stop()
    engine = open_database(database_url, read_only=True)
    with engine.connect() as connection:
        kept = connection.execute(select(dead_letter.c.payload).where(dead_letter.c.projection == "")).scalars().all()
    engine.dispose()
    assert sorted(kept) == [b"\x00garbage", b"[]"]


async def test_a_second_service_takes_its_share_and_gives_it_back_when_it_stops(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    first = Service(notebooks(app_name), settings(tmp_path / "1", nats_url, database_url))
    second = Service(notebooks(app_name), settings(tmp_path / "2", nats_url, database_url))
    await first.start()
    await second.start()
    async with await Client.connect(first.app, nats=nats_url, database=database_url) as client:
        await wait_until(lambda: [len(service.status()["partitions"]) for service in (first, second)] == [32, 32])
        rows = await client.query("select sum(notes) as n from pages", after=await note(client, 200))
        assert rows[0]["n"] == 200
        await second.stop()
        await wait_until(lambda: len(first.status()["partitions"]) == 64)
        rows = await client.query("select sum(notes) as n from pages", after=await note(client, 200))
        assert rows[0]["n"] == 400
    await first.stop()


async def test_a_data_directory_has_one_service(nats_url: str, app_name: str, tmp_path: Path) -> None:
    first = Service(bank(app_name), settings_for(tmp_path, nats=nats_url))
    await first.start()
    with pytest.raises(AlreadyRunning, match="--data"):
        await Service(bank(app_name), settings_for(tmp_path, nats=nats_url)).start()
    await first.stop()
    again = Service(bank(app_name), settings_for(tmp_path, nats=nats_url))
    await again.start()
    await again.stop()


async def test_a_database_folded_from_another_stream_is_refused(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await note(client, 10))
    await service.stop()
    engine = open_database(database_url)
    with engine.begin() as connection:
        connection.execute(stream.update().values(created="long ago", digest="0" * 64))
    engine.dispose()
    with pytest.raises(SchemaError, match="is another one"):
        await Service(notebooks(app_name), settings(tmp_path, nats_url, database_url)).start()


async def test_a_truncated_log_is_noticed_at_start(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings(tmp_path, nats_url, database_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url, database=database_url) as client:
        await client.query("select 1", after=await note(client, 10))
    await service.stop()
    engine = open_database(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE eskernel_checkpoint SET sequence = 5000")
    engine.dispose()
    with pytest.raises(SchemaError, match="truncated, or restored"):
        await Service(notebooks(app_name), settings(tmp_path, nats_url, database_url)).start()


async def test_health_and_metrics_are_served(nats_url: str, app_name: str, tmp_path: Path) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url))
    await service.start()
    async with aiohttp.ClientSession() as http:
        for path, text in (("/healthz", "alive"), ("/readyz", '"ready":true'), ("/metrics", "eskernel_actors_live")):
            async with http.get(service.http.url + path) as answer:
                assert answer.status == 200
                assert text in await answer.text()
    await service.stop()


async def test_the_same_service_runs_on_an_older_server(old_nats_url: str, app_name: str, tmp_path: Path) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=old_nats_url))
    await service.start()
    async with await Client.connect(service.app, nats=old_nats_url, database=service.database_url) as client:
        rows = await client.query("select sum(notes) as n from pages", after=await note(client, 300))
        assert rows[0]["n"] == 300
    await service.stop()


async def test_a_connection_closed_for_good_ends_the_service_with_a_reason(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(bank(app_name), settings_for(tmp_path, nats=nats_url))
    await service.start()
    # as nats-py does after some of the server's errors
    await service.parts.connection.close()
    async with asyncio.timeout(10):
        await service.stopped.wait()
    assert "closed for good" in service.failure
    await service.stop()


async def test_a_server_that_is_not_there_is_named(app_name: str, tmp_path: Path) -> None:
    with pytest.raises((ConnectionError, Unavailable), match=r"nats://127\.0\.0\.1:9"):
        await Service(bank(app_name), settings_for(tmp_path, nats="nats://127.0.0.1:9")).start()
