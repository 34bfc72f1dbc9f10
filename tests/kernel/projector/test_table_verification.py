"""The live tables are compared with a second fold of the log: what differs is named, and nothing is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, text

from aggregates import DeclarationError
from kernel import Client, Service
from kernel.app import App
from kernel.log.base import Stored
from kernel.projector.rebuild import Rebuild
from kernel.projector.repairing import repair_aggregate
from kernel.projector.replay import RebuildProgress
from kernel.projector.verification import Verification, Verified
from projections import HandlerFailed, Rows, SchemaError, Tallies, Tally, applies, checkpoints, dead_letters, exclusions
from projections.database import open_database
from projections.retrying import retry_all
from tests.apps import Note, Notebook, Noted, Page, Pages, Word, Words, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, None]]


@dataclass
class Running:
    """A service with 20 notebooks, and a client."""

    service: Service
    client: Client
    engine: Engine

    @property
    def app(self) -> App:
        return self.service.app

    async def note(self, count: int, text: str = "hello", to: str = "") -> None:
        names = [to or f"n{number % 20}" for number in range(count)]
        sent = (self.client.execute(Notebook, name, Note(text, place)) for place, name in enumerate(names))
        await self.client.query("select 1", after=await asyncio.gather(*sent), timeout=20)

    async def verify(self, app: App | None = None, name: str = "", *, same: bool = True) -> list[Verified]:
        chosen = app or self.app
        wanted = [declared for declared in chosen.projections if name in ("", declared.name)]
        return await Verification(chosen, self.client.log, self.engine, wanted, same=same).run()

    def change(self, statement: str) -> None:
        """Change a live table by hand, behind the service's back."""
        with self.engine.begin() as connection:
            assert connection.execute(text(statement)).rowcount == 1


@asynccontextmanager
async def running(app: App, nats_url: str, database_url: str, path: Path) -> AsyncIterator[Running]:
    service = Service(app, settings_for(path / "data", nats=nats_url, database=database_url))
    await service.start()
    engine = open_database(database_url)
    try:
        async with await Client.connect(app, nats=nats_url, database=database_url) as client:
            yield Running(service, client, engine)
    finally:
        engine.dispose()
        await service.stop()


@pytest.fixture
async def here(nats_url: str, database_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(notebooks(app_name), nats_url, database_url, tmp_path) as found:
        yield found


async def test_tables_that_are_what_the_log_says_are_found_equal(here: Running) -> None:
    await here.note(300)
    steps: list[RebuildProgress] = []
    verification = Verification(here.app, here.client.log, here.engine, here.app.projections, steps.append)
    found = await verification.run()
    assert [(each.projection, each.differing, each.parked) for each in found] == [
        ("Pages", 0, []), ("Words", 0, []), ("Lines", 0, []),
    ]  # fmt: skip
    assert [each.tables[0].rows for each in found] == [20, 1, 300]
    assert found[0].events == 300
    assert steps[-1].events == 300


@pytest.mark.parametrize(
    ("statement", "differs"),
    [
        ("update pages__1 set total = 7 where notebook = 'n3'", ("Pages", "changed", {"notebook": "n3"}, ["total"])),
        ("delete from pages__1 where notebook = 'n4'", ("Pages", "missing", {"notebook": "n4"}, [])),
        (
            "insert into pages__1 (notebook, notes, total, eskernel_sequence) values ('nobody', 1, 1, 1)",
            ("Pages", "extra", {"notebook": "nobody"}, []),
        ),
        ("update pages__1 set eskernel_sequence = 4 where notebook = 'n5'",
         ("Pages", "changed", {"notebook": "n5"}, ["eskernel_sequence"])),
        ("update words__1 set times = times - 1", ("Words", "changed", {"word": "hello"}, ["times"])),
        ("update lines__1 set text = 'x' where notebook = 'n1' and sequence = 2",
         ("Lines", "changed", {"notebook": "n1", "sequence": 2}, ["text"])),
    ],
)  # fmt: skip
async def test_each_kind_of_difference_is_named_with_its_row_and_columns(
    here: Running, statement: str, differs: tuple[str, str, dict[str, Any], list[str]]
) -> None:
    await here.note(100)
    here.change(statement)
    found = await here.verify()
    assert {each.projection: each.differing for each in found if each.differing} == {differs[0]: 1}
    (example,) = next(each for each in found if each.differing).tables[0].examples
    assert (example.what, example.key) == differs[1:3]
    if example.what == "changed":
        assert sorted(example.stored) == sorted(example.folded) == differs[3]


async def test_a_verification_under_load_compares_both_at_the_same_place(here: Running) -> None:
    await here.note(100)
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            await here.note(20)

    loading = asyncio.create_task(load())
    for _ in range(3):
        assert [each.differing for each in await here.verify()] == [0, 0, 0]
    stop.set()
    await loading


async def test_nothing_of_a_verification_stays(here: Running) -> None:
    await here.note(100)

    def rows() -> dict[str, list[Any]]:
        with here.engine.connect() as connection:
            names = [*inspect(connection).get_table_names(), *inspect(connection).get_view_names()]
            moving = {"eskernel_checkpoint": "projection", "eskernel_stream": "app"}  # the service goes on
            return {
                name: sorted(map(str, connection.execute(text(f"select {moving.get(name, '*')} from {name}"))))
                for name in names
            }

    before = rows()
    await here.verify()
    assert rows() == before


async def test_parked_aggregates_are_compared_up_to_where_they_are_parked(here: Running) -> None:
    await here.note(40)
    await here.note(1, "poison row", to="n3")
    await here.note(1, "more", to="n3")
    found = await here.verify()
    assert [(each.differing, each.parked) for each in found] == [(0, [])] * 3
    with here.engine.connect() as connection:
        assert connection.execute(text("select count(*) from eskernel_dead_letter")).scalar() == 2


@pytest.mark.parametrize("name", ["Pages", "Words", "Lines"])
async def test_a_skipped_event_is_left_out_by_verifications_and_rebuilds(here: Running, name: str) -> None:
    poison = {"Pages": "poison row", "Words": "poison tally", "Lines": "poison sql"}[name]
    await here.note(40)
    await here.note(1, poison, to="n3")
    await here.note(1, "after", to="n3")
    declared = here.app.projection(name)
    plan = exclusions.plan_of(here.app.plan(here.engine.dialect), name)
    dead_letters.skip(here.engine, plan, "Notebook", "n3", "test", "it can't be folded")
    retried = dead_letters.retry(here.engine, plan, name, "Notebook", "n3", None)
    assert retried.left == 0
    assert [each.differing for each in await here.verify()] == [0, 0, 0]
    table = {"Pages": "pages", "Words": "words", "Lines": "lines"}[name]
    before = await here.client.query(f"select * from {table} order by 1, 2")
    (built,) = await Rebuild(here.app, here.client.log, here.engine, [declared]).run()
    assert built.parked == 0
    assert await here.client.query(f"select * from {table} order by 1, 2") == before
    assert [each.differing for each in await here.verify()] == [0, 0, 0]


async def test_another_program_is_compared_with_the_live_tables(here: Running, app_name: str) -> None:
    await here.note(100)

    class Pages(Rows[Page], of=Notebook, version=2):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            if event.number == 7:
                raise ValueError("no page 7")
            row.notes += 1
            row.total += event.number
            row.last = event.text.upper()

    class Counts(Tallies[Word], of=Notebook, name="Words", version=1):
        @applies
        def noted(self, tally: Tally[Word], event: Noted) -> None:
            tally[event.text].times += 1

    new = App(app_name, aggregates=[Notebook], projections=[Pages, Counts])
    with pytest.raises(SchemaError, match="readers see version 1 of Pages, and this program declares version 2"):
        await here.verify(new)
    pages, words = await here.verify(new, same=False)
    assert (pages.live_version, pages.version, words.differing) == (1, 2, 0)
    assert (pages.tables[0].changed, pages.tables[0].extra) == (19, 1)
    assert pages.tables[0].columns == {"last": 19}
    assert [(parked.aggregate_id, parked.sequence) for parked in pages.parked] == [("n7", 1)]
    assert pages.parked[0].error == "ValueError: no page 7"


async def test_a_rehearsal_notices_an_aggregate_that_was_renamed(here: Running, app_name: str) -> None:
    await here.note(20)

    class Diary(Notebook, name="Diary"):
        pass

    class Pages(Rows[Page], of=Diary):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            row.notes += 1

    with pytest.raises(DeclarationError, match="name='Notebook'"):
        await here.verify(App(app_name, aggregates=[Diary], projections=[Pages]), same=False)


async def test_a_projection_that_was_not_built_is_not_verified(here: Running, app_name: str) -> None:
    class More(Words, of=Notebook, name="More"):
        pass

    with pytest.raises(SchemaError, match="More has not been built"):
        await here.verify(App(app_name, aggregates=[Notebook], projections=[More]))


@pytest.mark.parametrize(
    ("statement", "since"),
    [
        # as it was after the third of its five events
        ("update pages__1 set notes = 3, total = 69, last = 'hello' where notebook = 'n3'", 4),
        ("update pages__1 set last = 'never said' where notebook = 'n3'", None),
        ("delete from pages__1 where notebook = 'n3'", 1),
        ("update pages__1 set eskernel_sequence = 4 where notebook = 'n3'", 5),
    ],
)
async def test_a_difference_says_since_which_event(here: Running, statement: str, since: int | None) -> None:
    await here.note(100)
    here.change(statement)
    (pages,) = await here.verify(name="Pages")
    (example,) = pages.tables[0].examples
    assert (example.key, example.since) == ({"notebook": "n3"}, since)


@pytest.mark.parametrize(
    "statement",
    [
        "update pages__1 set total = 7 where notebook = 'n3'",
        "delete from pages__1 where notebook = 'n3'",
        "update pages__1 set eskernel_sequence = 2, notes = 2 where notebook = 'n3'",
    ],
)
async def test_a_repair_makes_a_row_again_and_the_service_goes_on_with_it(here: Running, statement: str) -> None:
    await here.note(100)
    before = await here.client.query("select * from pages order by 1")
    here.change(statement)
    (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "n3")
    assert (repaired.projection, repaired.changed, repaired.exists, repaired.sequence) == ("Pages", True, True, 5)
    assert await here.client.query("select * from pages order by 1") == before
    await here.note(3, "after", to="n3")
    assert [each.differing for each in await here.verify()] == [0, 0, 0]
    (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "n3")
    assert (repaired.changed, repaired.sequence) == (False, 8)


async def test_a_repair_also_replaces_what_the_service_has_in_memory(here: Running) -> None:
    await here.note(100)
    here.change("update pages__1 set total = 7 where notebook = 'n3'")
    checkpoints.resume(here.engine, "Pages")  # the service begins again, and reads the row
    await here.note(1, to="n3")
    assert (await here.verify(name="Pages"))[0].differing == 1
    (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "n3")
    assert repaired.changed
    await here.note(1, to="n3")
    assert (await here.verify(name="Pages"))[0].differing == 0


async def test_a_repair_removes_a_row_without_events_and_leaves_parked_events_alone(here: Running) -> None:
    await here.note(40)
    await here.note(1, "poison row", to="n3")
    with here.engine.begin() as connection:
        connection.execute(text("insert into pages__1 (notebook, notes, total) values ('nobody', 1, 1)"))
        connection.execute(text("update pages__1 set total = 99 where notebook = 'n3'"))
    (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "nobody")
    assert (repaired.changed, repaired.exists) == (True, False)
    (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "n3", "Pages")
    assert (repaired.changed, repaired.sequence) == (True, 2)
    assert [each.differing for each in await here.verify()] == [0, 0, 0]
    with here.engine.connect() as connection:
        assert connection.execute(text("select count(*) from eskernel_dead_letter")).scalar() == 1


async def test_a_repair_that_can_not_be_done_says_why_and_changes_nothing(here: Running, app_name: str) -> None:
    await here.note(40)
    before = await here.client.query("select * from pages order by 1")

    class Pages(Rows[Page], of=Notebook):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            raise ValueError("this program is bad")

    bad = App(app_name, aggregates=[Notebook], projections=[Pages])
    with pytest.raises(HandlerFailed, match="Notebook n3, event 1: ValueError: this program is bad"):
        await repair_aggregate(bad, here.client.log, here.engine, "Notebook", "n3")
    with pytest.raises(SchemaError, match="Words is a Tallies projection: .*`eskernel rebuild Words`"):
        await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", "n3", "Words")
    assert await here.client.query("select * from pages order by 1") == before


async def test_a_repair_has_the_events_that_were_folded_while_it_read_the_log(
    here: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await here.note(100)
    log, read = here.client.log, here.client.log.read_subject
    late = True

    async def read_and_go_on(subject: str, after: int = 0, known: Sequence[Stored] = ()) -> list[Stored]:
        nonlocal late
        stored = await read(subject, after, known)
        if late:
            late = False
            await here.note(1, "late", to="n3")
        return stored

    monkeypatch.setattr(log, "read_subject", read_and_go_on)
    (repaired,) = await repair_aggregate(here.app, log, here.engine, "Notebook", "n3")
    assert repaired.sequence == 6
    await here.note(1, "after", to="n3")
    assert [each.differing for each in await here.verify()] == [0, 0, 0]
    with here.engine.connect() as connection:
        assert connection.execute(text("select count(*) from eskernel_dead_letter")).scalar() == 0


async def test_events_before_and_after_a_skipped_one_are_folded_again_when_a_mended_program_retries_them(
    here: Running, app_name: str
) -> None:
    await here.note(40)
    for said in ("second", "poison row", "fourth", "fifth"):
        await here.note(1, said, to="n30")
    plan = exclusions.plan_of(here.app.plan(here.engine.dialect), "Pages")
    dead_letters.skip(here.engine, plan, "Notebook", "n30", "test", "it can't be folded")
    assert dead_letters.retry(here.engine, plan, "Pages", "Notebook", "n30", None).left == 0

    class Bad(Pages, of=Notebook, name="Pages"):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            if event.text == "second":
                raise ValueError("this program is bad")
            super().noted(row, event)

    bad = App(app_name, aggregates=[Notebook], projections=[Bad])
    (built,) = await Rebuild(bad, here.client.log, here.engine, bad.projections).run()
    assert built.parked == 1
    done = retry_all(here.engine, plan, dead_letters.waiting(here.engine))
    assert [(each.folded, each.left, each.error) for each in done] == [(3, 0, "")]
    await here.note(1, "sixth", to="n30")
    assert (await here.verify(name="Pages"))[0].differing == 0


async def test_a_verification_says_up_to_where_it_compared(here: Running) -> None:
    await here.note(40)
    with here.engine.connect() as connection:
        place = connection.execute(text("select max(sequence) from eskernel_checkpoint")).scalar()

    class Late(Verification):
        async def _fold(self, *arguments: Any) -> Any:
            await here.note(10)  # what comes after the copy is read in the same batch, and not folded
            return await super()._fold(*arguments)

    found = await Late(here.app, here.client.log, here.engine, here.app.projections).run()
    assert [(each.sequence, each.events, each.differing) for each in found] == [(place, 40, 0)] * 3


async def test_two_workers_tables_are_verified_and_repaired_whoever_owns_the_partition(
    here: Running, nats_url: str, database_url: str, tmp_path: Path, wait_until: Wait
) -> None:
    await here.note(40)
    async with Service(here.app, settings_for(tmp_path / "2", nats=nats_url, database=database_url)) as second:
        await wait_until(lambda: [len(each.partitions) for each in (here.service, second)] == [32, 32])
        owned = {name: here.client.log.subjects.partition("Notebook", name) for name in map("n{}".format, range(20))}
        for worker in (here.service, second):
            name = next(name for name, partition in owned.items() if partition in worker.partitions)
            await here.note(1, to=name)
            here.change(f"update pages__1 set total = 7 where notebook = '{name}'")
            checkpoints.resume(here.engine, "Pages")  # the owner begins again, and reads the row
            await here.note(1, to=name)
            (pages,) = await here.verify(name="Pages")
            assert [example.key for example in pages.tables[0].examples] == [{"notebook": name}]
            (repaired,) = await repair_aggregate(here.app, here.client.log, here.engine, "Notebook", name)
            assert repaired.changed
            await here.note(20)
            await here.note(1, to=name)
            assert [each.differing for each in await here.verify()] == [0, 0, 0]
