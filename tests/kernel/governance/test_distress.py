"""Rate governance on running services: lanes that slow down while the database or the log is slow, and recover."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from kernel import Client
from kernel.governance.remote_pace import following
from kernel.log.subjects import subjects_of
from kernel.projector.rebuild import Rebuild
from kernel.transport.dial import connect
from projections.database import open_database
from tests.apps import Note, Notebook
from tests.conftest import settings_for
from tests.failing import Wait, metric, running

SPELL_S = float(os.environ.get("SLOW_DATABASE_S", "3"))
"""Seconds for which the database is slow; a longer run may use 30."""


@contextmanager
def slowed(url: str, table: str, seconds: float) -> Iterator[None]:
    """Let PostgreSQL delay every statement that writes a table."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(f"CREATE TRIGGER doze AFTER INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION doze()")
        )
        yield
        connection.execute(text("DROP FUNCTION doze CASCADE"))
    engine.dispose()


@pytest.mark.setting("rates.live.rate", "rates.live.burst")
async def test_the_live_lane_holds_up_projecting_and_not_the_end(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    before = metric("eskernel_throttled_seconds_total", lane="live")
    async with running(app_name, tmp_path, nats_url, rates__live={"rate": 20.0, "burst": 20.0}) as here:
        receipts = await here.note(100, ids=100)
        await here.client.query("select 1", after=receipts, timeout=30)
        assert metric("eskernel_throttled_seconds_total", lane="live") > before
        here.service.parts.governor.answer(b'{"overrides":{"live.rate":0.001,"live.burst":1},"at":1}')
        await here.note(30, ids=30)
        projector = here.service.parts.projector
        assert projector.position < max(receipt.sequence for receipt in receipts) + 30
        async with asyncio.timeout(10):
            await here.service.stop()


async def loaded(client: Client, stop: asyncio.Event) -> int:
    """Until `stop` is set, send ten commands at a time and wait for their projection; return how many."""
    sent = 0
    while not stop.is_set():
        work = (client.execute(Notebook, f"n{n}", Note("a"), timeout=60) for n in range(10))
        await client.query("select 1", after=await asyncio.gather(*work), timeout=60)
        sent += 10
    return sent


ADAPTING = {
    "rates__commit_latency": 0.25, "rates__decrease": 0.3, "rates__increase": 0.5, "rates__minimum": 20.0,
}  # fmt: skip


@pytest.mark.setting("rates.commit_latency", "rates.decrease", "rates.increase")
async def test_a_slow_database_slows_the_projections_until_it_recovers(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    async with running(app_name, tmp_path, nats_url, fresh_postgres, **ADAPTING) as here:
        governor = here.service.parts.governor
        lanes = governor.lanes
        stop = asyncio.Event()
        loading = asyncio.ensure_future(loaded(here.client, stop))
        with slowed(fresh_postgres, "pages__1", 0.5):
            end = time.monotonic() + SPELL_S
            await wait_until(lambda: lanes["live"].rate and lanes["rebuild"].rate)
            assert "rates.commit_latency" in lanes["live"].why
            assert lanes["commands"].rate is None or "commit" not in lanes["commands"].why
            await wait_until(lambda: lanes["live"].present == 20)
            assert metric("eskernel_rate_present", lane="live") == 20
            await wait_until(lambda: time.monotonic() >= end, timeout=SPELL_S + 15)
        began = last_slow = time.monotonic()

        def back() -> bool:
            nonlocal last_slow
            if metric("eskernel_rate_present", lane="rebuild") == 20:
                last_slow = time.monotonic()  # the last slow transactions end after the slow period
            return lanes["live"].present is None and lanes["rebuild"].present is None

        await wait_until(back, timeout=60)
        took = {"from_end_of_spell": time.monotonic() - began, "from_last_distress": time.monotonic() - last_slow}
        for name, seconds in took.items():
            record_property(f"recovery_{name}", round(seconds, 1))
        print(f"a slow period of {SPELL_S:g} s; the lanes were back, in seconds: {took}")
        stop.set()
        sent = await loading
        last = [await here.client.execute(Notebook, f"n{n}", Note("a")) for n in range(10)]
        rows = await here.client.query("select sum(notes) as n from pages", after=last, timeout=60)
        assert rows == [{"n": sent + 10}]


async def test_a_rebuild_gives_way_to_a_slow_live_projection(
    nats_url: str, fresh_postgres: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, fresh_postgres, **ADAPTING) as here:
        governor = here.service.parts.governor
        await here.client.query("select 1", after=await here.note(600, ids=600))
        engine = open_database(fresh_postgres)
        subjects = subjects_of(app_name, here.service.settings)
        stop = asyncio.Event()
        with ExitStack() as unslow:
            unslow.enter_context(slowed(fresh_postgres, "pages__1", 0.5))
            loading = asyncio.ensure_future(loaded(here.client, stop))
            await wait_until(lambda: governor.lanes["rebuild"].present == 20)
            async with following(here.client.connection, subjects, here.service.settings.rates.rebuild) as pace:
                assert pace.bucket.rate == 20
                rebuilding = asyncio.ensure_future(
                    Rebuild(here.service.app, here.client.log, engine, here.service.app.projections, pace=pace).run()
                )
                await wait_until(lambda: pace.done > 0)
                # new events are projected long before the rebuild has finished the old ones
                await here.client.query("select 1", after=await here.note(1), timeout=30)
                assert not rebuilding.done()
                assert pace.done < 600
                unslow.close()
                stop.set()
                sent = await loading
                await wait_until(lambda: pace.bucket.rate is None)
                await asyncio.wait_for(rebuilding, 60)
        rows = await here.client.query("select sum(notes) as n from pages", after=await here.note(1))
        assert rows == [{"n": 600 + sent + 2}]
        engine.dispose()


@pytest.mark.setting("rates.rebuild.rate")
async def test_an_unlimited_rebuild_goes_as_fast_as_it_can(nats_url: str, app_name: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, nats=nats_url, rates__rebuild={"rate": 5.0})
    connection = await connect(nats_url, name="rebuild")
    try:
        async with following(connection, subjects_of(app_name, settings), settings_for(tmp_path).rates.rebuild) as pace:
            assert pace.bucket.rate is None
            assert await pace.room(10**6) == 10**6
        async with following(connection, subjects_of(app_name, settings), settings.rates.rebuild) as pace:
            assert pace.bucket.rate == 5, "no rebuild runs, but the settings give the rate"
    finally:
        await connection.close()


@pytest.mark.setting("rates.append_latency")
async def test_a_log_that_takes_its_time_slows_the_commands(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, rates__append_latency=0.05, rates__increase=0.5) as here:
        service = here.service
        append = service.parts.log.append

        def late(subject: str, expected: int, payload: bytes, links: bytes) -> asyncio.Future[int]:
            later: asyncio.Future[int] = asyncio.get_running_loop().create_future()

            def hand_on() -> None:
                append(subject, expected, payload, links).add_done_callback(
                    lambda done: later.set_result(done.result())
                )

            asyncio.get_running_loop().call_later(0.1, hand_on)
            return later

        service.parts.log.append = late  # type: ignore[method-assign]
        stop = asyncio.Event()
        loading = asyncio.ensure_future(loaded(here.client, stop))
        lane = service.parts.governor.lanes["commands"]
        await wait_until(lambda: lane.rate is not None)
        assert "rates.append_latency" in lane.why
        assert service.parts.governor.limiting
        service.parts.log.append = append  # type: ignore[method-assign]
        await wait_until(lambda: lane.rate is None, timeout=60)
        stop.set()
        await loading
