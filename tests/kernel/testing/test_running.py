"""A whole app in the test's own process: what a test may rely on."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, Table, event, text
from sqlalchemy import inspect as inspect_database
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import migrations
from aggregates import Aggregate, Context, InvalidId, Rejected, applies, command, handles
from aggregates import event as domain_event
from aggregates.commit import decode
from examples.bank import Account, Deposit, Deposited, Withdraw
from examples.bank import app as bank
from kernel import App, Client
from kernel.errors import CommandError, NotSettled, Overloaded, QueryTimeout, Unavailable
from kernel.log import MemoryLog
from kernel.projector.deployment import build_missing
from kernel.settings import Commands, Settings, Stream
from kernel.testing import RunningApp, running
from projections import QueryRefused, Rows, SchemaError
from projections import applies as projects
from projections.database import open_database
from projections.identity import identify
from projections.origin import register
from tests.apps import Explode, Note, Notebook, NoteTwice, notebooks

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@domain_event
class Stamped:
    at: datetime


@command
class Stamp:
    pass


class Clockwork(Aggregate):
    last: datetime | None = None

    @handles
    def stamp(self, command: Stamp, context: Context) -> Stamped:
        return Stamped(context.now)

    @applies
    def stamped(self, event: Stamped) -> None:
        self.last = event.at


class Base(DeclarativeBase):
    pass


class Elsewhere(Base):
    __tablename__ = "elsewhere"
    __table_args__ = {"schema": "other"}
    account: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


class Elsewheres(Rows[Elsewhere], of=Account):
    @projects
    def deposited(self, row: Elsewhere, event: Deposited) -> None:
        row.cents += event.cents


clockwork = App("clockwork", aggregates=[Clockwork])


@pytest.fixture
async def books() -> AsyncIterator[RunningApp]:
    async with running(notebooks("books")) as kernel:
        yield kernel


# commands and queries


async def test_commands_events_and_rows_go_the_whole_way() -> None:
    async with running(bank) as kernel:
        first = await kernel.execute(Account, "alice", Deposit(500))
        second = await kernel.execute(Account, "alice", Withdraw(200))
        assert (first.version, second.version, second.sequence) == (1, 2, 2)
        await kernel.settled()
        assert await kernel.query("select account, cents from balances") == [{"account": "alice", "cents": 300}]
        loaded = await kernel.load(Account, "alice")
        assert (loaded.state.balance, loaded.version) == (300, 2)
        assert (await kernel.load(Account, "alice", at=1)).state.balance == 500


async def test_projection_has_begun_when_the_block_begins(books: RunningApp) -> None:
    assert books.parts.projector.progress.begun


async def test_every_kind_of_projection_is_kept_up_to_date(books: RunningApp) -> None:
    await books.execute(Notebook, "a", NoteTwice("red"))
    receipt = await books.execute(Notebook, "b", Note("red", 5))
    assert await books.query("select sum(total) as total from pages", after=receipt) == [{"total": 8}]
    assert await books.query("select times from words where word = :word", {"word": "red"}) == [{"times": 3}]
    assert await books.query("select count(*) as lines from lines") == [{"lines": 3}]


async def test_a_query_after_a_receipt_includes_it_each_time(books: RunningApp) -> None:
    for count in range(1, 30):
        receipt = await books.execute(Notebook, f"n{count}", Note("more"))
        rows = await books.query("select count(*) as notes from lines", after=receipt, projections=["Lines"])
        assert rows == [{"notes": count}]


async def test_errors_are_those_of_a_client(books: RunningApp) -> None:
    with pytest.raises(Rejected, match="nothing to note"):
        await books.execute(Notebook, "a", Note(""))
    with pytest.raises(CommandError, match="ZeroDivisionError: boom") as failed:
        await books.execute(Notebook, "a", Explode())
    with pytest.raises(InvalidId):
        await books.execute(Notebook, "", Note("a"))
    with pytest.raises(TypeError, match="is not a command"):
        await books.execute(Notebook, "a", "Note")
    with pytest.raises(CommandError, match="no aggregate 'Account'") as unknown:
        await books.execute(Account, "a", Deposit(1))
    with pytest.raises(CommandError, match="bytes") as large:
        await books.execute(Notebook, "a", Note("x" * 2_000_000))
    assert [error.value.type for error in (failed, unknown, large)] == ["failed", "unknown-aggregate", "too-large"]


async def test_a_repeated_command_takes_effect_once(books: RunningApp) -> None:
    first = await books.execute(Notebook, "a", Note("once"), command_id="c1")
    again = await books.execute(Notebook, "a", Note("once"), command_id="c1")
    assert (again.version, again.sequence, again.duplicate) == (first.version, first.sequence, True)


async def test_the_limits_of_the_settings_apply() -> None:
    settings = Settings(commands=Commands(pending=1), stream=Stream(partitions=3))
    async with running(bank, settings) as kernel:
        sending = [kernel.execute(Account, f"a{number}", Deposit(1), timeout=0) for number in range(3)]
        outcomes = await asyncio.gather(*sending, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[1:]] == [Overloaded, Overloaded]
        assert kernel.log.subjects.partitions == 3


def test_the_methods_take_what_those_of_a_client_take() -> None:
    assert issubclass(RunningApp, Client)
    for name in ("execute", "send", "load", "query"):
        assert inspect.signature(getattr(RunningApp, name)) == inspect.signature(getattr(Client, name))


async def test_a_query_only_reads_and_what_is_written_afterwards_is_not_hindered(books: RunningApp) -> None:
    for written in ("delete from pages__1", "with one as (select 1) delete from pages__1"):
        with pytest.raises(QueryRefused):
            await books.query(written)
    receipt = await books.execute(Notebook, "a", Note("after it"))
    assert await books.query("select last from pages", after=receipt) == [{"last": "after it"}]


async def test_a_projection_that_stands_still_is_named_when_a_query_waits_for_it(books: RunningApp) -> None:
    books.parts.projector.assign(frozenset())
    await books.parts.projector.released()
    receipt = await books.execute(Notebook, "a", Note("unseen"))
    with pytest.raises(QueryTimeout, match=rf"sequence {receipt.sequence} .*Pages, Words, Lines"):
        await books.query("select 1", after=receipt, timeout=0.01)


# the clock


async def test_time_stands_still_until_it_is_moved() -> None:
    async with running(clockwork, now=NOON) as kernel:
        for _ in range(2):
            await kernel.execute(Clockwork, "c", Stamp())
        kernel.clock.advance(timedelta(days=1, microseconds=5))
        await kernel.execute(Clockwork, "c", Stamp())
        later = NOON + timedelta(days=1, microseconds=5)
        assert (await kernel.load(Clockwork, "c")).state.last == later == kernel.clock.now()
        assert (await kernel.load(Clockwork, "c", at=NOON)).version == 2
        stored = await kernel.log.read_subject(kernel.log.subjects.address("Clockwork", "c").subject)
        times = [envelope.time for commit in stored for envelope in decode(commit.payload)]
        assert times == ["2026-01-01T12:00:00Z", "2026-01-01T12:00:00Z", "2026-01-02T12:00:00.000005Z"]


async def test_the_clock_begins_at_the_present_time() -> None:
    before = datetime.now(UTC)
    async with running(clockwork) as kernel:
        assert before <= kernel.clock.now() <= datetime.now(UTC)


# settled


async def test_it_is_settled_when_what_was_begun_is_answered_and_projected(books: RunningApp) -> None:
    tasks = [asyncio.create_task(books.execute(Notebook, f"n{n % 50}", Note("many"))) for n in range(2_000)]
    await books.settled()
    assert all(task.done() for task in tasks)
    assert await books.query("select sum(notes) as notes from pages") == [{"notes": 2_000}]


async def test_what_reacts_to_events_is_waited_for_until_nothing_moves(books: RunningApp) -> None:
    async def react() -> bool:
        (row,) = await books.query("select count(*) as lines from lines")
        if row["lines"] < 4:
            await books.execute(Notebook, f"n{row['lines']}", Note("a reaction"))
        return bool(row["lines"] < 4)

    books.settlers.append(react)
    await books.execute(Notebook, "n", Note("the first"))
    await books.settled()
    assert await books.query("select count(*) as lines from lines") == [{"lines": 4}]


async def test_settled_tells_once_of_each_event_that_could_not_be_folded(books: RunningApp) -> None:
    await books.execute(Notebook, "bad", Note("poison row"))
    await books.execute(Notebook, "good", Note("fine"))
    with pytest.raises(NotSettled, match="Pages: event 1 of Notebook bad: .*no such page"):
        await books.settled()
    await books.settled()
    assert await books.query("select notebook from pages") == [{"notebook": "good"}]
    await books.execute(Notebook, "worse", Note("poison sql"))
    with pytest.raises(NotSettled, match="Lines: event 1 of Notebook worse: .*no such line"):
        await books.settled()


async def test_settled_tells_what_it_waited_for_in_vain(books: RunningApp) -> None:
    async def never() -> bool:
        return True

    books.settlers.append(never)
    with pytest.raises(NotSettled, match=r"after 0.01 s 0 commands have no answer, and projection is at 0"):
        await books.settled(timeout=0.01)


async def test_a_projection_that_fails_as_a_whole_is_told_at_once(books: RunningApp) -> None:
    @event.listens_for(books.parts.engine, "before_cursor_execute")
    def refuse(*arguments: Any) -> None:
        if "eskernel_checkpoint" in arguments[2]:
            raise RuntimeError("no statements today")

    await books.execute(Notebook, "a", Note("a"))
    with pytest.raises(NotSettled, match="projection stands still: RuntimeError: no statements today"):
        await books.settled()


async def test_an_app_without_projections_settles() -> None:
    async with running(clockwork) as kernel:
        receipt = await kernel.execute(Clockwork, "c", Stamp())
        await kernel.settled()
        assert await kernel.query("select 1 as one", after=receipt) == [{"one": 1}]


# several, and the end


async def test_apps_beside_each_other_know_nothing_of_each_other() -> None:
    async def use(number: int) -> list[dict[str, Any]]:
        async with running(bank) as kernel:
            receipt = await kernel.execute(Account, "alice", Deposit(number))
            return await kernel.query("select account, cents from balances", after=receipt)

    found = await asyncio.gather(*(use(number) for number in range(1, 6)))
    assert found == [[{"account": "alice", "cents": number}] for number in range(1, 6)]
    in_threads = await asyncio.gather(*(asyncio.to_thread(asyncio.run, use(number)) for number in range(1, 4)))
    assert in_threads == found[:3]


def test_nothing_is_left_behind() -> None:
    threads = set(threading.enumerate())

    async def use() -> None:
        async with running(notebooks("books")) as kernel:
            await kernel.query("select 1", after=await kernel.execute(Notebook, "b", Note("b")))
            assert set(threading.enumerate()) == threads, "not even meanwhile"
            unanswered = asyncio.create_task(kernel.execute(Notebook, "a", Note("a")))
            await asyncio.sleep(0)
        assert (await unanswered).version == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert set(threading.enumerate()) == threads
        with pytest.raises(Unavailable, match="books has ended: execute commands within"):
            await kernel.execute(Notebook, "a", Note("late"))
        with pytest.raises(Unavailable, match="books has ended"):
            await kernel.query("select 1")

    asyncio.run(use())


async def test_an_error_of_the_test_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with running(bank) as kernel:
            await kernel.execute(Account, "alice", Deposit(1))
            raise ZeroDivisionError


# the database


def describe(engine: Engine) -> dict[str, Any]:
    """Return what a database holds: tables with columns, keys and indexes, views, and the kernel's records."""
    inspector, reflected = inspect_database(engine), MetaData()
    reflected.reflect(engine, views=True)
    with engine.connect() as connection:
        records = {
            name: connection.execute(Table(name, reflected).select()).all()
            for name in ("eskernel_schema", "eskernel_table", "eskernel_checkpoint", "eskernel_sequence")
        }
        records["ids"] = [len(row.id) for row in connection.execute(Table("eskernel_database", reflected).select())]
        projections = [(row.name, row.generation, row.version, row.state, row.layout, row.retired)
                       for row in connection.execute(Table("eskernel_projection", reflected).select())]  # fmt: skip
        streams = connection.execute(Table("eskernel_stream", reflected).select()).all()
    shapes = {
        name: (
            [(column.name, str(column.type), column.nullable, column.primary_key) for column in table.columns],
            sorted(map(str, inspector.get_indexes(name))),
        )
        for name, table in reflected.tables.items()
    }
    views = {name: inspector.get_view_definition(name) for name in inspector.get_view_names()}
    streams = [(row.app, row.partitions, row.anchor) for row in streams]
    return {"shapes": shapes, "views": views, "records": records, "projections": sorted(projections), "of": streams}


async def test_the_tables_are_those_that_migrations_and_a_first_start_make(tmp_path: Path) -> None:
    app = notebooks("books")
    migrated = open_database(f"sqlite:///{tmp_path / 'migrated.db'}")
    log = MemoryLog(app.name)
    migrations.upgrade(migrated)
    register(migrated, app.name, (await log.info()).created, 64, 0)
    identify(migrated)
    await build_missing(app, log, migrated)
    expected = describe(migrated)
    migrated.dispose()
    async with running(app) as kernel:
        found = describe(kernel.parts.engine)
    for what in expected:
        # epochs are those of claims: a build and the projector have had one each
        if what == "records":
            for records in (expected[what], found[what]):
                records["eskernel_checkpoint"] = sorted(row[:4] for row in records["eskernel_checkpoint"])
        assert found[what] == expected[what]


async def test_a_thread_of_the_test_waits_for_the_only_connection(books: RunningApp) -> None:
    await books.execute(Notebook, "a", Note("a"))
    await books.settled()

    def count() -> Any:
        with books.parts.engine.connect() as connection:
            return connection.scalar(text("select count(*) from lines"))

    with books.parts.engine.begin() as connection:
        counting = asyncio.get_running_loop().run_in_executor(None, count)
        connection.execute(text("delete from lines__1"))
        await asyncio.sleep(0)
        assert not counting.done()
    assert await counting == 0


async def test_it_runs_on_a_database_that_is_named_too(fresh_postgres: str, tmp_path: Path) -> None:
    for url in (fresh_postgres, f"sqlite:///{tmp_path / 'new.db'}"):
        async with running(notebooks("books"), database=url) as kernel:
            receipt = await kernel.execute(Notebook, "a", Note("here"))
            assert await kernel.query("select last from pages", after=receipt) == [{"last": "here"}]
            with pytest.raises(QueryRefused):
                await kernel.query("with one as (select 1) delete from pages__1")
            await kernel.settled()
    assert list(tmp_path.iterdir()) == []
    engine = open_database(fresh_postgres)
    assert inspect_database(engine).get_table_names() == []
    engine.dispose()


@pytest.mark.parametrize("database", [None, "sqlite:///new.db"])
async def test_what_can_not_work_is_refused_with_a_remedy(database: str | None) -> None:
    with pytest.raises(SchemaError, match="remove schema=|run it without `database`"):
        async with running(App("elsewhere", aggregates=[Account], projections=[Elsewheres]), database=database):
            pass
