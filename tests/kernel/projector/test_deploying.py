"""Old and new programs side by side: each keeps its own tables right, commands go on, and readers see one version."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text

from kernel import Client
from kernel.errors import NotProjected
from kernel.preparation import Preparation
from kernel.projector import deployment, rollback
from kernel.projector.rollback import roll_back
from projections import NotReproducible, SchemaError, checkpoints
from projections.database import open_database
from projections.following import fence_all
from projections.schema import drop_version
from tests.conftest import settings_for
from tests.ledgers import Pay, Purse, Refund, ledger

Run = Callable[..., Any]


def ask(url: str, sql: str) -> list[Any]:
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql))]
    finally:
        engine.dispose()


def live(url: str) -> tuple[int, int]:
    """Version and generation of the balances that readers see."""
    ((version, number),) = ask(
        url, "SELECT version, generation FROM eskernel_projection WHERE name = 'Balances' AND state = 'live'"
    )
    return version, number


async def pay(client: Client, count: int, names: int = 1_000) -> Any:
    return await asyncio.gather(*(client.execute(Purse, f"p{n % names}", Pay(n)) for n in range(count)))


async def test_each_program_keeps_its_own_tables_right_and_readers_see_the_newer(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    everything = "SELECT * FROM balances ORDER BY purse LIMIT 1"
    async with run(ledger(app_name), "old") as old:
        await client.query("SELECT 1", after=await pay(client, 50))
        for _ in range(8):  # so often that a driver would have the server prepare the query
            assert [*(await client.query(everything))[0]] == ["purse", "cents"]
        async with run(ledger(app_name, 2), "new") as new:
            assert [*(await client.query(everything))[0]] == ["purse", "cents", "payments"]
            await wait_until(lambda: old.partitions and new.partitions and old.status()["deployment"]["mixed"])
            assert live(database_url) == (2, 2)
            receipts = await pay(client, 100, 24)
            rows = await client.query("SELECT purse, cents, payments FROM balances ORDER BY purse", after=receipts)
            assert sum(row["payments"] for row in rows) == 150

            def same() -> bool:
                kept = ask(database_url, "SELECT purse, cents FROM balances__1 ORDER BY purse")
                return kept == [(row["purse"], row["cents"]) for row in rows]

            await wait_until(same)
            assert ask(database_url, "SELECT sum(times) FROM volumes") == [(150,)]
        # the new program is gone: the old one does not take the view back, also not after a restart
        await wait_until(lambda: len(old.partitions) == 8)
    async with run(ledger(app_name), "old") as old:
        assert live(database_url) == (2, 2)
        assert old.status()["deployment"]["behind"] == {"Balances": 2}
        (receipt,) = await pay(client, 1)
        with pytest.raises(NotProjected, match="readers see version 2 of Balances, and no running program keeps it"):
            await client.query("SELECT 1", after=receipt)
        await client.query("SELECT 1", after=receipt, projections=["Volumes"])
    # nor does it where its own tables are gone
    engine = open_database(database_url)
    drop_version(engine, "Balances", 1, ledger(app_name, 2).projections)
    engine.dispose()
    async with run(ledger(app_name), "old"):
        assert live(database_url) == (2, 2)


async def test_a_long_build_goes_on_behind_commands_and_over_restarts(
    run: Run,
    client: Client,
    app_name: str,
    database_url: str,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(deployment, "AT_START", 0)
    async with run(ledger(app_name), "old"):
        for _ in range(3):  # the later events of each row are folded after the restarts
            await pay(client, 100)
    slow = {"rates__rebuild__rate": 100.0, "rates__rebuild__burst": 20.0}
    done = 0
    for _ in range(2):
        async with run(ledger(app_name, 2), "new", **slow) as new:
            (receipt,) = await pay(client, 1)
            with pytest.raises(NotProjected, match=r"no running program keeps it up to date. Balances: building, "):
                await client.query("SELECT 1", after=receipt, projections=["Balances"])
            further = done + 40
            await wait_until(lambda: new.status()["deployment"]["build"]["done"] > further)  # noqa: B023 - called here
            build = new.status()["deployment"]["build"]
            assert (build["phase"], build["projections"]) == ("building", ("Balances",))
            assert build["eta"] is not None
            assert (REGISTRY.get_sample_value("eskernel_build_commits_left") or 0) > 0
            assert new.health.ready
            done = build["done"]
        assert live(database_url) == (1, 1)
    async with run(ledger(app_name, 2), "new") as new:
        await wait_until(lambda: new.status()["deployment"]["build"] is None)
        assert caplog.text.count("going on with the build of Balances") == 2
        assert "begins again" not in caplog.text
        assert live(database_url) == (2, 2), "the unfinished generation was gone on with"
        rows = await client.query(
            "SELECT sum(payments) AS n, sum(cents) AS c FROM balances", after=await pay(client, 1)
        )
        assert rows == [{"n": 303, "c": 3 * sum(range(100))}]


async def test_a_build_of_which_nothing_gets_done_is_reported(
    run: Run, client: Client, app_name: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "AT_START", 0)
    monkeypatch.setattr(deployment, "STALLED_S", 0.3)
    async with run(ledger(app_name), "old"):
        await pay(client, 100)
    crawling = {"rates__rebuild__rate": 1.0, "rates__rebuild__burst": 1.0, "connection__health_check_interval": 0.5}
    async with run(ledger(app_name, 2), "new", **crawling) as new:
        builds = new.health.components["builds"]
        await wait_until(lambda: not builds.ok and "nothing was done for" in builds.detail)
        await pay(client, 1)


async def test_a_build_of_other_code_is_not_gone_on_with(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "AT_START", 0)
    async with run(ledger(app_name), "old"):
        await pay(client, 300)
    slow = {"rates__rebuild__rate": 50.0, "rates__rebuild__burst": 10.0}
    async with run(ledger(app_name, 2, arbitrary=True), "new", **slow) as new:
        await wait_until(lambda: new.status()["deployment"]["build"]["done"] > 20)
    async with run(ledger(app_name, 2), "new", deployment__verify=False) as new:
        await wait_until(lambda: new.status()["deployment"]["build"] is None)
        assert live(database_url)[0] == 2
        assert (await client.query("SELECT sum(cents) AS c FROM balances"))[0]["c"] == sum(range(300))


@pytest.mark.setting("deployment.verify")
async def test_what_a_second_fold_does_not_confirm_is_not_shown(
    run: Run, client: Client, app_name: str, database_url: str
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 10)
    with pytest.raises(NotReproducible, match=r"different rows of Balances: \d+ of balances differ, .*\(cents\)"):
        await run(ledger(app_name, 2, arbitrary=True), "new").start()
    assert live(database_url) == (1, 1)
    async with run(ledger(app_name, 2, arbitrary=True), "new", deployment__verify=False):
        assert live(database_url)[0] == 2


async def test_a_failing_build_is_reported_and_the_service_goes_on(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 10)
    monkeypatch.setattr(deployment, "AT_START", 0)
    async with run(ledger(app_name, 2, arbitrary=True), "new") as new:
        await wait_until(lambda: not new.health.components["builds"].ok and new.health.components["builds"].since)
        assert "different rows of Balances" in new.health.components["builds"].detail
        assert not new.health.ready
        await pay(client, 1)
        assert live(database_url) == (1, 1)


async def test_commands_of_the_newer_program_reach_it_or_are_ridden_out(
    run: Run, client: Client, app_name: str, wait_until: Any, nats_url: str, database_url: str
) -> None:
    newest = ledger(app_name, 2, newer_events=True)
    async with run(ledger(app_name), "old") as old, run(newest, "new") as new:
        await wait_until(lambda: old.partitions and new.partitions and old.status()["deployment"]["mixed"])
        async with await Client.connect(newest, nats=nats_url, database=database_url) as newer:
            asked = [asyncio.ensure_future(newer.execute(Purse, f"p{n}", Refund(n))) for n in range(16)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            await old.stop()
            await asyncio.gather(*asked)


async def test_what_was_prepared_is_shown_as_soon_as_its_program_starts(
    run: Run,
    client: Client,
    app_name: str,
    database_url: str,
    nats_url: str,
    tmp_path: Path,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment, "AT_START", 500)
    settings = settings_for(tmp_path / "unused", nats=nats_url, database=database_url)
    async with run(ledger(app_name), "old"):
        await pay(client, 600)
        told: list[Any] = []
        preparing = asyncio.ensure_future(Preparation(ledger(app_name, 2), settings, told.append).run())
        await wait_until(lambda: preparing.done() or (told and told[-1] is None))
        await pay(client, 10)
        assert live(database_url) == (1, 1)
        # it is kept up to date, beside what readers see
        await wait_until(lambda: ask(database_url, "SELECT sum(payments) FROM balances__2") == [(610,)])
        assert not preparing.done()
        async with run(ledger(app_name, 2), "new"):
            assert live(database_url) == (2, 2)
            assert await asyncio.wait_for(preparing, 20) is True
            rows = await client.query("SELECT sum(payments) AS n FROM balances", after=await pay(client, 1))
            assert rows == [{"n": 611}]


async def test_a_preparation_goes_on_where_the_one_before_was_stopped(
    run: Run,
    client: Client,
    app_name: str,
    database_url: str,
    nats_url: str,
    tmp_path: Path,
    wait_until: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    slow = {"rates__rebuild__rate": 100.0, "rates__rebuild__burst": 20.0}
    async with run(ledger(app_name), "old", **slow):
        await pay(client, 200)
        settings = settings_for(tmp_path / "unused", nats=nats_url, database=database_url)
        told: list[Any] = []
        preparing = asyncio.ensure_future(Preparation(ledger(app_name, 2), settings, told.append).run())
        await wait_until(lambda: preparing.done() or (told and told[-1] is not None and told[-1].done > 60))
        preparing.cancel()
        await asyncio.wait({preparing})
        assert await Preparation(ledger(app_name, 2), settings).run(follow=False) is False
        assert "going on with the build of Balances" in caplog.text
    async with run(ledger(app_name, 2), "new"):
        assert live(database_url) == (2, 2)
        assert await client.query("SELECT sum(payments) AS n FROM balances") == [{"n": 200}]


async def test_a_rollback_shows_the_version_before_where_readers_are_and_back_again(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_app, new_app = ledger(app_name), ledger(app_name, 2)
    async with run(old_app, "old", connection__health_check_interval=0.5) as old:
        await pay(client, 30)
        async with run(new_app, "new") as new:
            engine, log = new.parts.engine, new.parts.log
            await wait_until(lambda: old.status()["deployment"]["mixed"])
            # whichever program the operator has at hand: the old one follows its version
            for app in (new_app, old_app):
                back = await roll_back(app, log, engine, "Balances")
                assert (back.version, back.before) == (1, 2)
                await wait_until(lambda: old.status()["deployment"]["behind"] == {})
                assert live(database_url) == (1, 1)
                receipts = await pay(client, 20, 5)
                await client.query("SELECT 1", after=receipts)
                assert ask(database_url, "SELECT sum(cents) FROM balances") == ask(
                    database_url, "SELECT sum(cents * times) FROM volumes"
                )
                again = await roll_back(app, log, engine, "Balances")
                assert (again.version, live(database_url)) == (2, (2, 2))
                await wait_until(lambda: old.status()["deployment"]["behind"] == {"Balances": 2})
                rows = await client.query("SELECT sum(cents) AS c FROM balances", after=await pay(client, 20, 5))
                assert rows == await client.query("SELECT sum(cents * times) AS c FROM volumes")
            await old.stop()
            await client.query("SELECT 1", after=await pay(client, 5))
            monkeypatch.setattr(rollback, "PATIENCE_S", 0.5)
            with pytest.raises(SchemaError, match="version 1 of Balances is .* behind, and no running program"):
                await roll_back(new_app, log, engine, "Balances")
            assert live(database_url) == (2, 2)
            assert (await roll_back(old_app, log, engine, "Balances")).version == 1
            with pytest.raises(SchemaError, match=r"version 7 of Balances is no longer there \(kept .*: 2\)"):
                await roll_back(old_app, log, engine, "Balances", 7)
        # a restart of the newer program does not take back what a person has rolled back
        async with run(new_app, "new"):
            assert live(database_url) == (1, 1)


async def test_a_person_pauses_a_projection_over_restarts(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    engine = open_database(database_url)
    try:
        async with run(ledger(app_name), "old"):
            await client.query("SELECT 1", after=await pay(client, 3))
            assert checkpoints.pause(engine, "Balances")
            await client.query("SELECT 1", after=await pay(client, 4), projections=["Volumes"])
            with engine.begin() as connection:  # as a rollback does while it waits for another version
                fence_all(connection, "Balances", 1)
        async with run(ledger(app_name), "old") as service:
            receipts = await pay(client, 5)
            await client.query("SELECT 1", after=receipts, projections=["Volumes"])
            assert service.health.ready
            assert ask(database_url, "SELECT sum(cents) FROM balances") == [(3,)]
            assert checkpoints.resume(engine, "Balances")
            await client.query("SELECT 1", after=receipts)
            assert ask(database_url, "SELECT sum(cents) FROM balances") == [(3 + 6 + 10,)]
    finally:
        engine.dispose()


@pytest.mark.setting("deployment.retention")
async def test_a_version_that_readers_left_is_dropped_after_the_retention_unless_a_program_follows_it(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    numbers = "SELECT generation FROM eskernel_projection WHERE name = 'Balances' ORDER BY generation"
    async with run(ledger(app_name), "old") as old:
        await pay(client, 3)
        async with run(ledger(app_name, 2), "new", deployment__retention=1.0) as new:
            job = next(job for job in new.scheduler.report() if job["name"] == "drop_expired")
            await wait_until(lambda: old.status()["deployment"]["mixed"])
            assert job["interval"] == 1.0
            await wait_until(
                lambda: next(job for job in new.scheduler.report() if job["name"] == "drop_expired")["runs"] >= 3
            )
            assert ask(database_url, numbers) == [(1,), (2,)]
            await old.stop()
            await wait_until(lambda: ask(database_url, numbers) == [(2,)])
