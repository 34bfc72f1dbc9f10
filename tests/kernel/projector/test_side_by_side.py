"""Two programs, or two processes of one, meet: at a build, at a rebuild, at dead letters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kernel import App, Client
from kernel.preparation import Preparation
from kernel.projector import deployment
from kernel.projector.rebuild import Rebuild, clean_up
from kernel.projector.rollback import roll_back
from projections import SchemaError, dead_letters, schema
from projections.database import open_database
from tests import ledgers
from tests.conftest import settings_for
from tests.kernel.projector.conftest import Run
from tests.kernel.projector.test_deploying import ask, live, pay
from tests.ledgers import ledger


async def test_a_start_does_not_wait_for_the_build_of_another_worker(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 100)
    monkeypatch.setattr(deployment, "AT_START", 0)
    slow = {"rates__rebuild__rate": 5.0, "rates__rebuild__burst": 5.0}
    async with run(ledger(app_name, 2), "new1", **slow) as one:
        await wait_until(lambda: one.status()["deployment"]["build"]["phase"] == "building")
        async with asyncio.timeout(10), run(ledger(app_name, 2), "new2", **slow) as two:
            assert two.status()["deployment"]["build"]["phase"] == "waiting"
            await wait_until(lambda: one.partitions and two.partitions)


async def test_where_no_projection_is_built_yet_nothing_waits_for_it(
    run: Run, client: Client, app_name: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 30)
    monkeypatch.setattr(deployment, "AT_START", 0)
    declared = ledger(app_name, 2)
    purse = declared.types["Purse"].cls
    alone = App(app_name, aggregates=[purse], projections=[type(declared.projection("Balances").instance)])
    async with run(alone, "new", rates__rebuild__rate=1.0, rates__rebuild__burst=1.0) as new:
        await wait_until(lambda: new.parts.projector.progress.end >= 30)
        assert new.parts.projector.progress.behind == 0, "it would be reported as standing still"
        assert await new.parts.projector.catch_up(1.0), "a hand-over would wait for nothing"


async def test_tables_that_another_process_has_built_are_kept_up_to_date(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    old = ledger(app_name)
    async with run(ledger(app_name, 2), "new"):
        await pay(client, 3)
    engine = open_database(database_url)
    schema.drop_version(engine, "Balances", 1, old.projections)
    engine.dispose()
    async with run(old, "old") as service:
        await wait_until(lambda: service.parts.projector.state == "running")
        await Rebuild(old, client.log, database_url, [old.projection("Balances")]).run()
        assert live(database_url) == (1, 3)
        await client.query("SELECT 1", after=await pay(client, 4))
        assert ask(database_url, "SELECT sum(cents) FROM balances") == [(3 + 6,)]


async def test_a_rebuild_after_a_rollback_is_kept_up_to_date_by_the_program_that_declares_it(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    old_app, new_app = ledger(app_name), ledger(app_name, 2)
    async with run(old_app, "old") as old, run(new_app, "new") as new:
        await wait_until(lambda: old.status()["deployment"]["mixed"])
        engine, log = new.parts.engine, new.parts.log
        await roll_back(old_app, log, engine, "Balances")
        await client.query("SELECT 1", after=await pay(client, 5))
        declared = new_app.projection("Balances")
        await Rebuild(new_app, log, engine, [declared]).run()
        assert live(database_url) == (2, 3)
        await client.query("SELECT 1", after=await pay(client, 5))
        assert ask(database_url, "SELECT sum(payments) FROM balances") == [(10,)]
        # the old program's tables stay, since it runs, and since they are where a rollback leads to
        assert clean_up(engine, declared) == []
        assert (await roll_back(new_app, log, engine, "Balances")).generation == 1


async def test_a_build_that_has_failed_is_forgotten_when_somebody_else_has_done_it(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 10)
    monkeypatch.setattr(deployment, "AT_START", 0)
    monkeypatch.setattr(deployment, "AGAIN_S", 0.1)
    async with run(ledger(app_name, 2, arbitrary=True), "new") as new:
        await wait_until(lambda: new.parts.deployment.failure)
        mended = ledger(app_name, 2)
        await Rebuild(mended, client.log, database_url, [mended.projection("Balances")]).run()
        await wait_until(lambda: new.parts.deployment.failure is None and new.parts.deployment.status is None)
        await client.query("SELECT 1", after=await pay(client, 2))
        assert ask(database_url, "SELECT sum(payments) FROM balances") == [(12,)]


async def test_two_builds_of_one_projection_end_with_one_of_them(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(ledger(app_name), "old"):
        await pay(client, 100)
    monkeypatch.setattr(deployment, "AT_START", 0)
    monkeypatch.setattr(deployment, "AGAIN_S", 0.1)
    slow = {"rates__rebuild__rate": 20.0, "rates__rebuild__burst": 5.0}
    async with run(ledger(app_name, 2), "new", **slow) as new:
        await wait_until(lambda: (new.status()["deployment"]["build"] or {}).get("done", 0) > 10)
        mended = ledger(app_name, 2)
        await Rebuild(mended, client.log, database_url, [mended.projection("Balances")]).run()
        await wait_until(lambda: new.parts.deployment.status is None)
        assert new.parts.deployment.failure is None


async def test_dead_letters_are_retried_by_the_program_that_keeps_the_tables_whoever_takes_the_commands(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = [True]

    def fail(_low: int, _high: int) -> int:
        if away[0]:
            raise TimeoutError
        return 0

    monkeypatch.setattr(ledgers.random, "randint", fail)
    async with (
        run(ledger(app_name), "old") as old,
        run(ledger(app_name, 2, arbitrary=True), "new", retry_after=0.1) as new,
    ):
        await wait_until(lambda: old.partitions and new.partitions and old.status()["deployment"]["mixed"])
        letters = "SELECT count(*) FROM eskernel_dead_letter WHERE projection = 'Balances' AND generation = 2"
        await client.query("SELECT 1", after=await pay(client, 30))
        assert ask(database_url, letters) == [(30,)]
        away[0] = False
        await wait_until(lambda: ask(database_url, letters) == [(0,)])


async def test_what_no_program_can_decode_is_in_quarantine_once_and_not_again_after_it_was_skipped(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    async def spoil(name: str) -> int:
        return await client.log.append(client.log.subjects.address("Purse", name).subject, 0, b"no commit")

    def passed(at: int) -> bool:
        places = "SELECT min(sequence) FROM eskernel_checkpoint WHERE projection = 'Balances'"
        return ask(database_url, places)[0][0] >= at

    quarantined = "SELECT count(*) FROM eskernel_dead_letter WHERE projection = ''"
    async with run(ledger(app_name, 2), "new") as new:
        async with run(ledger(app_name), "old"):
            await wait_until(lambda: new.status()["deployment"]["mixed"])
            first = await spoil("first")
            await pay(client, 1)
            await wait_until(lambda: passed(first))
            assert ask(database_url, quarantined) == [(1,)]
        second = await spoil("second")
        await wait_until(lambda: ask(database_url, quarantined) == [(2,)])
        for at in (first, second):
            dead_letters.skip_quarantined(new.parts.engine, at, "me", "a test")
        # the older program's tables were not kept up to date meanwhile
        async with run(ledger(app_name), "old"):
            await wait_until(lambda: passed(second))
            assert ask(database_url, quarantined) == [(0,)]


async def test_sequences_that_another_program_does_not_store_are_not_missed(
    run: Run, client: Client, app_name: str, database_url: str, wait_until: Any
) -> None:
    """In each of two programs another projection stores the sequences of aggregates that have no row."""

    def program(*names: str) -> App:
        declared = {known.name: type(known.instance) for known in bare.projections}
        return App(app_name, aggregates=[bare.types["Purse"].cls], projections=[declared[name] for name in names])

    bare = ledgers.bare_ledger(app_name)
    async with run(program("Empty"), "old") as old:
        async with run(program("Counted", "Empty"), "new") as new:
            await wait_until(lambda: old.partitions and new.partitions and old.status()["deployment"]["mixed"])
            await wait_until(lambda: old.parts.projector.state == "running")
            old.parts.projector.begin_again()
            await pay(client, 20)
            await wait_until(lambda: ask(database_url, "SELECT count(*) FROM counted") == [(20,)])
        await wait_until(lambda: len(old.partitions) == 8)
        (*_, last) = await pay(client, 20)
        places = "SELECT min(sequence) FROM eskernel_checkpoint WHERE projection = 'Empty'"
        await wait_until(lambda: ask(database_url, places)[0][0] >= last.sequence)
        assert ask(database_url, "SELECT * FROM eskernel_dead_letter") == []


async def test_what_was_prepared_with_other_code_is_built_again(
    run: Run, client: Client, app_name: str, database_url: str, nats_url: str, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "unused", nats=nats_url, database=database_url, deployment__verify=False)
    async with run(ledger(app_name), "old"):
        await pay(client, 40)
        assert await Preparation(ledger(app_name, 2, arbitrary=True), settings).run(follow=False) is False
    # nobody has seen its tables: the mended program need not raise the version
    async with run(ledger(app_name, 2), "new"):
        assert ask(database_url, "SELECT sum(cents) FROM balances") == [(sum(range(40)),)]
        assert ("ready",) not in ask(database_url, "SELECT state FROM eskernel_projection")
        with pytest.raises(SchemaError, match="declares an older one: there is nothing to prepare"):
            await Preparation(ledger(app_name), settings).run(follow=False)
